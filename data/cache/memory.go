package cache

import (
	"math/bits"
	"sync"
	"sync/atomic"
)

// key names a chunk of one of the volumes that share a Memory.
type key struct {
	owner uint64
	chunk int64
}

// Memory is a bounded set of plain chunks. Several volumes may share it.
type Memory struct {
	shards []shard
	owners atomic.Uint64
}

// shardBytes is the least budget of a shard: fewer, larger shards keep the
// queues long enough to mean something.
const shardBytes = 16 << 20

// NewMemory makes a Memory that holds up to budget bytes of chunks. With 0
// it holds nothing.
func NewMemory(budget int64) *Memory {
	n := 1
	for n < 64 && budget/int64(2*n) >= shardBytes {
		n *= 2
	}
	m := &Memory{shards: make([]shard, n)}
	for i := range m.shards {
		m.shards[i].budget = budget / int64(n)
		m.shards[i].index = make(map[key]*entry)
		m.shards[i].ghosts = make(map[key]*ghost)
	}
	return m
}

// Bytes is how many bytes of chunks are held, all volumes together.
func (m *Memory) Bytes() (n int64) {
	for i := range m.shards {
		s := &m.shards[i]
		s.mu.RLock()
		n += s.used
		s.mu.RUnlock()
	}
	return n
}

// entry is a chunk. It is in one of the two queues of its shard.
type entry struct {
	key        key
	data       []byte
	freq       atomic.Int32 // touches, up to maxFreq; lowered by the queue
	main       bool
	prev, next *entry
}

const maxFreq = 3

// ghost remembers that a chunk left the small queue untouched.
type ghost struct {
	key        key
	prev, next *ghost
}

type shard struct {
	mu     sync.RWMutex
	budget int64
	used   int64
	small  queue
	main   queue
	index  map[key]*entry
	ghosts map[key]*ghost
	oldest *ghost // of a ring
	spare  [][]byte
	_      [32]byte
}

// queue is first in, first out; head leaves next.
type queue struct {
	head, tail *entry
	bytes      int64
}

func (q *queue) push(e *entry) {
	e.prev, e.next = q.tail, nil
	if q.tail == nil {
		q.head = e
	} else {
		q.tail.next = e
	}
	q.tail = e
	q.bytes += int64(len(e.data))
}

func (q *queue) remove(e *entry) {
	if e.prev == nil {
		q.head = e.next
	} else {
		e.prev.next = e.next
	}
	if e.next == nil {
		q.tail = e.prev
	} else {
		e.next.prev = e.prev
	}
	e.prev, e.next = nil, nil
	q.bytes -= int64(len(e.data))
}

func (m *Memory) shard(k key) *shard {
	h := (uint64(k.chunk) + k.owner*0x9e3779b97f4a7c15) * 0xbf58476d1ce4e5b9
	return &m.shards[h>>(64-uint(bits.Len(uint(len(m.shards))-1)))&uint64(len(m.shards)-1)]
}

// read fills p with the chunk's bytes at off if they are here.
func (m *Memory) read(k key, p []byte, off int) bool {
	s := m.shard(k)
	s.mu.RLock()
	e := s.index[k]
	if e == nil || off+len(p) > len(e.data) {
		s.mu.RUnlock()
		return false
	}
	copy(p, e.data[off:])
	if n := e.freq.Load(); n < maxFreq {
		e.freq.Store(n + 1) // a lost touch among many does not matter
	}
	s.mu.RUnlock()
	return true
}

// put keeps a copy of plain if it can; in the background, only in room that
// nobody has. It says whether it is here now.
func (m *Memory) put(k key, plain []byte, background bool) bool {
	s := m.shard(k)
	n := int64(len(plain))
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.index[k] != nil:
		return true
	case n > s.budget || background && s.used+n > s.budget:
		return false
	}
	for s.used+n > s.budget {
		s.evict()
	}
	e := &entry{key: k, data: append(s.buffer(len(plain)), plain...)}
	if g := s.ghosts[k]; g != nil && !background {
		s.unghost(g)
		e.main = true
		s.main.push(e)
	} else {
		s.small.push(e)
	}
	s.index[k] = e
	s.used += n
	return true
}

func (s *shard) buffer(n int) []byte {
	for len(s.spare) > 0 {
		b := s.spare[len(s.spare)-1]
		s.spare = s.spare[:len(s.spare)-1]
		if cap(b) == n {
			return b[:0]
		}
	}
	return make([]byte, 0, n)
}

// smallShare is the part of the budget that the small queue has: a tenth.
const smallShare = 10

// evict takes one chunk out. The caller holds mu and knows there is one.
func (s *shard) evict() {
	for {
		if e := s.small.head; e != nil && (s.small.bytes > s.budget/smallShare || s.main.head == nil) {
			s.small.remove(e)
			if e.freq.Load() > 1 || e.freq.Load() > 0 && s.main.bytes+int64(len(e.data)) <= s.budget/2 {
				e.freq.Store(0)
				e.main = true
				s.main.push(e)
				continue
			}
			s.forget(e)
			s.addGhost(e.key)
			return
		}
		e := s.main.head
		s.main.remove(e)
		if n := e.freq.Load(); n > 0 {
			e.freq.Store(n - 1)
			s.main.push(e)
			continue
		}
		s.forget(e)
		return
	}
}

// forget drops an entry that is in no queue any more.
func (s *shard) forget(e *entry) {
	delete(s.index, e.key)
	s.used -= int64(len(e.data))
	if len(s.spare) < 8 {
		s.spare = append(s.spare, e.data)
	}
	e.data = nil
}

// addGhost remembers k, and forgets the oldest when there are as many as chunks.
func (s *shard) addGhost(k key) {
	for len(s.ghosts) > 0 && len(s.ghosts) >= max(len(s.index), 16) {
		s.unghost(s.oldest)
	}
	g := &ghost{key: k}
	if s.oldest == nil {
		g.prev, g.next = g, g
		s.oldest = g
	} else {
		g.prev, g.next = s.oldest.prev, s.oldest
		g.prev.next, g.next.prev = g, g
	}
	s.ghosts[k] = g
}

func (s *shard) unghost(g *ghost) {
	delete(s.ghosts, g.key)
	if g.next == g {
		s.oldest = nil
		return
	}
	g.prev.next, g.next.prev = g.next, g.prev
	if s.oldest == g {
		s.oldest = g.next
	}
}

func (m *Memory) drop(k key) {
	s := m.shard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dropLocked(k)
}

func (s *shard) dropLocked(k key) {
	e := s.index[k]
	if e == nil {
		return
	}
	if e.main {
		s.main.remove(e)
	} else {
		s.small.remove(e)
	}
	s.forget(e)
}

// dropOwner forgets all chunks of one volume.
func (m *Memory) dropOwner(owner uint64) {
	for i := range m.shards {
		s := &m.shards[i]
		s.mu.Lock()
		for k := range s.index {
			if k.owner == owner {
				s.dropLocked(k)
			}
		}
		s.mu.Unlock()
	}
}
