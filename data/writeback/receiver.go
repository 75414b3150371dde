package writeback

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"path"
	"slices"
	"sync"
	"time"

	"forerun/block"
	"forerun/disk"
	"forerun/internal/chunk"
)

// ReceiverOptions says what a Receiver works with. FS, Dir and Source are needed.
type ReceiverOptions struct {
	FS  disk.FS
	Dir string // the daemon's state directory; writeback/ and clones/ in it are ours
	// Source finds the open source of a volume.
	Source func(volume string) (block.Device, error)
	// Close closes and unlocks a source that was released. It may be called
	// again for the same one. Nil leaves the source open.
	Close func(ctx context.Context, volume string) error
	// Owner is the arbiter's word on who has a volume; ok is false when it has
	// none. Nil: the highest epoch seen here decides alone.
	Owner func(volume string) (epoch uint64, node string, ok bool)
	// Role of the peers that may send changes; default "frontend".
	Role string
	// Grain is what clones keep at a time, in bytes; default 64 KiB.
	Grain int64
	Log   *slog.Logger // changes of state; none if nil
}

// Receiver is the backend's side: it stores checkpoints and carries them out.
type Receiver struct {
	o   ReceiverOptions
	fs  disk.FS
	dir string
	log *slog.Logger

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	work   sync.WaitGroup
	seals  chan struct{} // pieces being opened and sources being compared

	save sync.Mutex // one writing of the state at a time; before mu

	mu      sync.Mutex
	ready   bool
	st      state
	groups  map[string]*group
	parts   map[uint64]*part // by handle
	content map[string]chan struct{}
	clones  map[string]*clone // by NAME@CLONE
	saved   time.Time         // when the state was last written
}

// group is what goes on in one consistency group.
type group struct {
	name string
	turn chan struct{} // holds one token: begin, commit and release, one at a time

	// Guarded by Receiver.mu.
	last   checkpointID    // stored last
	part   *part           // on its way
	stored *checkpointFile // not yet carried out
	reason string          // why that takes long
	bell   chan struct{}   // closed when one of these changes
}

// part is a checkpoint on its way.
type part struct {
	handle uint64
	group  *group
	limits []bounds

	mu      sync.Mutex
	f       *checkpointFile
	gone    bool // dropped or stored
	renamed bool
	bell    chan struct{} // closed when next or gone changes
}

// turnWait is how long a piece waits for those before it.
const turnWait = 2 * time.Second

// reportEvery is how often a report alone makes the state be written.
const reportEvery = 10 * time.Second

