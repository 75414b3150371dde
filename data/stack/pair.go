package stack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"time"

	"forerun/api"
	"forerun/block"
	"forerun/data/fence"
	"forerun/data/journal"
	"forerun/data/replica"
	"forerun/data/wire"
	"forerun/data/writeback"
	"forerun/disk"
	"forerun/internal/msg"
)

// Pair says how a volume is kept at two frontends.
type Pair struct {
	Node  string // this node's name, as in its certificate
	Fence *fence.Client
	// Peer and Forward send to the other node; nil when there is none.
	Peer, Forward msg.Caller
	OnPeerLoss    replica.Policy
	FailBackAfter time.Duration
}

// bootName is the file that says in which run of the operating system the
// volume was open last: what the page cache held then is still there, or not.
const bootName = "boot"

// sameBoot says whether the machine has run through since this volume was last
// known to hold everything that was acknowledged here, or the volume is new.
func sameBoot(fs disk.FS, dir string, fresh bool) (bool, error) {
	name := path.Join(dir, bootName)
	was, err := readSmall(fs, name)
	if err != nil && block.KindOf(err) != block.KindNotFound {
		return false, block.E("stack.boot", name, block.KindNone, err)
	}
	now := bootID()
	return fresh || strings.TrimSpace(string(was)) == now && now != "", nil
}

// noteBoot writes down that the volume holds everything, as of this run of the
// machine. After a power cut that is so once the other node, which may have
// had more in memory, has been heard; a process that dies before must not
// forget that it did not.
func (v *Volume) noteBoot(ctx context.Context) {
	for !v.wholeHere() {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wholeCheck):
		}
	}
	if err := disk.PublishBytes(v.opts.FS, path.Join(v.opts.Dir, bootName), []byte(bootID()+"\n")); err != nil {
		v.opts.Log.Warn("it cannot be noted that the volume is whole; after a restart it is compared with the other node", "err", err)
	}
}

// wholeCheck is how often noteBoot looks.
const wholeCheck = time.Second

// wholeHere says whether no acknowledged write can be missing here.
func (v *Volume) wholeHere() bool {
	s := v.rep.Status()
	return s.Role == "alone" || s.InSync || s.Role == "primary" && s.Mode != "waiting"
}

func readSmall(fs disk.FS, name string) ([]byte, error) {
	f, err := fs.Open(name, disk.Read)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, metaMax)
	n, err := f.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return b[:n], nil
}

// noLog stands for the journal of a volume that is on its native target: there
// is none, and nothing that could be compared with another node.
type noLog struct{}

func (noLog) Position() journal.Position                { return journal.Position{} }
func (noLog) Hold(string, journal.Position) error       { return nil }
func (noLog) Held(string) (p journal.Position, ok bool) { return p, false }
func (noLog) Release(string) error                      { return nil }
func (noLog) Changed(context.Context, string, func(off, n int64)) (bool, error) {
	return false, nil
}

// openReplica puts the storey that keeps two nodes equal on top of the switch.
func (v *Volume) openReplica(clean bool) (err error) {
	c := replica.Config{Volume: v.meta.Volume, Local: v.sw, CleanStart: clean, Logger: v.opts.Log, Log: noLog{}}
	if v.source != nil {
		c.Log = v.source.journal
		c.Compared = func() error { return v.source.journal.Release(writeback.Hold) }
	}
	if p := v.opts.Pair; p != nil {
		c.Node, c.Fence, c.OnPeerLoss, c.FailBackAfter = p.Node, p.Fence, p.OnPeerLoss, p.FailBackAfter
		if v.source != nil { // a native target is one node's
			c.Peer, c.Forward = p.Peer, p.Forward
		} else {
			c.Forward = p.Forward
		}
	}
	v.rep, err = replica.Open(c)
	return err
}

// Replica is the storey that keeps the two nodes equal: what the other node
// sends is for it.
func (v *Volume) Replica() *replica.Volume { return v.rep }

