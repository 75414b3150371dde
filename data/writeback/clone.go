package writeback

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/bits"
	"path"
	"slices"
	"strings"
	"sync"

	"forerun/block"
	"forerun/disk"
)

const (
	cloneVersion = 1
	cloneName    = "clone" // the description
	keptName     = "kept"  // old bytes, at the volume's own offsets
	mapName      = "map"   // which grains are there
	mapMagic     = "FRWBMAP1"
	mapHead      = 32
)

// cloneMeta is the description of a clone.
type cloneMeta struct {
	Version int    `json:"version"`
	Volume  string `json:"volume"`
	Clone   string `json:"clone"`
	Size    int64  `json:"size"`
	Grain   int64  `json:"grain"`
	Source  string `json:"source"` // Info.ID of the source
	Nonce   nonce  `json:"nonce"`
	// Opened by somebody, rather than made because another volume of its group was.
	Opened bool `json:"opened"`
}

// clone is a volume as it was when the clone began: what was changed at the
// source since is kept beside it. It is a block.Device that cannot be written.
type clone struct {
	meta   cloneMeta
	fs     disk.FS
	dir    string
	source func(volume string) (block.Device, error)
	info   block.Info

	// mu keeps the source's bytes and the bits together: who reads holds it for
	// reading from looking at the bits until the bytes are there.
	mu     sync.RWMutex
	bits   []uint64
	kept   disk.File
	closed bool

	unsaved bool // bits are set that the map on disk lacks; owned by preserve
}

var _ block.Device = (*clone)(nil)

func (r *Receiver) clonesDir() string { return path.Join(r.o.Dir, "clones") }

// clonesOf names the clones of a volume. mu is held.
func (r *Receiver) clonesOf(volume string) []string {
	var out []string
	for _, c := range r.clones {
		if c.meta.Volume == volume {
			out = append(out, c.meta.Clone)
		}
	}
	slices.Sort(out)
	return out
}

// loadClones opens the clones of earlier processes.
func (r *Receiver) loadClones() error {
	dir := r.clonesDir()
	if err := r.fs.MkdirAll(dir); err != nil {
		return block.E("clone.open", dir, 0, err)
	}
	names, err := r.fs.List(dir)
	if err != nil {
		return block.E("clone.open", dir, 0, err)
	}
	for _, n := range names {
		c, err := r.loadClone(path.Join(dir, n))
		if err != nil {
			return err
		}
		if c != nil {
			r.clones[c.meta.Volume+"@"+c.meta.Clone] = c
		}
	}
	return nil
}

// loadClone opens one; nil means that it never began, or was being removed.
func (r *Receiver) loadClone(dir string) (*clone, error) {
	m, err := loadCloneMeta(r.fs, path.Join(dir, cloneName))
	if block.KindOf(err) == block.KindNotFound {
		return nil, removeClone(r.fs, dir)
	}
	if err != nil {
		return nil, block.E("clone.open", dir, 0, fmt.Errorf("%w; its content cannot be told any more: remove the directory and begin another clone", err))
	}
	c := r.newClone(m, dir)
	if c.kept, err = r.fs.Open(path.Join(dir, keptName), disk.Write); err == nil {
		err = c.loadMap()
	}
	if err != nil {
		c.shut()
		return nil, block.E("clone.open", dir, 0, fmt.Errorf("%w; its content cannot be told any more: remove the directory and begin another clone", err))
	}
	return c, nil
}

func (r *Receiver) newClone(m cloneMeta, dir string) *clone {
	c := &clone{meta: m, fs: r.fs, dir: dir, source: r.o.Source}
	grains := (m.Size + m.Grain - 1) / m.Grain
	c.bits = make([]uint64, (grains+63)/64)
	c.info = block.Info{Size: m.Size, BlockSize: 512, PreferredIO: int(m.Grain), ReadOnly: true, CanExtents: true,
		ID: fmt.Sprintf("%s@%s", m.Source, m.Nonce)}
	return c
}

func loadCloneMeta(fs disk.FS, name string) (m cloneMeta, err error) {
	f, err := fs.Open(name, disk.Read)
	if err != nil {
		return m, err
	}
	defer f.Close()
	b := make([]byte, 64<<10)
	n, err := f.ReadAt(b, 0)
	if err != nil && err != io.EOF {
		return m, err
	}
	return parseCloneMeta(b[:n])
}

