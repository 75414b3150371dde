package cache

import (
	"errors"
	"fmt"
	"math/bits"
	"path"
	"sync"
	"sync/atomic"

	"forerun/block"
	"forerun/disk"
	"forerun/internal/chunk"
)

// Options say how much a cache may hold.
type Options struct {
	ChunkBytes   int     // a power of two; chunk.DefaultSize when 0
	Size         int64   // of the volume, bytes
	MemoryBytes  int64   // budget of a Memory of its own, where Memory is nil
	Memory       *Memory // shared with other volumes, or nil
	ScratchBytes int64   // length of the scratch file, 0 for none
}

// Cache keeps plain chunks of one volume.
type Cache struct {
	opt     Options
	shift   uint
	mem     *Memory
	owner   uint64
	scratch *scratch // nil for none
	bufs    sync.Pool

	memoryHits, scratchHits, misses, promoted atomic.Int64
}

// New makes an empty cache. What dir holds of an earlier one is wiped. Where
// the scratch file cannot be made, that is an error; later failures only cost hits.
func New(fs disk.FS, dir string, o Options) (*Cache, error) {
	if o.ChunkBytes == 0 {
		o.ChunkBytes = chunk.DefaultSize
	}
	if bits.OnesCount(uint(o.ChunkBytes)) != 1 || o.ChunkBytes < chunk.MinSize || o.ChunkBytes > chunk.MaxSize || o.Size <= 0 {
		return nil, block.E("cache.new", dir, block.KindInvalid, fmt.Errorf("chunks of %d bytes of a volume of %d", o.ChunkBytes, o.Size))
	}
	c := &Cache{opt: o, shift: uint(bits.TrailingZeros(uint(o.ChunkBytes))), mem: o.Memory}
	if c.mem == nil {
		c.mem = NewMemory(o.MemoryBytes)
	}
	c.owner = c.mem.owners.Add(1)
	c.bufs.New = func() any { b := make([]byte, o.ChunkBytes); return &b }
	if o.ScratchBytes >= int64(o.ChunkBytes) {
		if err := fs.MkdirAll(dir); err != nil {
			return nil, block.E("cache.new", dir, 0, err)
		}
		name := path.Join(dir, "scratch")
		f, err := fs.Open(name, disk.Write|disk.Create|disk.Trunc)
		if err != nil {
			return nil, block.E("cache.new", name, 0, err)
		}
		c.scratch = newScratch(f, c.shift, min(o.ScratchBytes, o.Size+int64(o.ChunkBytes)-1))
	}
	return c, nil
}

// ReadAt fills p with the chunk's bytes at off and says whether it could. On
// false, p's content is undefined.
func (c *Cache) ReadAt(p []byte, i int64, off int) bool {
	if off < 0 || off+len(p) > c.opt.ChunkBytes {
		return false
	}
	if c.mem.read(key{c.owner, i}, p, off) {
		c.memoryHits.Add(1)
		return true
	}
	if c.scratch != nil && c.readScratch(p, i, off) {
		c.scratchHits.Add(1)
		return true
	}
	c.misses.Add(1)
	return false
}

// readScratch reads from the slot what p needs, or, to promote the chunk to
// memory on its second touch, all of it.
func (c *Cache) readScratch(p []byte, i int64, off int) bool {
	s := c.scratch
	var sums [256]uint32
	b0, b1 := off>>crcShift, (off+len(p)+1<<crcShift-1)>>crcShift
	promote := int64(c.opt.ChunkBytes) <= c.mem.shards[0].budget && s.touched(i)
	if promote {
		b0, b1 = 0, s.crcs
	}
	f, ok := s.find(i, b0, b1, &sums)
	if !ok || off+len(p) > f.length {
		return false
	}
	lo, hi := b0<<crcShift, min(b1<<crcShift, f.length)
	b, buf := p, (*[]byte)(nil)
	if lo != off || hi != off+len(p) {
		buf = c.bufs.Get().(*[]byte)
		defer c.bufs.Put(buf)
		b = (*buf)[:hi-lo]
	}
	if !s.read(b, i, lo, f, &sums) {
		return false
	}
	if buf != nil {
		copy(p, b[off-lo:])
	}
	if promote {
		c.promote(i, b, f)
	}
	return true
}

// promote takes a chunk that was read from slot f into memory. A Drop that came
// meanwhile has to win, so the slot is looked at once more.
func (c *Cache) promote(i int64, plain []byte, f found) {
	k := key{c.owner, i}
	if c.mem.put(k, plain, false) {
		c.promoted.Add(1)
	}
	if !c.scratch.same(f) {
		c.mem.drop(k)
	}
}

// Put offers the plain bytes of a chunk. With class Background it takes only
// room that is free, and in scratch only what is wanted Soon.
func (c *Cache) Put(i int64, plain []byte, f block.Flags) {
	if len(plain) == 0 || len(plain) > c.opt.ChunkBytes {
		return
	}
	background := f.Class() == block.Background
	if c.scratch == nil || c.scratch.isOff() {
		c.mem.put(key{c.owner, i}, plain, background)
		return
	}
	if background && !f.Has(block.Soon) {
		return
	}
	c.scratch.put(i, plain, background)
}

// Drop forgets a chunk.
func (c *Cache) Drop(i int64) {
	if c.scratch != nil {
		c.scratch.drop(i)
	}
	c.mem.drop(key{c.owner, i})
}

// Close gives up the memory and closes the scratch file. No other call may be under way.
func (c *Cache) Close() error {
	c.mem.dropOwner(c.owner)
	if c.scratch == nil {
		return nil
	}
	var err error
	if cerr := c.scratch.file.Close(); cerr != nil {
		err = errors.Join(err, block.E("cache.close", "scratch", 0, cerr))
	}
	return err
}