// Standby says whether another node is primary for the volume.
func (v *Volume) Standby() bool {
	s := v.rep.Status()
	return s.Role != "alone" && s.Role != "primary"
}

// SetStandby holds the fill back, apart from what the user asked for: what the
// primary of a pair has not got yet is not fetched over the WAN twice.
func (v *Volume) SetStandby(on bool) {
	v.fillMu.Lock()
	defer v.fillMu.Unlock()
	if v.standby == on {
		return
	}
	v.standby = on
	v.applyFill()
}

// Whole says whether everything the source had is here.
func (v *Volume) Whole() bool { return v.source == nil || v.ready() == nil }

// AttachPeer lets the volume ask the other node for chunks, nil ends that.
func (v *Volume) AttachPeer(r *wire.Remote) error {
	if v.source == nil {
		return nil
	}
	if r != nil {
		if err := v.meta.checkChange(r); err != nil {
			return err
		}
	}
	v.source.link.peer.Store(r)
	return nil
}

// SetPeerUp tells whether the other node can be reached: one that cannot is
// not waited for.
func (v *Volume) SetPeerUp(up bool) {
	if v.source != nil {
		v.source.link.peerUp.Store(up)
	}
}

// FromPeer is how many chunks came from the other node.
func (v *Volume) FromPeer() int64 {
	if v.source == nil {
		return 0
	}
	return v.source.link.fromPeer.Load()
}

// DemandWaits says whether the workload waits for the link now.
func (v *Volume) DemandWaits() bool {
	return v.source != nil && !v.Switched() && v.source.sched.DemandWaits()
}

// Chunks is the volume as the other node of a pair may read it: what is here,
// while this node holds everything that was acknowledged. It is read-only, and
// nobody need close it.
func (v *Volume) Chunks() block.Device { return near{v} }

// ChunkBytes is the unit of transfer.
func (v *Volume) ChunkBytes() int { return v.meta.ChunkBytes }

type near struct{ v *Volume }

func (n near) Info() block.Info {
	i := n.v.sw.Info()
	i.ReadOnly, i.CanTrim, i.ID = true, false, n.v.meta.SourceID
	return i
}

func (n near) check(off, length int64) error {
	v := n.v
	switch s := v.rep.Status(); {
	case v.source == nil || v.Switched() || s.Role != "primary" && !s.InSync:
		return block.E("peer.read", v.meta.Volume, block.KindUnavailable, errors.New("this node is not in sync"))
	case !v.source.volume.Near(off, length):
		return block.E("peer.read", v.meta.Volume, block.KindNotFound, errors.New("this node does not have it either"))
	}
	return nil
}

func (n near) ReadAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	if err := n.check(off, int64(len(p))); err != nil {
		return err
	}
	return n.v.sw.ReadAt(ctx, p, off, f)
}

func (n near) Extents(ctx context.Context, dst []block.Extent, off, length int64, f block.Flags) ([]block.Extent, error) {
	return n.v.sw.Extents(ctx, dst, off, length, f|block.Local)
}

func (n near) refuse(op string) error {
	return block.E("peer."+op, n.v.meta.Volume, block.KindReadOnly, nil)
}

func (n near) WriteAt(context.Context, []byte, int64, block.Flags) error { return n.refuse("write") }
func (n near) Zero(context.Context, int64, int64, block.Flags) error     { return n.refuse("zero") }
func (n near) Trim(context.Context, int64, int64, block.Flags) error     { return n.refuse("trim") }
func (n near) Flush(context.Context, block.Flags) error                  { return nil }
func (n near) Prefetch(context.Context, int64, int64, block.Flags) error { return nil }
func (n near) Close() error                                              { return nil }

// WriteBack is the volume as a writeback.Shipper wants it; nil once it is on
// its native target.
func (v *Volume) WriteBack() writeback.Volume {
	if v.source == nil {
		return nil
	}
	return shipped{v}
}