func parseCloneMeta(b []byte) (m cloneMeta, err error) {
	if len(b) < sumLen || string(b[len(b)-sumLen:]) != fmt.Sprintf("\n%08x\n", crc32.Checksum(b[:len(b)-sumLen], castagnoli)) {
		return m, block.E("clone.parse", "", block.KindCorrupt, errFormat)
	}
	if err := json.Unmarshal(b[:len(b)-sumLen], &m); err != nil {
		return m, block.E("clone.parse", "", block.KindCorrupt, err)
	}
	switch {
	case m.Version != cloneVersion:
		return m, block.E("clone.parse", "", block.KindUnsupported, fmt.Errorf("version %d is not known here", m.Version))
	case m.Size <= 0 || m.Size > 1<<60 || m.Grain < 4096 || m.Grain > 64<<20 || m.Grain&(m.Grain-1) != 0 || m.Size/m.Grain > 1<<32:
		return m, block.E("clone.parse", "", block.KindCorrupt, fmt.Errorf("%d bytes in grains of %d", m.Size, m.Grain))
	}
	return m, nil
}

func saveCloneMeta(fs disk.FS, dir string, m cloneMeta) error {
	b := encode(m)
	b = fmt.Appendf(b, "\n%08x\n", crc32.Checksum(b, castagnoli))
	return disk.Publish(fs, path.Join(dir, cloneName), func(f disk.File) error {
		_, err := f.WriteAt(b, 0)
		return err
	})
}

// OpenClone opens NAME@CLONE: volume as it is now, if there is no such clone
// yet, else as it was when that began. The clones of all volumes of a
// consistency group begin together. The device stays the receiver's; nobody
// need close it.
func (r *Receiver) OpenClone(ctx context.Context, volume, name string) (block.Device, error) {
	const op = "clone.open"
	if err := checkName(op, name); err != nil {
		return nil, err
	}
	r.mu.Lock()
	c := r.clones[volume+"@"+name]
	v := r.st.Volumes[volume]
	group := r.st.Groups[v.Group].Volumes
	there := c != nil && c.meta.Opened
	r.mu.Unlock()
	if there {
		return c, nil
	}
	switch {
	case v.Released:
		return nil, block.E(op, volume, block.KindFenced, errors.New("the source was given back"))
	case v.Damaged:
		return nil, block.E(op, volume, block.KindCorrupt, errors.New("the source is no checkpoint's content until everything was compared; try later"))
	}
	vols := []beginVolume{{Name: volume}}
	for _, n := range group {
		if n != volume {
			vols = append(vols, beginVolume{Name: n})
		}
	}
	unlock, err := r.lockContent(ctx, vols)
	if err != nil {
		return nil, err
	}
	defer unlock()
	for _, o := range vols[1:] { // the one asked for last: when it is there, all are
		r.mu.Lock()
		s := r.st.Volumes[o.Name]
		r.mu.Unlock()
		if s.Released || s.Damaged {
			continue
		}
		if _, err := r.makeClone(o.Name, name, false); err != nil {
			return nil, err
		}
	}
	return r.makeClone(volume, name, true)
}

// makeClone makes a clone, durably, unless it is there. The content is locked.
func (r *Receiver) makeClone(volume, name string, opened bool) (*clone, error) {
	const op = "clone.open"
	key := volume + "@" + name
	r.mu.Lock()
	c := r.clones[key]
	var m cloneMeta
	if c != nil {
		m = c.meta
	}
	r.mu.Unlock()
	if c != nil {
		if !opened || m.Opened {
			return c, nil
		}
		m.Opened = true
		if err := saveCloneMeta(r.fs, c.dir, m); err != nil {
			return nil, block.E(op, key, 0, err)
		}
		r.mu.Lock()
		c.meta.Opened = true
		r.mu.Unlock()
		return c, nil
	}
	dev, err := r.o.Source(volume)
	if err != nil {
		return nil, err
	}
	info := dev.Info()
	m = cloneMeta{Version: cloneVersion, Volume: volume, Clone: name, Size: info.Size, Grain: r.o.Grain, Source: info.ID, Opened: opened}
	rand.Read(m.Nonce[:]) // never fails (crypto/rand)
	c = r.newClone(m, path.Join(r.clonesDir(), fmt.Sprintf("%s-%.8s", safeName(key), m.Nonce)))
	if err := c.create(); err != nil {
		return nil, block.E(op, key, 0, err)
	}
	r.mu.Lock()
	r.clones[key] = c
	r.mu.Unlock()
	r.log.Info("a clone begins", "volume", volume, "clone", name)
	return c, nil
}

// create makes the files; the description comes last, and makes it a clone.
func (c *clone) create() error {
	if err := c.fs.MkdirAll(c.dir); err != nil {
		return err
	}
	f, err := c.fs.Open(path.Join(c.dir, keptName), disk.Write|disk.Create|disk.Trunc)
	if err != nil {
		return err
	}
	c.kept = f
	if err = c.saveMap(); err == nil { // syncs the directory, and so the name of the other file
		err = saveCloneMeta(c.fs, c.dir, c.meta)
	}
	if err != nil {
		c.shut()
	}
	return err
}

