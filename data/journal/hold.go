package journal

import (
	"encoding/json"
	"fmt"
	"hash/crc32"
	"io"
	"path"

	"forerun/block"
	"forerun/disk"
)

// Hold keeps the segments with records behind pos, under that name; it may be
// called again to move on. Holds outlive a restart, perhaps with an older
// position. A hold is given up, and logged, when it would keep more than half
// of MaxBytes, when the disk is full and a write needs its space, or when its segments could not be synced: then a Reader answers
// KindNotFound and the copy that needed it must be made anew.
func (j *Journal) Hold(name string, pos Position) error {
	if err := j.enter("hold"); err != nil {
		return err
	}
	defer j.life.RUnlock()
	j.ckpt.Lock() // no segment goes meanwhile
	defer j.ckpt.Unlock()
	j.mu.Lock()
	if pos.Sequence > j.pos.Sequence {
		defer j.mu.Unlock()
		return block.E("journal.hold", name, block.KindInvalid, fmt.Errorf("position %v is ahead of the journal's %v", pos, j.pos))
	}
	if j.segs[0].first > pos.Sequence+1 {
		defer j.mu.Unlock()
		return gap("journal.hold", name, pos, j.segs[0].first)
	}
	_, had := j.holds[name]
	j.holds[name] = pos
	j.holdsNow = true
	j.mu.Unlock()
	if had {
		return nil // an older position on disk only keeps more
	}
	return j.saveHolds()
}

// Held is the position of the hold with that name; ok is false when there is
// none, or when it was given up.
func (j *Journal) Held(name string) (pos Position, ok bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	pos, ok = j.holds[name]
	return pos, ok
}

// Appended counts the bytes of records appended since the journal was opened,
// without their headers.
func (j *Journal) Appended() int64 {
	return j.stats.bytes.Load() - recHeader*j.stats.records.Load()
}

// Release ends a hold. A name that is not held is no error.
func (j *Journal) Release(name string) error {
	if err := j.enter("release"); err != nil {
		return err
	}
	defer j.life.RUnlock()
	j.ckpt.Lock()
	defer j.ckpt.Unlock()
	j.mu.Lock()
	_, had := j.holds[name]
	delete(j.holds, name)
	j.holdsNow = j.holdsNow || had
	j.mu.Unlock()
	return j.saveHolds()
}

// holder names a hold that needs the record with that sequence. mu is held.
func (j *Journal) holder(seq uint64) (string, bool) {
	for name, p := range j.holds {
		if p.Sequence < seq {
			return name, true
		}
	}
	return "", false
}

func (j *Journal) breakHolds(seq uint64) {
	for name, p := range j.holds {
		if p.Sequence < seq {
			delete(j.holds, name)
			j.holdsNow = true
			j.stats.brokenHolds.Add(1)
		}
	}
}

type holdsFile struct {
	Version int                 `json:"version"`
	Holds   map[string]Position `json:"holds"`
}

const holdsName = "holds"

// saveHolds writes the holds when they changed. The caller holds ckpt.
func (j *Journal) saveHolds() error {
	j.mu.Lock()
	if !j.holdsNow {
		j.mu.Unlock()
		return nil
	}
	b, err := json.Marshal(holdsFile{1, j.holds})
	j.holdsNow = false
	j.mu.Unlock()
	if err == nil {
		b = fmt.Appendf(b, "\n%08x\n", crc32.Checksum(b, castagnoli))
		err = disk.PublishBytes(j.fs, path.Join(j.dir, holdsName), b)
	}
	if err != nil {
		j.mu.Lock()
		j.holdsNow = true
		j.mu.Unlock()
		return block.E("journal.hold", j.dir, 0, err)
	}
	return nil
}

// loadHolds reads the holds. A damaged file means no holds: their owners learn
// it from their reader and copy anew.
func (j *Journal) loadHolds() error {
	name := path.Join(j.dir, holdsName)
	f, err := j.fs.Open(name, disk.Read)
	if block.KindOf(err) == block.KindNotFound {
		return nil
	}
	if err != nil {
		return block.E("journal.open", name, 0, err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return block.E("journal.open", name, 0, err)
	}
	b := make([]byte, min(st.Size, 1<<20))
	if n, err := f.ReadAt(b, 0); err != nil && err != io.EOF {
		return block.E("journal.open", name, 0, err)
	} else {
		b = b[:n]
	}
	if h, ok := parseHolds(b); ok {
		j.holds = h
	} else {
		j.log.Warn("the file of holds on the journal is damaged; holds are given up", "file", name)
		j.holdsNow = true
	}
	return nil
}

func parseHolds(b []byte) (map[string]Position, bool) {
	const sum = 10 // newline, eight digits, newline
	if len(b) < sum {
		return nil, false
	}
	body := b[:len(b)-sum]
	if string(b[len(body):]) != fmt.Sprintf("\n%08x\n", crc32.Checksum(body, castagnoli)) {
		return nil, false
	}
	var h holdsFile
	if json.Unmarshal(body, &h) != nil || h.Version != 1 {
		return nil, false
	}
	if h.Holds == nil {
		h.Holds = map[string]Position{}
	}
	return h.Holds, true
}

func gap(op, name string, pos Position, first uint64) error {
	return block.E(op, name, block.KindNotFound,
		fmt.Errorf("the journal begins at sequence %d and no longer has what follows %v; copy the volume anew", first, pos))
}