// shipped shows a volume to the room that ships its changes.
type shipped struct{ v *Volume }

func (s shipped) Name() string { return s.v.meta.Volume }

// Epoch of a volume without an arbiter is 1 for ever.
func (s shipped) Epoch() (uint64, bool) {
	if s.v.Switched() || s.v.isolated.Load() {
		return 0, false
	}
	st := s.v.rep.Status()
	if st.Role == "alone" {
		return 1, true
	}
	return st.Epoch, st.Role == "primary"
}

func (s shipped) Freeze(ctx context.Context, fn func() error) error { return s.v.rep.Freeze(ctx, fn) }
func (s shipped) Log() writeback.Log                                { return s.v.source.journal }
func (s shipped) Exact() bool                                       { return s.v.exact }
func (s shipped) MarkPeer(ctx context.Context) (string, bool)       { return s.v.rep.MarkPeer(ctx) }
func (s shipped) HoldPeer(ctx context.Context, name, pos string) error {
	return s.v.rep.HoldPeer(ctx, name, pos)
}
func (s shipped) Info() block.Info { return s.v.sw.Info() }
func (s shipped) ReadAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	return s.v.sw.ReadAt(ctx, p, off, f)
}
func (s shipped) Extents(ctx context.Context, dst []block.Extent, off, n int64, f block.Flags) ([]block.Extent, error) {
	return s.v.sw.Extents(ctx, dst, off, n, f)
}
func (s shipped) Flush(ctx context.Context, f block.Flags) error { return s.v.rep.Flush(ctx, f) }

// door is what clients come through. Once it is shut for good, calls are
// refused; those under way end as they will.
type door struct {
	block.Device
	why func() error // nil while it is open
}

func (d door) ReadAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	if err := d.why(); err != nil {
		return err
	}
	return d.Device.ReadAt(ctx, p, off, f)
}

func (d door) WriteAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	if err := d.why(); err != nil {
		return err
	}
	return d.Device.WriteAt(ctx, p, off, f)
}

func (d door) Zero(ctx context.Context, off, n int64, f block.Flags) error {
	if err := d.why(); err != nil {
		return err
	}
	return d.Device.Zero(ctx, off, n, f)
}

func (d door) Trim(ctx context.Context, off, n int64, f block.Flags) error {
	if err := d.why(); err != nil {
		return err
	}
	return d.Device.Trim(ctx, off, n, f)
}

func (d door) Flush(ctx context.Context, f block.Flags) error {
	if err := d.why(); err != nil {
		return err
	}
	return d.Device.Flush(ctx, f)
}

// Shut refuses clients from now on: the move is being called off.
func (v *Volume) Shut() { v.shut.Store(true) }

func (v *Volume) shutWhy() error {
	if !v.shut.Load() {
		return nil
	}
	return block.E("volume", v.meta.Volume, block.KindClosed, errors.New("the move of this volume is being called off; its source has it"))
}

// Isolated says whether changes stay here.
func (v *Volume) Isolated() bool { return v.isolated.Load() }

// replicaStatus is what status shows of the pair.
func (v *Volume) replicaStatus() *api.Replica {
	if v.opts.Pair == nil {
		return nil
	}
	s := v.rep.Status()
	r := &api.Replica{Role: s.Role, Peer: s.Peer, Epoch: s.Epoch, InSync: s.InSync, Reason: s.Reason, ResyncBytes: s.ResyncBytes,
		FromPeer: v.FromPeer()}
	switch {
	case s.Role == "secondary" && !s.InSync:
		r.Role = api.ReplicaJoining
	case s.Role == "undecided":
		r.Role = api.ReplicaJoining
	}
	switch s.Mode {
	case "pair":
		r.Mode = api.ModeReplicated
	case "degraded", "resync", "alone":
		r.Mode = api.ModeDegraded
	case "waiting":
		r.Mode = api.ModeWaiting
	case "forwarding":
		r.Mode = api.ModeForwarding
	}
	if v.Switched() { // the native disk is this node's alone, and nothing is amiss
		r.Mode, r.Reason = "", ""
	}
	return r
}