// endClone takes the description away: from then on nothing else here means
// anything, also after a crash.
func endClone(fs disk.FS, dir string) error {
	err := remove(fs, path.Join(dir, cloneName))
	if err == nil {
		err = fs.SyncDir(dir)
	}
	if err != nil {
		return block.E("clone.discard", dir, 0, err)
	}
	return nil
}

// removeClone removes the rest.
func removeClone(fs disk.FS, dir string) error {
	for _, n := range []string{mapName, keptName, cloneName + ".tmp", mapName + ".tmp"} {
		if err := remove(fs, path.Join(dir, n)); err != nil {
			return block.E("clone.discard", dir, 0, err)
		}
	}
	if err := remove(fs, dir); err != nil {
		return block.E("clone.discard", dir, 0, err)
	}
	return nil
}

// Discard removes a clone and what it kept; those of its group that nobody
// opened go with it. It is no error when there is none.
func (r *Receiver) Discard(ctx context.Context, volume, name string) error {
	r.mu.Lock()
	var all []*clone
	if c := r.clones[volume+"@"+name]; c != nil {
		all = append(all, c)
		for _, n := range r.st.Groups[r.st.Volumes[volume].Group].Volumes {
			if o := r.clones[n+"@"+name]; n != volume && o != nil && !o.meta.Opened {
				all = append(all, o)
			}
		}
	}
	r.mu.Unlock()
	for _, c := range all {
		// Without the content locked: preserving may wait for the very space that
		// this gives back.
		if err := endClone(r.fs, c.dir); err != nil {
			return err
		}
		c.shut()
		r.mu.Lock()
		if key := c.meta.Volume + "@" + c.meta.Clone; r.clones[key] == c {
			delete(r.clones, key)
		}
		r.mu.Unlock()
		if err := removeClone(r.fs, c.dir); err != nil { // the next start does
			r.log.Warn("files of a discarded clone stay behind", "err", err)
		}
		r.log.Info("a clone was discarded", "volume", c.meta.Volume, "clone", c.meta.Clone)
	}
	return ctx.Err()
}

func (c *clone) shut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	if c.kept != nil {
		c.kept.Close() // what matters was synced
		c.kept = nil
	}
}

func (c *clone) has(g int64) bool { return c.bits[g/64]&(1<<(g%64)) != 0 }

// run is how many grains from g on, below to, are like g.
func (c *clone) run(g, to int64) (kept bool, n int64) {
	kept = c.has(g)
	at := g + 1
	for at < to && c.has(at) == kept {
		at++
	}
	return kept, at - g
}

// each calls fn for the parts of [off, off+n) that are kept, and those that are not.
func (c *clone) each(off, n int64, fn func(kept bool, off, n int64) error) error {
	grain, end := c.meta.Grain, off+n
	for off < end {
		kept, k := c.run(off/grain, (end+grain-1)/grain)
		to := min(end, (off/grain+k)*grain)
		if err := fn(kept, off, to-off); err != nil {
			return err
		}
		off = to
	}
	return nil
}

// Info describes the clone; its ID is another one for every clone begun.
func (c *clone) Info() block.Info { return c.info }

func (c *clone) enter(op string, off, n int64) error {
	if off < 0 || n <= 0 || off > c.info.Size-n {
		return block.E("clone."+op, c.dir, block.KindRange, fmt.Errorf("%d bytes at %d of %d", n, off, c.info.Size))
	}
	c.mu.RLock()
	if c.closed {
		c.mu.RUnlock()
		return block.E("clone."+op, c.dir, block.KindClosed, errors.New("the clone was discarded"))
	}
	return nil
}

// ReadAt reads what was kept, and the rest from the source.
func (c *clone) ReadAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	if err := c.enter("read", off, int64(len(p))); err != nil {
		return err
	}
	defer c.mu.RUnlock()
	dev, err := c.source(c.meta.Volume)
	if err != nil {
		return err
	}
	return c.each(off, int64(len(p)), func(kept bool, at, n int64) error {
		b := p[at-off : at-off+n]
		if !kept {
			return dev.ReadAt(ctx, b, at, f)
		}
		k, err := c.kept.ReadAt(b, at)
		if err != nil && err != io.EOF {
			return block.E("clone.read", c.dir, 0, err)
		}
		clear(b[k:]) // zeros at the end are not written
		return nil
	})
}

// Extents asks the source about what was not kept.
func (c *clone) Extents(ctx context.Context, dst []block.Extent, off, n int64, f block.Flags) ([]block.Extent, error) {
	if err := c.enter("extents", off, n); err != nil {
		return dst, err
	}
	defer c.mu.RUnlock()
	kept, k := c.run(off/c.meta.Grain, (off+n+c.meta.Grain-1)/c.meta.Grain)
	n = min(n, (off/c.meta.Grain+k)*c.meta.Grain-off)
	if kept {
		return append(dst, block.Extent{Off: off, Len: n, Kind: block.Data}), nil
	}
	dev, err := c.source(c.meta.Volume)
	if err != nil {
		return dst, err
	}
	return dev.Extents(ctx, dst, off, n, f)
}

