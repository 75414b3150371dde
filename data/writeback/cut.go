package writeback

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"forerun/block"
	"forerun/data/journal"
)

// cut is a moment at which all volumes of a group stood still.
type cut struct {
	checkpointID
	at      time.Time
	volumes []cutVolume
}

// cutVolume is a volume at that moment.
type cutVolume struct {
	*shipped
	epoch    uint64
	from     journal.Position // records behind it are sent
	full     bool             // what was there before is compared
	pos      journal.Position
	appended int64
	peer     string // position of the secondary
	hasPeer  bool
	size     int64
}

func (s *Shipper) call(ctx context.Context, typ uint8, q, a any) error {
	b, err := s.o.Backend.Call(ctx, typ, encode(q))
	if err != nil || a == nil {
		return err
	}
	if err := json.Unmarshal(b, a); err != nil {
		return block.E("writeback.call", s.o.Group, block.KindInvalid, fmt.Errorf("the backend's answer cannot be read: %w", err))
	}
	return nil
}

// hello asks how things stand at the backend, and settles a commit whose
// answer never came.
func (s *Shipper) hello(ctx context.Context, a *helloAnswer) error {
	q := helloRequest{Version: version, Group: s.o.Group}
	for _, v := range s.vols {
		q.Volumes = append(q.Volumes, v.name)
	}
	if err := s.call(ctx, typHello, q, a); err != nil {
		return err
	}
	if c := s.pending; c != nil {
		s.pending = nil
		if a.Last == c.checkpointID {
			s.settle(ctx, c)
		}
	}
	return nil
}

// attempt makes one checkpoint, from the cut until the source has it.
func (s *Shipper) attempt(ctx context.Context) (Result, error) {
	const op = "writeback.checkpoint"
	vols := s.live()
	if len(vols) == 0 {
		return Result{}, block.E(op, s.o.Group, block.KindClosed, errors.New("the sources of all volumes of the group were given back"))
	}
	var a helloAnswer
	if err := s.hello(ctx, &a); err != nil {
		return Result{}, err
	}
	for _, v := range vols {
		if a.Volumes[v.name].Released { // by force, at the backend
			s.mu.Lock()
			v.released, v.forced = true, a.Volumes[v.name].Forced
			s.mu.Unlock()
			s.log.Warn("the move of a volume was called off at the backend; it is not written back any more", "volume", v.name)
		}
	}
	if vols = s.live(); len(vols) == 0 {
		return Result{}, block.E(op, s.o.Group, block.KindFenced, errors.New("the moves of all volumes of the group were called off at the backend"))
	}
	c := &cut{volumes: make([]cutVolume, len(vols))}
	c.ID = a.Last.ID + 1
	rand.Read(c.Nonce[:]) // never fails (crypto/rand)
	full := 0
	for i, v := range vols {
		w := &c.volumes[i]
		w.shipped, w.size = v, v.Info().Size
		var primary bool
		if w.epoch, primary = v.Epoch(); !primary {
			return Result{}, block.E(op, v.name, block.KindFenced, errors.New("this node is not the volume's primary; the primary writes it back"))
		}
		h := a.Volumes[v.name]
		var held bool
		w.from, held = v.Log().Held(Hold)
		// Something was stored once, and the backend knows nothing of it: it is
		// another backend, or lost its state.
		lost := held && w.from.Sequence > 0 && !h.Known
		w.full = !held || h.Damaged || lost
		if w.full {
			full++
		}
	}
	send := s.newSender(ctx, c)
	defer send.stop()
	if full > 0 { // at most one comparison begins before anything can be sent
		if err := send.begin(); err != nil {
			return Result{}, err
		}
		for i := range c.volumes {
			if w := &c.volumes[i]; w.full {
				s.say("comparing", "")
				if err := s.compare(send, i, w); err != nil {
					return Result{}, s.lost(w, err)
				}
			}
		}
	}
	s.say("cutting", "")
	if err := s.freeze(ctx, c, 0); err != nil {
		return Result{}, err
	}
	if full == 0 && !slices.ContainsFunc(c.volumes, func(w cutVolume) bool { return w.from != w.pos }) {
		s.settle(ctx, c) // nothing to send: what the source has is the cut
		res := Result{ID: a.Last.ID, Cut: c.at}
		return res, s.applied(ctx, a.Last.ID, res)
	}
	s.say("sending", "")
	// What leaves must not be lost here: else the source would have bytes that
	// no journal knows of.
	for _, w := range c.volumes {
		if err := w.Flush(ctx, block.WriteBack); err != nil {
			return Result{}, err
		}
	}
	if full == 0 {
		if err := send.begin(); err != nil {
			return Result{}, err
		}
	}
	for i := range c.volumes {
		if err := s.records(send, i, &c.volumes[i]); err != nil {
			return Result{}, s.lost(&c.volumes[i], err)
		}
	}
	if err := send.commit(); err != nil {
		return Result{}, err
	}
	res := Result{ID: c.ID, Cut: c.at, Bytes: send.plain.Load(), Sent: send.sent.Load(), Full: full}
	s.settle(ctx, c)
	return res, s.applied(ctx, c.ID, res)
}