// NewReceiver reads the state. Recover comes next. A damaged state is KindCorrupt.
func NewReceiver(o ReceiverOptions) (*Receiver, error) {
	if o.Role == "" {
		o.Role = "frontend"
	}
	if o.Grain <= 0 {
		o.Grain = 64 << 10
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	r := &Receiver{o: o, fs: o.FS, dir: path.Join(o.Dir, "writeback"), log: o.Log,
		seals: make(chan struct{}, 4), groups: map[string]*group{}, parts: map[uint64]*part{},
		content: map[string]chan struct{}{}, clones: map[string]*clone{}}
	if err := r.fs.MkdirAll(r.dir); err != nil {
		return nil, block.E("writeback.open", r.dir, 0, err)
	}
	st, err := loadState(r.fs, path.Join(r.dir, stateName))
	if err != nil {
		return nil, block.E("writeback.open", r.dir, 0, err)
	}
	r.st = st
	r.ctx, r.cancel = context.WithCancel(context.Background())
	if err := r.loadClones(); err != nil {
		r.cancel()
		return nil, err
	}
	return r, nil
}

// Recover carries out what was stored but not finished when the last process
// ended, and then lets Serve begin. Nothing may be served from the sources
// before it returned nil.
func (r *Receiver) Recover(ctx context.Context) error {
	names, err := r.fs.List(r.dir)
	if err != nil {
		return block.E("writeback.recover", r.dir, 0, err)
	}
	for _, n := range names { // sorted, so in order of id within a group
		full := path.Join(r.dir, n)
		switch path.Ext(n) {
		case storedEnd:
			err = r.recoverStored(ctx, full)
		case ".tmp":
			err = remove(r.fs, full)
		}
		if err != nil {
			return block.E("writeback.recover", full, 0, err)
		}
	}
	for _, n := range names {
		if path.Ext(n) == partEnd {
			if err := r.recoverPart(path.Join(r.dir, n)); err != nil {
				return block.E("writeback.recover", path.Join(r.dir, n), 0, err)
			}
		}
	}
	r.mu.Lock()
	r.ready = true
	r.mu.Unlock()
	return nil
}

// recoverStored carries out one stored checkpoint, unless that was finished.
func (r *Receiver) recoverStored(ctx context.Context, name string) error {
	c, err := openFile(r.fs, name, nil)
	if block.KindOf(err) == block.KindCorrupt {
		return r.damaged(name, r.groupOf(path.Base(name)), err)
	}
	if err != nil {
		return err
	}
	g := r.group(c.header.Group)
	if c.header.ID <= g.last.ID {
		c.close()
		return remove(r.fs, name)
	}
	g.last = c.header.checkpointID
	r.log.Info("a stored checkpoint is carried out again", "group", g.name, "id", g.last.ID)
	if c.commit == nil {
		c.close()
		return r.damaged(name, g, errors.New("the end of a stored checkpoint is missing"))
	}
	unlock, err := r.lockContent(ctx, c.header.Volumes)
	if err != nil {
		c.close()
		return err
	}
	defer unlock()
	r.mu.Lock()
	r.outdated(c)
	r.mu.Unlock()
	return r.finish(ctx, g, c)
}

// recoverPart keeps what had arrived of a checkpoint, so that only the rest
// needs to cross the link.
func (r *Receiver) recoverPart(name string) error {
	c, err := openFile(r.fs, name, nil)
	if k := block.KindOf(err); k == block.KindCorrupt || k == block.KindUnsupported {
		return remove(r.fs, name)
	}
	if err != nil {
		return err
	}
	g := r.group(c.header.Group)
	limits, err := r.limits(c.header.Volumes)
	if err != nil || c.commit != nil || c.header.ID != g.last.ID+1 || g.part != nil {
		c.close()
		return remove(r.fs, name)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.install(g, c, limits)
	return nil
}

// groupOf finds the group by the name of a file.
func (r *Receiver) groupOf(file string) *group {
	for name := range r.st.Groups {
		if h := safeName(name); len(file) > len(h) && file[:len(h)] == h {
			return r.group(name)
		}
	}
	return nil
}

// group finds or makes a group.
func (r *Receiver) group(name string) *group {
	r.mu.Lock()
	defer r.mu.Unlock()
	g := r.groups[name]
	if g == nil {
		g = &group{name: name, turn: make(chan struct{}, 1), last: r.st.Groups[name].Applied}
		g.turn <- struct{}{}
		r.groups[name] = g
	}
	return g
}

// install makes c the part on its way. mu is held.
func (r *Receiver) install(g *group, c *checkpointFile, limits []bounds) *part {
	var b [8]byte
	rand.Read(b[:]) // never fails (crypto/rand)
	p := &part{handle: binary.BigEndian.Uint64(b[:]), group: g, limits: limits, f: c, bell: make(chan struct{})}
	g.part, r.parts[p.handle] = p, p
	return p
}

// ring wakes who waits for a change of g. mu is held.
func (g *group) ring() {
	if g.bell != nil {
		close(g.bell)
		g.bell = nil
	}
}

// wait is closed at the next change of g. mu is held.
func (g *group) wait() <-chan struct{} {
	if g.bell == nil {
		g.bell = make(chan struct{})
	}
	return g.bell
}

// take takes the group's turn; nil is followed by give.
func (g *group) take(ctx context.Context) error {
	select {
	case <-g.turn:
		return nil
	case <-ctx.Done():
		return block.E("writeback.turn", g.name, block.KindCanceled, ctx.Err())
	}
}

func (g *group) give() { g.turn <- struct{}{} }

// settled waits until nothing of g is stored and not carried out.
func (r *Receiver) settled(ctx context.Context, g *group) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for g.stored != nil {
		ch, why := g.wait(), g.reason
		r.mu.Unlock()
		var err error
		select {
		case <-ch:
		case <-ctx.Done():
			err = block.E("writeback.wait", g.name, block.KindBusy, fmt.Errorf("checkpoint is being carried out still (%s): %w", why, ctx.Err()))
		case <-r.ctx.Done():
			err = block.E("writeback.wait", g.name, block.KindClosed, nil)
		}
		r.mu.Lock()
		if err != nil {
			return err
		}
	}
	return nil
}

// Serve answers a request of a frontend: role and name are its certificate's.
func (r *Receiver) Serve(ctx context.Context, role, name string, typ uint8, p []byte) ([]byte, error) {
	if role != r.o.Role || name == "" {
		return nil, block.E("writeback.serve", name, block.KindDenied, fmt.Errorf("a %s may not change sources", role))
	}
	r.mu.Lock()
	ready := r.ready
	r.mu.Unlock()
	if !ready {
		return nil, block.E("writeback.serve", "", block.KindUnavailable, errors.New("checkpoints are being recovered; try again"))
	}
	if r.ctx.Err() != nil {
		return nil, block.E("writeback.serve", "", block.KindClosed, nil)
	}
	switch typ {
	case typHello:
		return answer(r.hello(p))
	case typBegin:
		return answer(r.begin(ctx, name, p))
	case typData:
		return nil, r.data(ctx, name, p)
	case typProbe:
		return r.probe(ctx, name, p)
	case typCommit:
		return nil, r.commit(ctx, name, p)
	case typApplied:
		return answer(r.applied(ctx, p))
	case typReport:
		return nil, r.report(name, p)
	case typRelease:
		return nil, r.releaseRequest(ctx, name, p)
	case typDiscard:
		return nil, r.discardRequest(ctx, name, p)
	}
	return nil, block.E("writeback.serve", "", block.KindUnsupported, fmt.Errorf("request type %d is not known", typ))
}

func answer[T any](v *T, err error) ([]byte, error) {
	if err != nil {
		return nil, err
	}
	return encode(v), nil
}

func (r *Receiver) hello(p []byte) (*helloAnswer, error) {
	var q helloRequest
	if err := decode("writeback.hello", p, &q); err != nil {
		return nil, err
	}
	if err := q.check(); err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	a := &helloAnswer{Volumes: map[string]helloVolume{}}
	gs := r.st.Groups[q.Group]
	a.Last, a.Applied = gs.Applied, gs.Applied.ID
	var stored []beginVolume
	if g := r.groups[q.Group]; g != nil {
		a.Last = g.last
		if g.stored != nil {
			stored = g.stored.header.Volumes
		}
	}
	for _, n := range q.Volumes {
		v := r.st.Volumes[n]
		v.Known = v.Known || slices.ContainsFunc(stored, func(b beginVolume) bool { return b.Name == n })
		a.Volumes[n] = helloVolume{Known: v.Known, Released: v.Released, Forced: v.Forced, Damaged: v.Damaged, Epoch: v.Epoch, Node: v.Node}
	}
	return a, nil
}

// limits looks the volumes up and refuses what cannot be written.
func (r *Receiver) limits(vols []beginVolume) ([]bounds, error) {
	const op = "writeback.begin"
	out := make([]bounds, len(vols))
	for i, v := range vols {
		dev, err := r.o.Source(v.Name)
		if err != nil {
			return nil, err
		}
		info := dev.Info()
		switch {
		case info.ReadOnly:
			return nil, block.E(op, v.Name, block.KindReadOnly, errors.New(
				"the source cannot be written, so nothing can be written back: run the frontend with --isolated, or give the backend a source it may write"))
		case info.Size != v.Size:
			return nil, invalid(op, v.Name, "the source has %d bytes, the volume %d", info.Size, v.Size)
		}
		out[i] = bounds{info.Size, int64(info.BlockSize)}
	}
	return out, nil
}

// admit refuses a node that may not write the volumes, any more or yet.
func (r *Receiver) admit(op, group, node string, vols []beginVolume) error {
	fenced := func(name, format string, a ...any) error {
		return block.E(op, name, block.KindFenced, fmt.Errorf(format, a...))
	}
	if r.o.Owner != nil {
		for _, v := range vols {
			if e, n, ok := r.o.Owner(v.Name); ok && (e != v.Epoch || n != node) {
				return fenced(v.Name, "epoch %d of node %s is over: the volume is node %s's in epoch %d", v.Epoch, node, n, e)
			}
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, v := range vols {
		s, ok := r.st.Volumes[v.Name]
		switch {
		case !ok:
		case s.Released:
			return fenced(v.Name, "the move was called off and the source given back; nothing is written to it any more")
		case v.Epoch < s.Epoch:
			return fenced(v.Name, "epoch %d of node %s is over: node %s has epoch %d", v.Epoch, node, s.Node, s.Epoch)
		case v.Epoch == s.Epoch && s.Node != node:
			return fenced(v.Name, "node %s has the volume, and node %s has no newer epoch; abort the move, or discard node %s's volume, first", s.Node, node, s.Node)
		case group != "" && s.Group != group:
			return fenced(v.Name, "the volume is in group %s now", s.Group)
		}
	}
	return nil
}

func (r *Receiver) begin(ctx context.Context, node string, b []byte) (*beginAnswer, error) {
	const op = "writeback.begin"
	var q beginRequest
	if err := decode(op, b, &q); err != nil {
		return nil, err
	}
	if err := q.check(); err != nil {
		return nil, err
	}
	limits, err := r.limits(q.Volumes)
	if err != nil {
		return nil, err
	}
	g := r.group(q.Group)
	if err := g.take(ctx); err != nil {
		return nil, err
	}
	defer g.give()
	if err := r.admit(op, "", node, q.Volumes); err != nil {
		return nil, err
	}
	if err := r.adopt(ctx, g, node, q.Volumes); err != nil {
		return nil, err
	}
	r.mu.Lock()
	last, p := g.last, g.part
	for _, v := range q.Volumes {
		if r.st.Volumes[v.Name].Damaged && !v.Full {
			r.mu.Unlock()
			return nil, block.E(op, v.Name, block.KindNotFound, errors.New("a stored checkpoint was damaged: everything must be compared"))
		}
	}
	r.mu.Unlock()
	switch {
	case q.checkpointID == last:
		return &beginAnswer{Stored: true}, nil
	case q.ID != last.ID+1:
		return nil, block.E(op, g.name, block.KindExists, fmt.Errorf("checkpoint %d cannot follow %d", q.ID, last.ID))
	}
	if p != nil && p.f.header.Node == node && p.f.header.checkpointID == q.checkpointID && slices.Equal(p.f.header.Volumes, q.Volumes) {
		p.mu.Lock()
		defer p.mu.Unlock()
		return &beginAnswer{Handle: p.handle, Next: p.f.next}, nil
	}
	if err := r.drop(p); err != nil {
		return nil, block.E(op, g.name, 0, err)
	}
	c, err := createFile(r.fs, r.dir, fileHeader{q, node})
	if err != nil {
		return nil, block.E(op, g.name, 0, err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return &beginAnswer{Handle: r.install(g, c, limits).handle}, nil
}

// adopt notes durably who has the volumes, and in which group. A group that had
// one before loses what it was sending.
func (r *Receiver) adopt(ctx context.Context, g *group, node string, vols []beginVolume) error {
	r.mu.Lock()
	gs := r.st.Groups[g.name]
	names := make([]string, len(vols))
	changed := false
	var others []*group
	for i, v := range vols {
		names[i] = v.Name
		s, ok := r.st.Volumes[v.Name]
		if !ok || s.Epoch != v.Epoch || s.Node != node || s.Group != g.name {
			changed = true
			if o := r.groups[s.Group]; ok && s.Group != g.name && o != nil {
				others = append(others, o)
			}
		}
	}
	changed = changed || !slices.Equal(gs.Volumes, names)
	r.mu.Unlock()
	if !changed {
		return nil
	}
	for _, o := range others {
		if err := r.settled(ctx, o); err != nil {
			return err
		}
	}
	return r.change("writeback.begin", func(st *state) {
		gs := st.Groups[g.name]
		gs.Volumes = names
		st.Groups[g.name] = gs
		for _, v := range vols {
			s := st.Volumes[v.Name]
			s.Epoch, s.Node, s.Group = v.Epoch, node, g.name
			st.Volumes[v.Name] = s
		}
	})
}

// change changes the state, on disk first.
func (r *Receiver) change(op string, do func(*state)) error {
	r.save.Lock()
	defer r.save.Unlock()
	r.mu.Lock()
	next := r.st.clone()
	do(&next)
	b := next.marshal()
	r.mu.Unlock()
	err := disk.Publish(r.fs, path.Join(r.dir, stateName), func(f disk.File) error {
		_, err := f.WriteAt(b, 0)
		return err
	})
	if err != nil {
		return block.E(op, path.Join(r.dir, stateName), 0, err)
	}
	r.mu.Lock()
	do(&r.st) // reports may have come in between
	r.saved = time.Now()
	r.mu.Unlock()
	return nil
}

// drop gives up a checkpoint on its way.
func (r *Receiver) drop(p *part) error {
	if p == nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.renamed { // and its name may not be durable; it was never answered
		if err := remove(r.fs, p.f.path); err != nil {
			return err
		}
	}
	if err := remove(r.fs, path.Join(r.dir, p.f.header.name()+partEnd)); err != nil {
		return err
	}
	p.end()
	p.f.close()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.forget(p)
	return nil
}

// forget takes p out of the lists. mu is held.
func (r *Receiver) forget(p *part) {
	delete(r.parts, p.handle)
	if p.group.part == p {
		p.group.part = nil
	}
	p.group.ring()
}

// end marks p as gone. p.mu is held.
func (p *part) end() {
	if !p.gone {
		p.gone = true
		close(p.bell)
	}
}

var errGone = errors.New("nothing of that checkpoint is here; begin anew")

// find is the part with that handle, if node sends it.
func (r *Receiver) find(op, node string, handle uint64) (*part, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.parts[handle]
	if p == nil || p.f.header.Node != node {
		return nil, block.E(op, "", block.KindNotFound, errGone)
	}
	return p, nil
}

// seal takes a place among those that use much memory and processor.
func (r *Receiver) seal(ctx context.Context) error {
	select {
	case r.seals <- struct{}{}:
		return nil
	case <-ctx.Done():
		return block.E("writeback.wait", "", block.KindCanceled, ctx.Err())
	}
}

func (r *Receiver) data(ctx context.Context, node string, b []byte) error {
	const op = "writeback.data"
	handle, index, packed, err := parseData(b)
	if err != nil {
		return err
	}
	p, err := r.find(op, node, handle)
	if err != nil {
		return err
	}
	pk, err := parsePacked(packed)
	if err != nil {
		return invalid(op, p.group.name, "piece %d: %w", index, err)
	}
	if err := r.verify(ctx, p, pk); err != nil {
		return err
	}
	timer := time.NewTimer(turnWait)
	defer timer.Stop()
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		switch {
		case p.gone:
			return block.E(op, p.group.name, block.KindNotFound, errGone)
		case index < p.f.next:
			return nil
		case index > p.f.next+maxAhead:
			return invalid(op, p.group.name, "piece %d where %d is due", index, p.f.next)
		case index == p.f.next:
			return r.store(p, pk.Sig, packed)
		}
		ch := p.bell
		p.mu.Unlock()
		select {
		case <-ch:
		case <-timer.C:
			err = block.E(op, p.group.name, block.KindBusy, errors.New("the pieces before it have not come"))
		case <-ctx.Done():
			err = block.E(op, p.group.name, block.KindCanceled, ctx.Err())
		}
		p.mu.Lock()
		if err != nil {
			return err
		}
	}
}

// maxAhead is how far pieces may arrive ahead of the one that is due.
const maxAhead = 1024

// verify opens a piece and checks what it would do.
func (r *Receiver) verify(ctx context.Context, p *part, pk chunk.Packed) error {
	if err := r.seal(ctx); err != nil {
		return err
	}
	defer func() { <-r.seals }()
	mem := buffers.Get().(*[]byte)
	defer buffers.Put(mem)
	plain := (*mem)[:pk.Plain]
	if err := pk.Open(plain); err != nil {
		return block.E("writeback.data", p.group.name, block.KindCorrupt, err)
	}
	if _, _, err := parsePlain(nil, plain, p.limits); err != nil {
		if block.KindOf(err) == block.KindRange {
			return err
		}
		return invalid("writeback.data", p.group.name, "%w", err)
	}
	return nil
}

var buffers = sync.Pool{New: func() any { b := make([]byte, maxPlain); return &b }}

// syncEvery is how many bytes may be unsynced while pieces arrive, so that the
// sync of the commit is short.
const syncEvery = 32 << 20

// store appends the piece that is due. p.mu is held.
func (r *Receiver) store(p *part, sig chunk.Sig, packed []byte) error {
	const op = "writeback.data"
	if p.f.commit != nil {
		return invalid(op, p.group.name, "a piece behind the last one")
	}
	if err := p.f.addPiece(sig, packed); err != nil {
		return block.E(op, p.f.path, 0, err)
	}
	close(p.bell)
	p.bell = make(chan struct{})
	if p.f.end-p.f.synced >= syncEvery {
		if err := p.f.file.Sync(); err != nil {
			return r.spoiled(op, p, err)
		}
		p.f.synced = p.f.end
	}
	return nil
}

// spoiled gives up a part whose file failed to sync: what it has is not known
// any more. p.mu is held, and held again when it returns.
func (r *Receiver) spoiled(op string, p *part, cause error) error {
	r.log.Error("a checkpoint on its way could not be made durable; it begins anew", "file", p.f.path, "err", cause)
	p.end()
	p.f.close()
	err := remove(r.fs, p.f.path)
	r.mu.Lock()
	r.forget(p)
	r.mu.Unlock()
	return block.E(op, p.f.path, block.KindNotFound, errors.Join(cause, err))
}

func (r *Receiver) commit(ctx context.Context, node string, b []byte) error {
	const op = "writeback.commit"
	var q commitRequest
	if err := decode(op, b, &q); err != nil {
		return err
	}
	if err := checkName(op, q.Group); err != nil {
		return err
	}
	r.mu.Lock()
	g := r.groups[q.Group]
	r.mu.Unlock()
	if g == nil {
		return block.E(op, q.Group, block.KindNotFound, errGone)
	}
	if err := g.take(ctx); err != nil {
		return err
	}
	defer g.give()
	r.mu.Lock()
	p, last := g.part, g.last
	r.mu.Unlock()
	if q.checkpointID == last {
		return nil
	}
	if p == nil || p.handle != q.Handle || p.f.header.checkpointID != q.checkpointID || p.f.header.Node != node {
		return block.E(op, g.name, block.KindNotFound, errGone)
	}
	if err := r.settled(ctx, g); err != nil {
		return err
	}
	if err := r.admit(op, g.name, node, p.f.header.Volumes); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.gone {
		return block.E(op, g.name, block.KindNotFound, errGone)
	}
	if q.Pieces != p.f.next || q.Sum != p.f.digest.sum() {
		return invalid(op, g.name, "%d pieces with digest %.16s…; here are %d with digest %.16s…", q.Pieces, q.Sum, p.f.next, p.f.digest.sum())
	}
	if err := r.finishFile(p, fileCommit{q.Sum, q.Cut}); err != nil {
		return err
	}
	p.end()
	r.mu.Lock()
	r.forget(p)
	g.last, g.stored, g.reason = q.checkpointID, p.f, ""
	r.outdated(p.f)
	r.mu.Unlock()
	r.work.Go(func() { r.carryOut(g, p.f) })
	return nil
}

// outdated replaces reports from before a checkpoint that is stored: at its cut
// nothing was unwritten that is not in it. r.mu is held.
func (r *Receiver) outdated(c *checkpointFile) {
	for _, v := range c.header.Volumes {
		s := r.st.Volumes[v.Name]
		s.Unwritten, s.ReportAt = Unwritten{}, c.commit.Cut
		r.st.Volumes[v.Name] = s
	}
}

// finishFile makes a complete part a stored checkpoint: its end, a sync, its name,
// and a sync of that. It may be called again after an error. p.mu is held.
func (r *Receiver) finishFile(p *part, m fileCommit) error {
	const op = "writeback.commit"
	if p.f.commit == nil {
		if err := p.f.append(commitMagic, p.f.next, encode(m)); err != nil {
			return block.E(op, p.f.path, 0, err)
		}
		p.f.commit = &m
	}
	if !p.renamed {
		if err := p.f.file.Sync(); err != nil {
			return r.spoiled(op, p, err)
		}
		to := path.Join(r.dir, p.f.header.name()+storedEnd)
		if err := r.fs.Rename(p.f.path, to); err != nil {
			return block.E(op, p.f.path, 0, err)
		}
		p.f.path, p.renamed = to, true
	}
	if err := r.fs.SyncDir(r.dir); err != nil {
		return block.E(op, p.f.path, 0, err)
	}
	return nil
}

// appliedWait is how long a question for the end of a checkpoint is kept open.
const appliedWait = 10 * time.Second

func (r *Receiver) applied(ctx context.Context, b []byte) (*appliedAnswer, error) {
	const op = "writeback.applied"
	var q appliedRequest
	if err := decode(op, b, &q); err != nil {
		return nil, err
	}
	if err := checkName(op, q.Group); err != nil {
		return nil, err
	}
	timer := time.NewTimer(appliedWait)
	defer timer.Stop()
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		g := r.groups[q.Group]
		if g == nil || r.st.Groups[q.Group].Applied.ID >= q.ID {
			return &appliedAnswer{Applied: r.st.Groups[q.Group].Applied.ID >= q.ID}, nil
		}
		if g.last.ID < q.ID {
			return nil, block.E(op, q.Group, block.KindNotFound, fmt.Errorf("checkpoint %d is not stored here", q.ID))
		}
		if g.stored == nil { // it was damaged
			return nil, block.E(op, q.Group, block.KindCorrupt, fmt.Errorf("checkpoint %d was damaged on the backend's disk; everything will be compared", q.ID))
		}
		ch, reason := g.wait(), g.reason
		r.mu.Unlock()
		var a *appliedAnswer
		var err error
		select {
		case <-ch:
		case <-timer.C:
			a = &appliedAnswer{Reason: reason}
		case <-ctx.Done():
			err = block.E(op, q.Group, block.KindCanceled, ctx.Err())
		case <-r.ctx.Done():
			err = block.E(op, q.Group, block.KindClosed, nil)
		}
		r.mu.Lock()
		if a != nil || err != nil {
			return a, err
		}
	}
}

func (r *Receiver) report(node string, b []byte) error {
	const op = "writeback.report"
	var q reportRequest
	if err := decode(op, b, &q); err != nil {
		return err
	}
	r.mu.Lock()
	known := false
	for _, v := range q.Volumes {
		s, ok := r.st.Volumes[v.Name]
		if ok && s.Node == node && s.Epoch == v.Epoch && s.Group == q.Group && !s.Released {
			s.Unwritten, s.ReportAt = v.Unwritten, time.Now()
			r.st.Volumes[v.Name] = s
			known = true
		}
	}
	due := known && time.Since(r.saved) >= reportEvery
	r.mu.Unlock()
	if due {
		return r.change(op, func(*state) {})
	}
	return nil
}

// Close ends what runs. A checkpoint that is being carried out goes on at the
// next start.
func (r *Receiver) Close() error {
	r.cancel()
	r.work.Wait()
	r.mu.Lock()
	parts := slices.Collect(maps.Values(r.parts))
	clear(r.parts)
	for _, g := range r.groups {
		if g.stored != nil {
			g.stored.close()
		}
	}
	for _, c := range r.clones {
		c.shut()
	}
	r.mu.Unlock()
	for _, p := range parts {
		p.mu.Lock()
		p.end()
		p.f.close()
		p.mu.Unlock()
	}
	return nil
}