// Ended says that a volume of this directory was called off or thrown away,
// and which of the two: api.PhaseAborted or api.PhaseDiscarded.
func Ended(fs disk.FS, dir string) (string, error) {
	b, err := readSmall(fs, path.Join(dir, endedName))
	if block.KindOf(err) == block.KindNotFound {
		return "", nil
	}
	if err != nil {
		return "", block.E("stack.ended", dir, block.KindNone, err)
	}
	switch s := strings.TrimSpace(string(b)); s {
	case api.PhaseAborted, api.PhaseDiscarded:
		return s, nil
	default:
		return "", block.E("stack.ended", dir, block.KindCorrupt, fmt.Errorf("%q is no end of a volume", s))
	}
}

const endedName = "ended"

// End records that the volume in dir is over, then removes what it held. The
// volume has been closed. It may be called again.
func End(fs disk.FS, dir, scratch, phase string) error {
	if err := disk.PublishBytes(fs, path.Join(dir, endedName), []byte(phase+"\n")); err != nil {
		return block.E("stack.end", dir, block.KindNone, err)
	}
	var errs []error
	for _, d := range []string{path.Join(dir, journalDir), path.Join(dir, mapDir), scratch} {
		errs = append(errs, removeAll(fs, d))
	}
	if err := fs.Remove(path.Join(dir, marksName)); err != nil && block.KindOf(err) != block.KindNotFound {
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return block.E("stack.end", dir, block.KindNone, fmt.Errorf("what the volume held here cannot be removed: %w", err))
	}
	return nil
}

// removeAll removes a directory's files and the directory.
func removeAll(fs disk.FS, dir string) error {
	names, err := fs.List(dir)
	if block.KindOf(err) == block.KindNotFound {
		return nil
	}
	if err != nil {
		return err
	}
	for _, n := range names {
		full := path.Join(dir, n)
		st, err := fs.Stat(full)
		if err == nil && st.Dir {
			err = removeAll(fs, full)
		} else if err == nil {
			err = fs.Remove(full)
		}
		if err != nil && block.KindOf(err) != block.KindNotFound {
			return err
		}
	}
	if err := fs.Remove(dir); err != nil && block.KindOf(err) != block.KindNotFound {
		return err
	}
	return nil
}

// Name is the volume's.
func (v *Volume) Name() string { return v.meta.Volume }

// Meta is what the source said of the volume.
func (v *Volume) Meta() Meta { return v.meta }

// policyName is the file that says that changes stay here.
const policyName = "isolated"

// SavePolicy stops or resumes the write-back of the volume, durably.
func (v *Volume) SavePolicy(isolated bool) error {
	if isolated == v.isolated.Load() {
		return nil
	}
	text := "no\n"
	if isolated {
		text = "yes\n"
	}
	if err := disk.PublishBytes(v.opts.FS, path.Join(v.opts.Dir, policyName), []byte(text)); err != nil {
		return block.E("stack.policy", v.meta.Volume, block.KindNone, err)
	}
	v.isolated.Store(isolated)
	return nil
}

// loadPolicy reads what SavePolicy wrote; a volume that has none takes the
// daemon's.
func (v *Volume) loadPolicy() error {
	b, err := readSmall(v.opts.FS, path.Join(v.opts.Dir, policyName))
	switch {
	case block.KindOf(err) == block.KindNotFound:
		v.isolated.Store(v.opts.Isolated || v.meta.ReadOnly)
		return nil
	case err != nil:
		return block.E("stack.policy", v.meta.Volume, block.KindNone, err)
	}
	v.isolated.Store(strings.TrimSpace(string(b)) == "yes")
	return nil
}
