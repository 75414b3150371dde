package writeback

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"forerun/block"
)

// VolumeStatus is what the backend knows of the write-back of a volume.
type VolumeStatus struct {
	Group string
	Epoch uint64 // the highest seen
	Node  string // who has it
	// LastID, LastCut and LastApplied are of the last checkpoint carried out: its
	// id, when its frontend made the cut, and when the source had it.
	LastID      uint64
	LastCut     time.Time
	LastApplied time.Time
	StoredID    uint64 // stored, being carried out; 0 for none
	Arriving    int64  // bytes of a checkpoint on its way
	Reason      string // why a stored one is not carried out yet
	// Unwritten is what the frontend last said it has and the source lacks, at
	// ReportAt by this machine's clock, or nothing at the cut of the last
	// checkpoint when it has not said anything since; both zero when it never did.
	Unwritten Unwritten
	ReportAt  time.Time
	Damaged   bool // the source is no checkpoint's content until everything was compared
	Released  bool // given back
	Clones    []string
}

// Loss is what giving a source back without its frontend loses.
type Loss struct {
	VolumeStatus
	// Text says it in words.
	Text string
}

// Status tells how the write-back of a volume stands. A volume nothing was
// ever sent for is KindNotFound.
func (r *Receiver) Status(volume string) (VolumeStatus, error) {
	r.mu.Lock()
	v, ok := r.st.Volumes[volume]
	if !ok {
		defer r.mu.Unlock()
		return VolumeStatus{Clones: r.clonesOf(volume)}, block.E("writeback.status", volume, block.KindNotFound, errors.New("no frontend has begun to write it back"))
	}
	gs := r.st.Groups[v.Group]
	s := VolumeStatus{Group: v.Group, Epoch: v.Epoch, Node: v.Node, Unwritten: v.Unwritten, ReportAt: v.ReportAt,
		Damaged: v.Damaged, Released: v.Released, Clones: r.clonesOf(volume)}
	if v.Known {
		s.LastID, s.LastCut, s.LastApplied = gs.Applied.ID, gs.Cut, gs.At
	}
	var p *part
	if g := r.groups[v.Group]; g != nil {
		s.Reason = g.reason
		if g.stored != nil {
			s.StoredID = g.stored.header.ID
		}
		p = g.part
	}
	r.mu.Unlock()
	if p != nil {
		p.mu.Lock()
		s.Arriving = p.f.end
		p.mu.Unlock()
	}
	return s, nil
}

// Released says whether the source was given back, so that a daemon that
// starts must not open it.
func (r *Receiver) Released(volume string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.st.Volumes[volume].Released
}

// Forget removes what is known of a volume, so that another move of it can
// begin. The source must not be in use by a frontend.
func (r *Receiver) Forget(ctx context.Context, volume string) error {
	const op = "writeback.forget"
	r.mu.Lock()
	v, ok := r.st.Volumes[volume]
	r.mu.Unlock()
	if !ok {
		return nil
	}
	g := r.group(v.Group)
	if err := g.take(ctx); err != nil {
		return err
	}
	defer g.give()
	if err := r.quiet(ctx, g); err != nil {
		return err
	}
	return r.change(op, func(st *state) { delete(st.Volumes, volume) })
}

// quiet gives up what is on its way and waits for what is stored. The caller
// has the group's turn.
func (r *Receiver) quiet(ctx context.Context, g *group) error {
	r.mu.Lock()
	p := g.part
	r.mu.Unlock()
	if err := r.drop(p); err != nil {
		return block.E("writeback.drop", g.name, 0, err)
	}
	return r.settled(ctx, g)
}

// releaseRequest is a frontend that gives its source back.
func (r *Receiver) releaseRequest(ctx context.Context, node string, b []byte) error {
	const op = "writeback.release"
	var q releaseRequest
	if err := decode(op, b, &q); err != nil {
		return err
	}
	if err := errors.Join(checkName(op, q.Group), checkName(op, q.Volume)); err != nil {
		return block.E(op, "", block.KindInvalid, err)
	}
	g := r.group(q.Group)
	if err := g.take(ctx); err != nil {
		return err
	}
	defer g.give()
	r.mu.Lock()
	v := r.st.Volumes[q.Volume]
	last := g.last.ID
	r.mu.Unlock()
	if v.Released && v.Node == node && v.Epoch == q.Epoch {
		return r.giveBack(ctx, q.Volume)
	}
	if err := r.admit(op, "", node, []beginVolume{{Name: q.Volume, Epoch: q.Epoch}}); err != nil {
		return err
	}
	if last != q.ID {
		return block.E(op, q.Volume, block.KindNotFound, fmt.Errorf("checkpoint %d is the last one stored here, not %d", last, q.ID))
	}
	if v.Damaged {
		return block.E(op, q.Volume, block.KindCorrupt, errors.New("a stored checkpoint was damaged; everything must be compared before the source can be given back"))
	}
	if err := r.settled(ctx, g); err != nil {
		return err
	}
	return r.release(ctx, q.Volume, func(v *volumeState) {
		v.Group, v.Node, v.Epoch = q.Group, node, q.Epoch
		v.Unwritten, v.ReportAt = Unwritten{}, time.Now()
	})
}