func (c *clone) refuse(op string) error {
	return block.E("clone."+op, c.dir, block.KindReadOnly, errors.New("a clone of a source cannot be written; its frontend keeps what is written"))
}

// WriteAt is refused.
func (c *clone) WriteAt(context.Context, []byte, int64, block.Flags) error { return c.refuse("write") }

// Zero is refused.
func (c *clone) Zero(context.Context, int64, int64, block.Flags) error { return c.refuse("zero") }

// Trim is refused.
func (c *clone) Trim(context.Context, int64, int64, block.Flags) error { return c.refuse("trim") }

// Flush has nothing to do.
func (c *clone) Flush(context.Context, block.Flags) error { return nil }

// Prefetch returns at once.
func (c *clone) Prefetch(context.Context, int64, int64, block.Flags) error { return nil }

// Close does nothing: the clone is the receiver's.
func (c *clone) Close() error { return nil }

// saveMap replaces the map on disk.
func (c *clone) saveMap() error {
	le := binary.LittleEndian
	b := make([]byte, mapHead, mapHead+8*len(c.bits)+4)
	copy(b, mapMagic)
	le.PutUint32(b[8:], cloneVersion)
	le.PutUint32(b[12:], uint32(bits.TrailingZeros64(uint64(c.meta.Grain))))
	le.PutUint64(b[16:], uint64(c.meta.Size))
	le.PutUint64(b[24:], binary.LittleEndian.Uint64(c.meta.Nonce[:]))
	for _, w := range c.bits {
		b = le.AppendUint64(b, w)
	}
	b = le.AppendUint32(b, crc32.Checksum(b, castagnoli))
	return disk.Publish(c.fs, path.Join(c.dir, mapName), func(f disk.File) error {
		_, err := f.WriteAt(b, 0)
		return err
	})
}

func (c *clone) loadMap() error {
	f, err := c.fs.Open(path.Join(c.dir, mapName), disk.Read)
	if err != nil {
		return err
	}
	defer f.Close()
	b := make([]byte, mapHead+8*len(c.bits)+4)
	if ok, err := readFull(f, b, 0); err != nil || !ok {
		return errors.Join(block.E("clone.map", c.dir, block.KindCorrupt, errFormat), err)
	}
	return c.parseMap(b)
}

func (c *clone) parseMap(b []byte) error {
	le := binary.LittleEndian
	n := len(b) - 4
	switch {
	case n != mapHead+8*len(c.bits) || string(b[:8]) != mapMagic || le.Uint32(b[n:]) != crc32.Checksum(b[:n], castagnoli):
		return block.E("clone.map", c.dir, block.KindCorrupt, errFormat)
	case le.Uint32(b[8:]) != cloneVersion:
		return block.E("clone.map", c.dir, block.KindUnsupported, fmt.Errorf("version %d is not known here", le.Uint32(b[8:])))
	case le.Uint32(b[12:]) != uint32(bits.TrailingZeros64(uint64(c.meta.Grain))) || le.Uint64(b[16:]) != uint64(c.meta.Size) ||
		le.Uint64(b[24:]) != le.Uint64(c.meta.Nonce[:]):
		return block.E("clone.map", c.dir, block.KindCorrupt, errors.New("the map is another clone's"))
	}
	for i := range c.bits {
		c.bits[i] = le.Uint64(b[mapHead+8*i:])
	}
	return nil
}

// ParseClone takes NAME@CLONE apart; ok is false for a plain name.
func ParseClone(s string) (volume, name string, ok bool) {
	i := strings.LastIndexByte(s, '@')
	if i <= 0 || i == len(s)-1 {
		return s, "", false
	}
	return s[:i], s[i+1:], true
}

// discardRequest ends a clone for the node that runs it, whose name it bears.
func (r *Receiver) discardRequest(ctx context.Context, node string, b []byte) error {
	const op = "clone.discard"
	var q discardRequest
	if err := decode(op, b, &q); err != nil {
		return err
	}
	if err := errors.Join(checkName(op, q.Volume), checkName(op, q.Clone)); err != nil {
		return block.E(op, "", block.KindInvalid, err)
	}
	if q.Clone != node {
		return block.E(op, q.Volume, block.KindDenied, fmt.Errorf("clone %s is not that of node %s", q.Clone, node))
	}
	return r.Discard(ctx, q.Volume, q.Clone)
}

// DiscardClone has the backend end a clone and remove what it kept. It is no
// error when there is none.
func DiscardClone(ctx context.Context, backend Caller, volume, clone string) error {
	_, err := backend.Call(ctx, typDiscard, encode(discardRequest{volume, clone}))
	return err
}
