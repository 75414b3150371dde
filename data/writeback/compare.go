package writeback

import (
	"fmt"
	"sync"

	"forerun/block"
	"forerun/data/journal"
	"forerun/internal/chunk"
)

const (
	compareGrain = 64 << 10 // bytes of one signature
	compareBatch = 32       // signatures in one question
	compareWidth = 3        // questions under way; each has a buffer of 2 MiB
	// compareZero is the longest range of zeros in one question.
	compareZero = 1 << 30
)

// batch is one question and the bytes it is about.
type batch struct {
	probes []probe
	buf    []byte
	used   int
}

// compare sends everything of a volume that may differ from the source and
// does: it is read while writes go on, and those made meanwhile follow from the
// journal, so that the sum is the content at the cut.
func (s *Shipper) compare(send *sender, vol int, w *cutVolume) error {
	// With no write under way, so that what follows in the journal is all that
	// may be missing from what is read.
	err := w.Freeze(send.ctx, func() error {
		w.from = w.Log().Position()
		return w.Log().Hold(scanHold, w.from)
	})
	if err != nil {
		return err
	}
	s.log.Info("a volume is compared with its source", "volume", w.name)
	f, err := follow(send.ctx, w.Log(), w.from, s.follow)
	if err != nil {
		return err
	}
	defer f.stop()
	if err := s.comparePass(send, vol, w); err != nil {
		return err
	}
	// What was written meanwhile is in the journal, unless it was too much: then
	// it is read again, until what is written meanwhile is not.
	for {
		var dirty marks
		err := w.Freeze(send.ctx, func() (err error) {
			var pos journal.Position
			if dirty, pos, err = f.turn(send.ctx); dirty != nil {
				w.from = pos
			}
			return err
		})
		if err != nil || dirty == nil {
			return err
		}
		s.say("comparing", "")
		s.log.Info("much was written while a volume was compared; it is read again", "volume", w.name, "bytes", dirty.bytes())
		if err := s.rereadPass(send, vol, w, dirty); err != nil {
			return err
		}
	}
}

// rereadPass sends what is marked as it is now. It is not compared: what was
// sent before in this checkpoint is not in the source yet.
func (s *Shipper) rereadPass(send *sender, vol int, w *cutVolume, dirty marks) error {
	buf := make([]byte, followGrain)
	err := dirty.each(w.size, func(off, n int64) error {
		p := buf[:n]
		if err := readAll(send.ctx, w, p, off); err != nil {
			return err
		}
		e := extent{vol: vol, kind: kindData, off: off, n: n}
		if chunk.AllZero(p) {
			e.kind = kindHole
			return send.zero(e)
		}
		return send.data(e, p)
	})
	if err != nil {
		return err
	}
	return send.flush() // what follows may overlap
}

// comparePass goes once over everything that may differ.
func (s *Shipper) comparePass(send *sender, vol int, w *cutVolume) error {
	var (
		wg   sync.WaitGroup
		mu   sync.Mutex // of send, while batches end side by side
		free = make(chan *batch, compareWidth)
	)
	for range compareWidth {
		free <- &batch{buf: make([]byte, compareBatch*compareGrain)}
	}
	cur := (*batch)(nil)
	ask := func() {
		if cur == nil || len(cur.probes) == 0 {
			return
		}
		b := cur
		cur = nil
		wg.Go(func() {
			if err := s.settleBatch(send, &mu, b); err != nil {
				send.cancel(err)
			}
			b.probes, b.used = b.probes[:0], 0
			free <- b
		})
	}
	take := func() error {
		if cur == nil {
			select {
			case cur = <-free:
			case <-send.ctx.Done():
				return send.broken()
			}
		}
		return nil
	}
	err := s.suspects(send, w, func(e block.Extent) error {
		for e.Len > 0 {
			if err := take(); err != nil {
				return err
			}
			q := probe{extent: extent{vol: vol, kind: kindHole, off: e.Off, n: min(e.Len, compareZero)}}
			if !e.Kind.Zero() {
				q.kind, q.n = kindData, min(e.Len, compareGrain-e.Off%compareGrain)
				p := cur.buf[cur.used : cur.used+int(q.n)]
				cur.used += int(q.n)
				if err := readAll(send.ctx, w, p, q.off); err != nil {
					return err
				}
				if q.sig = chunk.Sum(p); chunk.AllZero(p) {
					q.kind = kindHole
				}
			}
			cur.probes = append(cur.probes, q)
			e.Off, e.Len = e.Off+q.n, e.Len-q.n
			if len(cur.probes) == compareBatch {
				ask()
			}
		}
		return nil
	})
	ask()
	wg.Wait()
	if err == nil {
		err = send.broken()
	}
	if err == nil {
		err = send.flush() // what follows may overlap
	}
	return err
}

// suspects calls fn for what may differ from the source.
func (s *Shipper) suspects(send *sender, w *cutVolume, fn func(e block.Extent) error) error {
	var exts []block.Extent
	for off := int64(0); off < w.size; {
		var err error
		exts, err = w.Extents(send.ctx, exts[:0], off, w.size-off, block.Local|block.WriteBack)
		if err != nil {
			return err
		}
		if len(exts) == 0 {
			return block.E("writeback.compare", w.name, block.KindIO, fmt.Errorf("the volume described nothing at %d", off))
		}
		for _, e := range exts {
			if e.State != block.Untouched && e.State != block.Held {
				if err := fn(e); err != nil {
					return err
				}
			}
			off = e.End()
		}
	}
	return nil
}

// settleBatch asks, and sends what differs.
func (s *Shipper) settleBatch(send *sender, mu *sync.Mutex, b *batch) error {
	var answer []byte
	for wait := retryFirst; ; {
		send.mu.Lock()
		handle, life := send.handle, send.life
		send.mu.Unlock()
		q := appendHandle(nil, handle)
		for _, p := range b.probes {
			q = appendProbe(q, p)
		}
		var err error
		if answer, err = s.o.Backend.Call(send.ctx, typProbe, q); err == nil {
			break
		}
		if wait, err = send.mend(err, life, wait); err != nil {
			return err
		}
	}
	if len(answer) != (len(b.probes)+7)/8 {
		return invalid("writeback.compare", s.o.Group, "the backend answered %d bytes to %d questions", len(answer), len(b.probes))
	}
	mu.Lock()
	defer mu.Unlock()
	at := b.buf
	for i, q := range b.probes {
		var p []byte
		if q.sig != (chunk.Sig{}) {
			p, at = at[:q.n], at[q.n:]
		}
		if answer[i/8]&(1<<(i%8)) == 0 {
			continue
		}
		var err error
		if q.kind == kindData {
			err = send.data(q.extent, p)
		} else {
			err = send.zero(q.extent)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
