package journal

import (
	"crypto/rand"
	"encoding/binary"
	"path"
	"sync/atomic"

	"forerun/block"
	"forerun/disk"
)

// maxSpares is how many segment files are kept ready.
const maxSpares = 2

// segment is one file of the log.
type segment struct {
	segInfo
	seed uint32
	path string
	file disk.File
	size int64

	pending atomic.Int64 // records appended whose application has not ended
	sealed  atomic.Bool  // nothing is appended any more

	// Guarded by Journal.mu. tail and last are written by the leader only,
	// which may read them without.
	tail       int64    // where the next record goes
	last       Position // of its last record, or of the one before its first
	syncedTail int64
	named      bool // its name is durable
	refs       int  // syncs and readers using the file
	leaving    bool // being removed: readers do not find it, syncs still cover it
	out        bool // it no longer has the name of a segment, perhaps not durably
	gone       bool // removed; the last user closes the file
	broken     bool // a sync of it failed; never recycled
}

// spare is a file of segment size under a name that replay ignores.
type spare struct {
	path string
	file disk.File
}

// roll seals the current segment and begins a new one, from a spare file when
// there is one. The caller leads.
func (j *Journal) roll() error {
	j.mu.Lock()
	if j.cur != nil {
		j.cur.sealed.Store(true)
		j.cur = nil
	}
	var sp *spare
	if n := len(j.spares); n > 0 {
		s := j.spares[n-1]
		j.spares, sp = j.spares[:n-1], &s
	}
	id := j.nextID
	j.nextID++
	h := segInfo{id: id, first: j.pos.Sequence + 1, prev: j.pos.Checksum, applied: j.applied, durable: j.claim.Load()}
	j.mu.Unlock()

	var salt [8]byte
	rand.Read(salt[:]) // never fails (crypto/rand)
	h.salt = binary.LittleEndian.Uint64(salt[:])
	if sp == nil {
		f, err := j.newSpare(id)
		if err != nil {
			return err
		}
		sp = f
	}
	name, err := j.start(&h, sp)
	if err != nil {
		// Whatever it holds, under this name nobody looks at it.
		sp.file.Close()
		j.fs.Remove(sp.path)
		return block.E("journal.segment", name, 0, err)
	}
	s := &segment{segInfo: h, seed: h.seed(), path: name, file: sp.file, size: j.opt.SegmentBytes,
		tail: segHeader, syncedTail: segHeader, last: j.pos}
	j.mu.Lock()
	j.segs = append(j.segs, s)
	j.mu.Unlock()
	j.cur = s
	return nil
}

// start makes a spare file a segment. The header is durable before the file
// has the name of a segment: under that name an invalid header is damage.
func (j *Journal) start(h *segInfo, sp *spare) (name string, err error) {
	name = path.Join(j.dir, segName(h.id))
	page := make([]byte, segHeader)
	h.encode(page)
	if _, err = sp.file.WriteAt(page, 0); err == nil {
		err = sp.file.Sync()
	}
	if err == nil {
		err = j.fs.Rename(sp.path, name)
	}
	return name, err
}

// newSpare makes a file of segment size.
func (j *Journal) newSpare(id uint64) (*spare, error) {
	name := path.Join(j.dir, spareName(id))
	f, err := j.fs.Open(name, disk.Write|disk.Create|disk.Trunc)
	if err == nil {
		if err = f.Allocate(0, j.opt.SegmentBytes); err == nil {
			return &spare{name, f}, nil
		}
		f.Close()
		j.fs.Remove(name)
	}
	return nil, block.E("journal.segment", name, 0, err)
}

// stock makes a spare file, so that a full disk is met with one in hand. It is
// no failure when there is no space for it.
func (j *Journal) stock() {
	j.mu.Lock()
	id, have := j.nextID, len(j.spares)
	if have == 0 {
		j.nextID++
	}
	j.mu.Unlock()
	if have > 0 {
		return
	}
	sp, err := j.newSpare(id)
	if err != nil {
		j.log.Warn("no space for a spare journal segment", "error", err)
		return
	}
	j.mu.Lock()
	j.spares = append(j.spares, *sp)
	j.mu.Unlock()
}

func spareName(id uint64) string { return segName(id) + ".spare" }

// hold keeps s's file open while the caller uses it. mu is held.
func (s *segment) hold() { s.refs++ }

// drop ends a hold. mu is held.
func (s *segment) drop() {
	if s.refs--; s.refs == 0 && s.gone {
		s.file.Close()
	}
}

// discard removes the oldest segment, or makes it a spare. Until that is
// durable the segment stays in the list: a flush must sync it as long as a
// power cut could bring it back. The caller holds ckpt.
func (j *Journal) discard(s *segment) (err error) {
	j.mu.Lock()
	s.leaving = true
	recycle := len(j.spares) < maxSpares && s.refs == 0 && !s.broken && s.size == j.opt.SegmentBytes
	j.mu.Unlock()
	defer func() {
		j.mu.Lock()
		s.leaving = s.out
		j.mu.Unlock()
	}()
	if !s.out {
		if recycle {
			name := path.Join(j.dir, spareName(s.id))
			if err = j.fs.Rename(s.path, name); err == nil {
				j.mu.Lock()
				s.path = name // a sync that fails meanwhile names it
				j.mu.Unlock()
			}
		} else {
			err = j.fs.Remove(s.path)
		}
		if err != nil && block.KindOf(err) != block.KindNotFound {
			return err
		}
		s.out = true
	}
	if err := j.fs.SyncDir(j.dir); err != nil {
		return err
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.segs = j.segs[1:]
	if recycle && s.path == path.Join(j.dir, spareName(s.id)) {
		j.spares = append(j.spares, spare{s.path, s.file}) // a sync still running on it does no harm
		return nil
	}
	s.gone = true
	if s.refs == 0 {
		s.file.Close()
	}
	return nil
}