// Release gives a source back although its frontend is not there to say so:
// the source has the last checkpoint, and the answer says what is lost. With
// force clones do not keep it from that; they are worth nothing afterwards.
func (r *Receiver) Release(ctx context.Context, volume string, force bool) (Loss, error) {
	s, err := r.Status(volume)
	if err != nil && block.KindOf(err) != block.KindNotFound {
		return Loss{}, err
	}
	if err == nil {
		g := r.group(s.Group)
		if err := g.take(ctx); err != nil {
			return Loss{}, err
		}
		defer g.give()
		if err := r.quiet(ctx, g); err != nil {
			return Loss{}, err
		}
	}
	if len(s.Clones) > 0 && force {
		r.log.Warn("a source is given back while clones still read it", "volume", volume, "clones", s.Clones)
	} else if len(s.Clones) > 0 {
		return Loss{}, block.E("writeback.release", volume, block.KindBusy,
			fmt.Errorf("clones read the source: discard %s first", strings.Join(s.Clones, ", ")))
	}
	if s, err = r.Status(volume); err != nil && block.KindOf(err) != block.KindNotFound {
		return Loss{}, err
	}
	loss := Loss{s, s.loss()}
	return loss, r.release(ctx, volume, nil)
}

// loss says what the source lacks, as far as it is known here.
func (s *VolumeStatus) loss() string {
	last := "the source has what it had before the move: no checkpoint was ever written"
	if s.LastID != 0 {
		last = fmt.Sprintf("the source has checkpoint %d of %s", s.LastID, s.LastCut.UTC().Format(time.RFC3339))
	}
	if s.Damaged {
		last = "the source is damaged: a stored checkpoint could not be carried out whole"
	}
	switch {
	case s.ReportAt.IsZero():
		return last + "; the frontend never said how much it had written since"
	case s.Unwritten.Bytes == 0:
		return last + fmt.Sprintf("; the frontend had written nothing more at %s, and lost is what came after that", s.ReportAt.UTC().Format(time.RFC3339))
	}
	return last + fmt.Sprintf("; lost are %d bytes written since, the oldest after %s, and what came after the frontend's last word at %s",
		s.Unwritten.Bytes, s.Unwritten.Oldest.UTC().Format(time.RFC3339), s.ReportAt.UTC().Format(time.RFC3339))
}

// release flushes the source, notes that it is given back, and closes it.
func (r *Receiver) release(ctx context.Context, volume string, note func(*volumeState)) error {
	const op = "writeback.release"
	unlock, err := r.lockContent(ctx, []beginVolume{{Name: volume}})
	if err != nil {
		return err
	}
	defer unlock()
	if note != nil {
		r.mu.Lock()
		clones := r.clonesOf(volume)
		r.mu.Unlock()
		if len(clones) > 0 {
			return block.E(op, volume, block.KindBusy, fmt.Errorf("clones read the source: discard %s first", strings.Join(clones, ", ")))
		}
	}
	if !r.Released(volume) {
		dev, err := r.o.Source(volume)
		if err != nil {
			return err
		}
		if err := dev.Flush(ctx, block.WriteBack); err != nil {
			return block.E(op, volume, 0, err)
		}
	}
	if err := r.change(op, func(st *state) {
		v := st.Volumes[volume]
		if note != nil {
			note(&v)
		} else if !v.Released {
			v.Forced = true
		}
		v.Released = true
		st.Volumes[volume] = v
	}); err != nil {
		return err
	}
	r.log.Info("a source is given back", "volume", volume)
	return r.giveBack(ctx, volume)
}

func (r *Receiver) giveBack(ctx context.Context, volume string) error {
	if r.o.Close == nil {
		return nil
	}
	if err := r.o.Close(ctx, volume); err != nil {
		return block.E("writeback.release", volume, 0, err)
	}
	return nil
}