// lost turns the news that records are gone into another try, which compares.
func (s *Shipper) lost(w *cutVolume, err error) error {
	var e *block.Error
	if errors.As(err, &e) && e.Op == "journal.reader" && (e.Kind == block.KindNotFound || e.Kind == block.KindCorrupt || e.Kind == block.KindInvalid) {
		s.log.Warn("the journal no longer has what the source lacks: everything is compared", "volume", w.name, "err", err)
		if rerr := w.Log().Release(Hold); rerr != nil {
			return rerr
		}
		return fmt.Errorf("%w: %w", errAgain, err)
	}
	return err
}

// freeze stops the volumes from i on, and notes where they stand when all do.
func (s *Shipper) freeze(ctx context.Context, c *cut, i int) error {
	if i < len(c.volumes) {
		return c.volumes[i].Freeze(ctx, func() error { return s.freeze(ctx, c, i+1) })
	}
	c.at = time.Now()
	for i := range c.volumes {
		w := &c.volumes[i]
		if e, primary := w.Epoch(); !primary || e != w.epoch {
			return block.E("writeback.cut", w.name, block.KindFenced, errors.New("another node became the volume's primary"))
		}
		w.pos, w.appended = w.Log().Position(), w.Log().Appended()
		w.peer, w.hasPeer = w.MarkPeer(ctx)
		s.mu.Lock()
		w.cutAt = w.appended
		s.mu.Unlock()
	}
	return nil
}

// settle notes that the backend has stored a cut: what is before it need not
// be sent again, by this node or by the one that takes over.
func (s *Shipper) settle(ctx context.Context, c *cut) {
	for _, w := range c.volumes {
		if err := w.Log().Hold(Hold, w.pos); err != nil {
			s.log.Warn("the journal does not keep what follows the checkpoint; everything will be compared", "volume", w.name, "err", err)
			if err := w.Log().Release(Hold); err != nil {
				s.log.Error("a hold cannot be given up", "volume", w.name, "err", err)
			}
		}
		if w.full {
			if err := w.Log().Release(scanHold); err != nil {
				s.log.Warn("a hold cannot be given up", "volume", w.name, "err", err)
			}
		}
		if w.hasPeer {
			// An older hold there only keeps more.
			if err := w.HoldPeer(ctx, Hold, w.peer); err != nil {
				s.log.Warn("the secondary does not know of the checkpoint", "volume", w.name, "err", err)
			}
		}
		s.mu.Lock()
		w.stored, w.known, w.base, w.backlog = w.pos, true, w.appended, 0
		if !w.oldest.IsZero() {
			w.clean = c.at
			w.oldest = time.Time{}
		}
		s.mu.Unlock()
	}
	s.look()
}

