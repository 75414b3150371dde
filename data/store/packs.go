package store

import (
	"fmt"
	"strconv"
	"strings"
	"sync"

	"forerun/data/store/internal/runs"
	"forerun/disk"
	"forerun/internal/chunk"
)

// pack is one pack file.
type pack struct {
	id   uint32
	salt uint32

	// Guarded by Store.mu; end and bad change with appendMu held too.
	end   int64 // where its records end, bytes
	bad   int64 // from here on a sync failed or was never seen to succeed; 0: nowhere
	live  tally // of the chunks the map has in it
	scope bool  // a sweep is looking at it
	pin   bool  // the sweep must not remove it

	// Guarded by Store.appendMu.
	w      disk.File // open for appending or for the sync that is due
	synced int64     // bytes that are durable
	named  bool      // its name is durable

	// Guarded by Store.fileMu.
	file disk.File // open for reading
	refs int
	used uint64
	gone bool
}

// tally counts chunks.
type tally struct{ chunks, plain, stored int64 }

func (t *tally) add(l runs.Loc, sign int64) {
	t.chunks += sign
	if l.Codec != chunk.Recipe { // its plain bytes are those of its pieces
		t.plain += sign * int64(l.Plain)
	}
	t.stored += sign * span(l)
}

func packName(id uint32) string { return fmt.Sprintf("%08x.pack", id) }

func (s *Store) packPath(id uint32) string { return s.packDir + "/" + packName(id) }

func parseName(name, suffix string) (uint32, bool) {
	hex, ok := strings.CutSuffix(name, suffix)
	if !ok || len(hex) != 8 {
		return 0, false
	}
	n, err := strconv.ParseUint(hex, 16, 32)
	return uint32(n), err == nil
}

// hold opens p for reading, if it is not open, and keeps it so until letGo.
func (s *Store) hold(p *pack) (disk.File, error) {
	s.fileMu.Lock()
	defer s.fileMu.Unlock()
	if p.gone {
		return nil, errGone
	}
	if p.file == nil {
		f, err := s.fs.Open(s.packPath(p.id), disk.Read)
		if err != nil {
			return nil, err
		}
		if len(s.open) >= s.opt.OpenPacks {
			s.closeIdle()
		}
		p.file = f
		s.open = append(s.open, p)
	}
	s.tick++
	p.used = s.tick
	p.refs++
	return p.file, nil
}

func (s *Store) letGo(p *pack) {
	s.fileMu.Lock()
	p.refs--
	if p.gone && p.refs == 0 {
		s.closeRead(p)
		s.idle.Broadcast()
	}
	s.fileMu.Unlock()
}

// closeIdle closes the file nobody has used for longest. With all in use, more
// than OpenPacks are open; callers bound that.
func (s *Store) closeIdle() {
	var old *pack
	for _, p := range s.open {
		if p.refs == 0 && (old == nil || p.used < old.used) {
			old = p
		}
	}
	if old != nil {
		s.closeRead(old)
	}
}

// closeRead wants fileMu held.
func (s *Store) closeRead(p *pack) {
	if p.file == nil {
		return
	}
	p.file.Close()
	p.file = nil
	for i, q := range s.open {
		if q == p {
			s.open[i] = s.open[len(s.open)-1]
			s.open[len(s.open)-1] = nil
			s.open = s.open[:len(s.open)-1]
			break
		}
	}
}

// unlink removes the file of a pack that is out of the table already, with
// wait once nobody reads it; without, readers finish and give the space back
// then. A pack whose file stays because of an error costs space until the next
// Open, which removes it.
func (s *Store) unlink(p *pack, wait bool) error {
	s.fileMu.Lock()
	p.gone = true
	for wait && p.refs > 0 {
		s.idle.Wait()
	}
	if p.refs == 0 {
		s.closeRead(p)
	}
	s.fileMu.Unlock()
	return s.fs.Remove(s.packPath(p.id))
}

// buffers lends memory for packed bytes and pages, in two sizes: most chunks
// are small, a few are as large as can be.
type buffers struct{ small, large sync.Pool }

const (
	smallBuffer = chunk.DefaultSize + 4096
	largeBuffer = chunk.MaxSize + 4096
)

func (b *buffers) get(n int) *[]byte {
	pool, size := &b.small, smallBuffer
	if n > smallBuffer {
		pool, size = &b.large, largeBuffer
	}
	if p, _ := pool.Get().(*[]byte); p != nil {
		return p
	}
	p := make([]byte, size)
	return &p
}

func (b *buffers) put(p *[]byte) {
	if len(*p) == smallBuffer {
		b.small.Put(p)
	} else {
		b.large.Put(p)
	}
}
