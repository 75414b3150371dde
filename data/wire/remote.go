package wire

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"forerun/block"
	"forerun/internal/chunk"
)

// Remote is a volume of the backend: chunks by Fetch, and a read-only
// block.Device. Its calls wait through outages; only their contexts, Close of
// the Client, or an answer end them.
type Remote struct {
	c      *Client
	name   string
	handle uint16
	calls  sync.WaitGroup // device calls under way

	// Under Client.mu. v is constant once opened is closed.
	v       volumeInfo
	opened  chan struct{}
	isOpen  bool // opened is closed
	fixed   bool // the source cannot be written
	err     error
	own     owner
	wanted  map[int64]*entry
	retry   map[*link]time.Time // when a refused OPEN may be sent again
	closing bool
	site    *siteOf // nil: nothing is answered by signature
	// announced takes what the backend says unasked; nil: it is not to.
	announced Announced
}

// Announced takes what a backend says of a volume unasked: which chunks hold
// what the volume's Site holds, or zeros. It is called from the goroutine that
// receives, and must not call the Remote.
type Announced interface {
	Same(i int64, sig chunk.Sig)
	Zeros(first, n int64)
}

var _ block.Device = (*Remote)(nil)

// opening is an OPEN without an answer yet.
type opening struct {
	r  *Remote
	on *link
}

// Open opens a volume whose chunks are all answered with their bytes. It waits
// for the link if need be; what the backend answers first decides: KindNotFound,
// KindDenied and the like are returned.
func (c *Client) Open(ctx context.Context, volume string) (*Remote, error) {
	return c.OpenFor(ctx, volume, nil)
}