// applied waits until the source has the checkpoint.
func (s *Shipper) applied(ctx context.Context, id uint64, res Result) error {
	s.say("applying", "")
	for id != 0 {
		var a appliedAnswer
		if err := s.call(ctx, typApplied, appliedRequest{s.o.Group, id}, &a); err != nil {
			return again(err)
		}
		if a.Applied {
			break
		}
		s.say("applying", a.Reason)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	st := &s.status
	st.LastID, st.LastCut = id, res.Cut
	if res.Bytes > 0 {
		st.Checkpoints++
		st.Bytes, st.Sent = st.Bytes+res.Bytes, st.Sent+res.Sent
		if res.Full > 0 {
			st.Compared++
		}
	}
	return nil
}

// maxWindow is how many records are looked at together: what is overwritten
// within a window is not sent. A window's tables take about 130 bytes a record.
const maxWindow = 1 << 16

// maxVoids bounds the records that are known to have no effect.
const maxVoids = 1 << 18

// records sends what the journal has between w.from and the cut: of each
// window only the newest bytes of each range.
func (s *Shipper) records(send *sender, vol int, w *cutVolume) error {
	if w.from == w.pos {
		return nil
	}
	log := w.Log()
	head, err := log.Reader(w.from)
	if err != nil {
		return err
	}
	defer head.Close()
	body, err := log.Reader(w.from)
	if err != nil {
		return err
	}
	defer body.Close()
	var voids map[uint64]struct{}
	for head.Position() != w.pos {
		window, found, err := gather(send.ctx, head, w.pos, s.window)
		if err != nil {
			return err
		}
		if voids == nil {
			voids = found
			if head.Position() != w.pos { // a later window may void records of this one
				if err := findVoids(send.ctx, log, head.Position(), w.pos, voids); err != nil {
					return err
				}
			}
		}
		window = slices.DeleteFunc(window, func(c change) bool { _, void := voids[c.seq]; return void })
		if err := emit(send, vol, body, newest(window)); err != nil {
			return err
		}
		for body.Position() != head.Position() {
			if _, err := body.Skim(send.ctx); err != nil {
				return err
			}
		}
		if err := send.flush(); err != nil { // what follows may overlap
			return err
		}
	}
	return nil
}

// gather reads the headers of up to limit changes, not beyond to.
func gather(ctx context.Context, r *journal.Reader, to journal.Position, limit int) ([]change, map[uint64]struct{}, error) {
	var out []change
	voids := map[uint64]struct{}{}
	for r.Position() != to && len(out) < limit {
		rec, err := r.Skim(ctx)
		if err != nil {
			return nil, nil, err
		}
		c := change{seq: rec.Sequence, off: rec.Off, n: rec.Len}
		switch rec.Type {
		case journal.TypeWrite:
			c.kind = kindData
		case journal.TypeTrim:
			c.kind = kindHole
		case journal.TypeZero:
			c.kind = kindZero
			if rec.Flags.Has(block.MayTrim) {
				c.kind = kindHole
			}
		case journal.TypeVoid:
			voids[uint64(rec.Off)] = struct{}{}
			continue
		}
		out = append(out, c)
	}
	return out, voids, nil
}

// findVoids adds the records between two positions that have no effect.
func findVoids(ctx context.Context, log Log, from, to journal.Position, voids map[uint64]struct{}) error {
	r, err := log.Reader(from)
	if err != nil {
		return err
	}
	defer r.Close()
	for r.Position() != to {
		rec, err := r.Skim(ctx)
		if err != nil {
			return err
		}
		if rec.Type == journal.TypeVoid {
			if len(voids) >= maxVoids {
				return block.E("journal.reader", "", block.KindNotFound, errors.New("too many writes failed to tell what the source lacks"))
			}
			voids[uint64(rec.Off)] = struct{}{}
		}
	}
	return nil
}

// emit reads the records again and sends what is left of each.
func emit(send *sender, vol int, r *journal.Reader, winners []change) error {
	for len(winners) > 0 {
		next := winners[0].seq
		for r.Position().Sequence+1 < next {
			if _, err := r.Skim(send.ctx); err != nil {
				return err
			}
		}
		rec, err := r.Next(send.ctx)
		if err != nil {
			return err
		}
		for len(winners) > 0 && winners[0].seq == rec.Sequence {
			c := winners[0]
			winners = winners[1:]
			e := extent{vol: vol, kind: c.kind, off: c.off, n: c.n}
			if c.kind != kindData {
				err = send.zero(e)
			} else {
				err = send.data(e, rec.Payload[c.off-rec.Off:][:c.n])
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}