// OpenFor is Open for a volume whose chunks go to site: what that holds is
// answered by signature. A session has at most 255 sites (KindBusy).
func (c *Client) OpenFor(ctx context.Context, volume string, site *Site) (*Remote, error) {
	if volume == "" || len(volume) > maxName {
		return nil, &block.Error{Op: "wire.open", Object: volume, Kind: block.KindInvalid, Err: fmt.Errorf("a volume's name has 1 to %d bytes", maxName)}
	}
	r := &Remote{c: c, name: volume, opened: make(chan struct{}), wanted: map[int64]*entry{}, retry: map[*link]time.Time{}}
	r.own.of = r
	c.mu.Lock()
	switch {
	case c.closed:
		c.mu.Unlock()
		return nil, &block.Error{Op: "wire.open", Object: volume, Kind: block.KindClosed, Err: errors.New("the session was closed")}
	case len(c.remotes) >= maxVolumes:
		c.mu.Unlock()
		return nil, &block.Error{Op: "wire.open", Object: volume, Kind: block.KindBusy, Err: fmt.Errorf("%d volumes are open in this session", maxVolumes)}
	}
	if site != nil {
		so, err := c.register(site)
		if err != nil {
			c.mu.Unlock()
			return nil, err
		}
		r.site = so
	}
	for {
		if c.nextHandle++; c.nextHandle != 0 && c.remotes[c.nextHandle] == nil {
			break
		}
	}
	r.handle = c.nextHandle
	c.remotes[r.handle] = r
	if d := c.slots[0]; d != nil {
		d.open(r)
	}
	c.mu.Unlock()
	var err error
	select {
	case <-r.opened:
		c.mu.Lock()
		err = r.err
		c.mu.Unlock()
	case <-ctx.Done():
		err = block.E("wire.open", volume, block.KindCanceled, context.Cause(ctx))
	}
	if err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

// open sends an OPEN if one is due on this connection. The demand connection
// is the one that learns what the volume is, the others follow. Client.mu is held.
func (l *link) open(r *Remote) {
	c := l.c
	if l.dead || l.ready[r] || r.err != nil || r.closing || !r.isOpen && l.slot != 0 {
		return
	}
	if t, ok := r.retry[l]; ok && time.Now().Before(t) {
		return
	}
	for _, o := range c.opens {
		if o.r == r && o.on == l {
			return
		}
	}
	id := c.request()
	c.opens[id] = opening{r, l}
	o := openOrder{name: r.name}
	if r.site != nil {
		o.site, o.key = r.site.number, r.site.site.key
	}
	l.say(header{typ: tOpen, volume: r.handle, req: id}, appendOpen(nil, o))
}

// Announce has the backend tell a, unasked, which chunks of the volume hold
// what its Site holds. It does nothing for a volume without one.
func (r *Remote) Announce(a Announced) {
	r.c.mu.Lock()
	defer r.c.mu.Unlock()
	if r.site == nil {
		return
	}
	r.announced = a
	if l := r.c.slots[tellSlot]; l != nil && l.ready[r] {
		l.say(header{typ: tTell, volume: r.handle}, nil)
	}
}

// volume takes the answer to an OPEN.
func (l *link) volume(h header, p []byte) error {
	v, err := parseVolume(p)
	if err != nil {
		return err
	}
	c := l.c
	c.mu.Lock()
	o, ok := c.opens[h.req]
	if !ok || o.on != l || o.r.handle != h.volume {
		c.mu.Unlock()
		return protocol("a volume nobody asked for")
	}
	delete(c.opens, h.req)
	r := o.r
	delete(r.retry, l)
	if r.closing || r.err != nil {
		l.say(header{typ: tClose, volume: r.handle}, nil)
		c.mu.Unlock()
		return nil
	}
	if !r.isOpen {
		r.fixed = v.info.ReadOnly
		v.info.ReadOnly, v.info.CanTrim = true, false
		r.v, r.isOpen = v, true
		close(r.opened)
		l.ready[r] = true
		for _, other := range c.slots[1:] {
			if other != nil {
				other.open(r)
			}
		}
		c.mu.Unlock()
		return nil
	}
	if err := r.changed(v); err != nil {
		es := c.claimAll(nil, r)
		r.fail(err)
		for id, a := range c.asides {
			if a.r == r {
				delete(c.asides, id)
				a.finish(err)
			}
		}
		c.mu.Unlock()
		c.log.Error("the backend has another disk under this volume's name; nothing is read from it", "volume", r.name, "err", err)
		c.deliverError(es, err)
		return nil
	}
	l.ready[r] = true
	if l.slot == tellSlot && r.announced != nil {
		l.say(header{typ: tTell, volume: r.handle}, nil)
	}
	c.pump()
	c.mu.Unlock()
	return nil
}

// changed compares what the backend says now with what it said first.
func (r *Remote) changed(v volumeInfo) error {
	bad := func(k block.Kind, format string, args ...any) error {
		return &block.Error{Op: "wire.reopen", Object: r.name, Kind: k,
			Err: fmt.Errorf("the backend came back with another volume: "+format+"; put the source back as it was, or begin again", args...)}
	}
	switch {
	case v.info.Size != r.v.info.Size:
		return bad(block.KindCorrupt, "%d bytes instead of %d", v.info.Size, r.v.info.Size)
	case v.info.ID != r.v.info.ID:
		return bad(block.KindCorrupt, "content ID %q instead of %q", v.info.ID, r.v.info.ID)
	case v.chunk != r.v.chunk || v.info.BlockSize != r.v.info.BlockSize:
		return bad(block.KindInvalid, "chunks of %d and blocks of %d bytes instead of %d and %d", v.chunk, v.info.BlockSize, r.v.chunk, r.v.info.BlockSize)
	}
	return nil
}

// refused takes an ERROR to an OPEN and says whether that is news for the
// log. The first answer is the caller's; after a reconnect the volume may only
// not be there yet, so it is tried again. Client.mu is held.
func (o opening) refused(err error) (news bool) {
	if !o.r.isOpen {
		o.r.fail(err)
		return false
	}
	_, again := o.r.retry[o.on]
	o.r.retry[o.on] = time.Now().Add(time.Second)
	return !again
}

// fail makes all calls from now on return err. Client.mu is held.
func (r *Remote) fail(err error) {
	if r.err == nil {
		r.err = err
	}
	if !r.isOpen {
		r.isOpen = true
		close(r.opened)
	}
}

// known returns the volume a frame is about.
func (c *Client) known(h header) (volumeInfo, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.remotes[h.volume]
	if r == nil || r.v.chunk == 0 {
		return volumeInfo{}, false
	}
	return r.v, true
}

// Info describes the volume: the source's, but read-only.
func (r *Remote) Info() block.Info {
	i := r.v.info
	if i.PreferredIO < r.v.chunk {
		i.PreferredIO = r.v.chunk
	}
	return i
}

// SourceReadOnly says that the source itself cannot be written, so that nothing
// can go back to it.
func (r *Remote) SourceReadOnly() bool { return r.fixed }

// Paced is Client.Paced.
func (r *Remote) Paced() bool { return r.c.Paced() }

// ChunkBytes is the size of a chunk. The last one may be shorter.
func (r *Remote) ChunkBytes() int { return r.v.chunk }

// enter begins a device call.
func (r *Remote) enter(op string, off, n int64) error {
	r.c.mu.Lock()
	defer r.c.mu.Unlock()
	if r.closing {
		return &block.Error{Op: op, Object: r.name, Kind: block.KindClosed}
	}
	if r.err != nil {
		return r.err
	}
	if off < 0 || n < 0 || off > r.v.info.Size || n > r.v.info.Size-off {
		return &block.Error{Op: op, Object: r.name, Kind: block.KindRange, Err: fmt.Errorf("%d bytes at %d, the volume has %d", n, off, r.v.info.Size)}
	}
	r.calls.Add(1)
	return nil
}

// ReadAt fetches the chunks p lies in, verifies them by their signatures and
// copies. Bytes that do not match are KindCorrupt and never returned.
func (r *Remote) ReadAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	if err := r.enter("wire.read", off, int64(len(p))); err != nil {
		return err
	}
	defer r.calls.Done()
	if len(p) == 0 {
		return nil
	}
	size := int64(r.v.chunk)
	first, last := off/size, (off+int64(len(p))-1)/size
	idx := make([]int64, 0, last-first+1)
	for i := first; i <= last; i++ {
		idx = append(idx, i)
	}
	var mu sync.Mutex
	var corrupt error
	err := r.Fetch(ctx, idx, f&(block.Soon|3)|block.Full, func(i int64, q chunk.Packed, err error) {
		if err != nil {
			return
		}
		if err := r.place(p, off, i, q); err != nil {
			mu.Lock()
			corrupt = err
			mu.Unlock()
		}
	})
	if err != nil {
		return err
	}
	return corrupt
}

// place opens chunk i and puts what p wants of it there; p begins at off.
func (r *Remote) place(p []byte, off, i int64, q chunk.Packed) error {
	begin := i * int64(r.v.chunk)
	end := begin + int64(q.Plain)
	from, to := max(begin, off), min(end, off+int64(len(p)))
	var err error
	if from == begin && to == end {
		err = r.unpack(q, p[from-off:to-off])
	} else {
		x := r.c.leases.get(q.Plain)
		defer x.release()
		if err = r.unpack(q, x.b[:q.Plain]); err == nil {
			copy(p[from-off:to-off], x.b[from-begin:to-begin])
		}
	}
	if err != nil {
		return &block.Error{Op: "wire.read", Object: r.name, Kind: block.KindCorrupt, Err: err}
	}
	return nil
}

// unpack opens a chunk that came with all its bytes.
func (r *Remote) unpack(q chunk.Packed, dst []byte) error {
	if q.Codec != chunk.Bundle {
		return q.OpenUnder(r.key(), dst)
	}
	_, pieces, err := chunk.ParseBundle(r.key(), q, nil)
	if err != nil {
		return err
	}
	seen := map[chunk.Sig][]byte{}
	for _, piece := range pieces {
		to := dst[:piece.Plain]
		dst = dst[piece.Plain:]
		if piece.Codec != chunk.Known {
			if err := piece.OpenUnder(r.key(), to); err != nil {
				return err
			}
			seen[piece.Sig] = to
			continue
		}
		if copy(to, seen[piece.Sig]) != len(to) {
			return fmt.Errorf("a bundle without piece %s: %w", piece.Sig, chunk.ErrMismatch)
		}
	}
	return nil
}

// key is that of the volume's signatures.
func (r *Remote) key() *chunk.Key {
	if r.site == nil {
		return &chunk.Key{}
	}
	return &r.site.site.key
}

func (r *Remote) readOnly(op string) error {
	if err := r.enter(op, 0, 0); err != nil {
		return err
	}
	r.calls.Done()
	return &block.Error{Op: op, Object: r.name, Kind: block.KindReadOnly, Err: errors.New("a remote volume is only read; writes go home by the journal")}
}

// WriteAt refuses with KindReadOnly.
func (r *Remote) WriteAt(context.Context, []byte, int64, block.Flags) error {
	return r.readOnly("wire.write")
}

// Zero refuses with KindReadOnly.
func (r *Remote) Zero(context.Context, int64, int64, block.Flags) error {
	return r.readOnly("wire.zero")
}

// Trim refuses with KindReadOnly.
func (r *Remote) Trim(context.Context, int64, int64, block.Flags) error {
	return r.readOnly("wire.trim")
}

// Flush has nothing to do.
func (r *Remote) Flush(context.Context, block.Flags) error {
	if err := r.enter("wire.flush", 0, 0); err != nil {
		return err
	}
	r.calls.Done()
	return nil
}

// Prefetch does nothing: a Remote keeps nothing.
func (r *Remote) Prefetch(_ context.Context, off, n int64, _ block.Flags) error {
	if err := r.enter("wire.prefetch", off, n); err != nil {
		return err
	}
	r.calls.Done()
	return nil
}

// Close ends the use of the volume. It waits for calls under way, also through
// an outage; Client.Close ends those at once. The session goes on.
func (r *Remote) Close() error {
	c := r.c
	c.mu.Lock()
	first := !r.closing
	r.closing = true
	c.mu.Unlock()
	r.calls.Wait()
	if !first {
		return nil
	}
	err := &block.Error{Op: "wire.fetch", Object: r.name, Kind: block.KindClosed}
	c.mu.Lock()
	es := c.claimAll(nil, r)
	r.fail(err)
	r.err = err
	if c.remotes[r.handle] == r {
		delete(c.remotes, r.handle)
	}
	for _, l := range c.slots {
		if l != nil && l.ready[r] {
			l.say(header{typ: tClose, volume: r.handle}, nil)
		}
		if l != nil {
			delete(l.ready, r)
		}
	}
	c.mu.Unlock()
	c.deliverError(es, err)
	return nil
}
