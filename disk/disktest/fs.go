package disktest

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"forerun/disk"
)

// Op is a set of calls, for Fault and OnCall.
type Op uint32

// The calls that are counted. Close, Stat, List, Data and Free never are.
const (
	OpCreate   Op = 1 << iota // Open or Lock that makes or empties a file
	OpRename                  // Rename
	OpRemove                  // Remove
	OpMkdir                   // MkdirAll that makes a directory
	OpSyncDir                 // SyncDir
	OpWrite                   // WriteAt
	OpSync                    // Sync
	OpTruncate                // Truncate
	OpAllocate                // Allocate
	OpPunch                   // Punch
	OpRead                    // ReadAt: not one of Mutating

	// Mutating are all calls that change something or make it durable.
	Mutating = OpRead - 1
	// Syncs are the calls that make something durable.
	Syncs = OpSync | OpSyncDir
)

var opNames = [...]string{"create", "rename", "remove", "mkdir", "syncdir", "write", "sync", "truncate", "allocate", "punch", "read"}

// String names the calls, joined by "+".
func (o Op) String() string {
	var s []string
	for i, n := range opNames {
		if o&(1<<i) != 0 {
			s = append(s, n)
		}
	}
	return strings.Join(s, "+")
}

// Fault says which call fails and how.
type Fault struct {
	At      int64  // the At-th call of Ops from now on, the first is 1
	Ops     Op     // 0 means Mutating
	Path    string // only calls on this path count; "" means any
	Err     error  // usually a syscall.Errno; it is wrapped in an fs.PathError
	Lasting bool   // all later calls of Ops fail too
}

// FS is a disk.FS in memory. The zero value is not usable; see New.
type FS struct {
	mu       sync.Mutex
	rnd      *rand.Rand
	names    map[string]*inode // files as seen now
	platter  map[string]*inode // files whose names are durable
	changes  []change          // of names, not yet durable
	dirs     map[string]bool
	locks    map[*inode]bool
	dead     error
	nextID   int64
	used     int64 // pages
	capacity int64 // pages, 0 for no limit
	calls    int64 // mutating calls
	syncs    int
	writes   uint64
	fault    Fault
	faulted  int64 // calls that counted for fault
	trace    []step
	onSync   func(int)
	onCall   func(int64, Op)
}

// change is a change of one name or, for a rename, two.
type change struct {
	name  string
	to    *inode // nil: removed
	from  string // for a rename: the name that goes
	moved bool
}

// step is one line of the trace.
type step struct {
	op     Op
	a, b   string
	off, n int64
	err    error
}

const maxTrace = 1 << 16

var _ disk.FS = (*FS)(nil)

// New makes an empty file system with the directories "/" and ".". seed
// decides what power cuts keep.
func New(seed uint64) *FS {
	return &FS{
		rnd: rand.New(rand.NewPCG(seed, 0x666f726572756e)), names: map[string]*inode{}, platter: map[string]*inode{},
		dirs: map[string]bool{"/": true, ".": true}, locks: map[*inode]bool{},
	}
}

// Crash cuts the power: it returns the file system as the platter might hold
// it, chosen by the seed. The old one and its files fail from now on.
func (f *FS) Crash() *FS {
	f.mu.Lock()
	defer f.mu.Unlock()
	g := f.image(f.rnd.Uint64())
	f.die()
	return g
}

// Image returns what Crash might return, chosen by seed, and leaves the file
// system alive. It may be called from a hook.
func (f *FS) Image(seed uint64) *FS {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.image(seed)
}

// Kill kills the process: every write is kept, though a later Crash can still
// lose it, and locks are released. The old FS and its files fail from now on.
// Capacity is kept; faults, hooks, counts and trace begin anew.
func (f *FS) Kill() *FS {
	f.mu.Lock()
	defer f.mu.Unlock()
	g := New(f.rnd.Uint64())
	g.names, g.platter, g.changes, g.dirs = f.names, f.platter, f.changes, f.dirs
	g.nextID, g.capacity = f.nextID, f.capacity
	for _, n := range g.inodes() {
		n.links = 0
	}
	for _, n := range g.names {
		n.links++
	}
	for _, n := range g.inodes() {
		if n.links > 0 {
			g.used += n.used
		}
	}
	f.names, f.platter, f.changes, f.dirs = nil, nil, nil, nil
	f.die()
	return g
}

func (f *FS) inodes() map[int64]*inode {
	all := map[int64]*inode{}
	for _, n := range f.names {
		all[n.id] = n
	}
	for _, n := range f.platter {
		all[n.id] = n
	}
	for _, c := range f.changes {
		if c.to != nil {
			all[c.to.id] = c.to
		}
	}
	return all
}

func (f *FS) die() {
	f.dead = syscall.ESHUTDOWN
	f.names, f.platter, f.changes, f.dirs = nil, nil, nil, nil
}

func (f *FS) image(seed uint64) *FS {
	if f.dead != nil {
		panic("disktest: image of a file system that crashed already")
	}
	r := rand.New(rand.NewPCG(seed, 1))
	g := New(r.Uint64())
	g.capacity, g.nextID = f.capacity, f.nextID
	maps.Copy(g.dirs, f.dirs)
	names := maps.Clone(f.platter)
	stopped := map[string]bool{}
	luck := r.IntN(4)
	for _, c := range f.changes {
		happens := luck == 1 || luck > 1 && r.IntN(2) == 0
		if !happens || stopped[c.name] || c.moved && stopped[c.from] {
			stopped[c.name] = true
			if c.moved {
				stopped[c.from] = true
			}
			continue
		}
		c.apply(names)
	}
	made := map[int64]*inode{}
	for _, p := range slices.Sorted(maps.Keys(names)) {
		old := names[p]
		n := made[old.id]
		if n == nil {
			n = old.afterPowerCut(r)
			made[old.id] = n
			g.used += n.used
		}
		n.links++
		g.names[p], g.platter[p] = n, n
	}
	return g
}

func (c change) apply(names map[string]*inode) {
	if c.moved {
		delete(names, c.from)
	}
	if c.to == nil {
		delete(names, c.name)
	} else {
		names[c.name] = c.to
	}
}

// Fail arranges a fault; a later call replaces it, the zero Fault ends it.
func (f *FS) Fail(fault Fault) {
	if fault.Ops == 0 {
		fault.Ops = Mutating
	}
	if fault.Path != "" {
		fault.Path = path.Clean(fault.Path)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fault, f.faulted = fault, 0
}

// FailAt makes the n-th mutating call from now on fail once with err.
func (f *FS) FailAt(n int64, err error) { f.Fail(Fault{At: n, Err: err}) }

// Failed says whether the arranged fault has happened.
func (f *FS) Failed() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.fault.At > 0 && f.faulted >= f.fault.At
}

// Calls is how many mutating calls there were.
func (f *FS) Calls() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls
}

// OnSync sets a hook that is called before each Sync and SyncDir takes effect;
// n counts them from 1. It may call Image or Crash.
func (f *FS) OnSync(hook func(n int)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.onSync = hook
}

// OnCall sets a hook that is called before each mutating call takes effect;
// n counts them from 1. It may call Image or Crash.
func (f *FS) OnCall(hook func(n int64, op Op)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.onCall = hook
}

// SetCapacity limits the space that files take, in bytes; 0 means no limit.
// Writes beyond it store what fits and fail with ENOSPC.
func (f *FS) SetCapacity(bytes int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.capacity = (bytes + pageSize - 1) / pageSize
}

// Used is the space that files take, in bytes, in whole pages of 4 KiB.
func (f *FS) Used() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.used * pageSize
}

// Flip inverts the byte at off of a file, as it is read and on the platter:
// bit rot. The file must be there and longer than off.
func (f *FS) Flip(name string, off int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := f.names[path.Clean(name)]
	if n == nil || off < 0 || off >= n.size {
		panic(fmt.Sprintf("disktest: no byte %d in %s to flip", off, name))
	}
	i, at := off/pageSize, off%pageSize
	c := *orZero(n.pages[i])
	c[at] ^= 0xff
	if n.pages[i] == nil {
		n.used++
		f.used++
	}
	n.pages[i] = &c
	if u := n.dirty[i]; u != nil {
		o := *orZero(u.old)
		o[at] ^= 0xff
		u.old = &o
	}
}

// Trace returns the mutating calls so far, one a line, oldest first: the name
// of the call, the path, then offset+length or the new name, and the error if
// there was one. Only the first 65536 are kept.
func (f *FS) Trace() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var b strings.Builder
	for _, s := range f.trace {
		fmt.Fprintf(&b, "%s %s", s.op, s.a)
		switch {
		case s.op == OpRename:
			fmt.Fprintf(&b, " -> %s", s.b)
		case s.op&(OpWrite|OpAllocate|OpPunch) != 0:
			fmt.Fprintf(&b, " %d+%d", s.off, s.n)
		case s.op == OpTruncate:
			fmt.Fprintf(&b, " %d", s.off)
		}
		if s.err != nil {
			fmt.Fprintf(&b, ": %v", s.err)
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// begin counts a call, runs the hooks and takes the lock. It returns the
// arranged error if this call is to fail; mu is held in any case.
func (f *FS) begin(s step) error {
	f.mu.Lock()
	if f.dead != nil {
		return f.dead
	}
	if s.op&Mutating != 0 {
		f.calls++
		n, onCall, onSync, syncs := f.calls, f.onCall, f.onSync, 0
		if s.op&Syncs != 0 {
			f.syncs++
			syncs = f.syncs
		}
		if onCall != nil || onSync != nil && syncs > 0 {
			f.mu.Unlock()
			if onCall != nil {
				onCall(n, s.op)
			}
			if onSync != nil && syncs > 0 {
				onSync(syncs)
			}
			f.mu.Lock()
			if f.dead != nil { // the hook pulled the plug
				return f.dead
			}
		}
	}
	if f.fault.At > 0 && s.op&f.fault.Ops != 0 && (f.fault.Path == "" || f.fault.Path == s.a || f.fault.Path == s.b) {
		f.faulted++
		if f.faulted == f.fault.At || f.faulted > f.fault.At && f.fault.Lasting {
			s.err = f.fault.Err
		}
	}
	if s.op&Mutating != 0 && len(f.trace) < maxTrace {
		f.trace = append(f.trace, s)
	}
	return s.err
}

func pathErr(op, p string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: op, Path: p, Err: err}
}

// Open is disk.FS.Open.
func (f *FS) Open(name string, mode disk.Mode) (disk.File, error) {
	p := path.Clean(name)
	if mode&disk.Write == 0 {
		mode = disk.Read
	}
	f.mu.Lock()
	n := f.names[p]
	changes := mode&disk.Write != 0 && (n == nil && mode&disk.Create != 0 || n != nil && mode&disk.Trunc != 0)
	f.mu.Unlock()
	var err error
	if changes {
		err = f.begin(step{op: OpCreate, a: p})
	} else {
		f.mu.Lock()
		err = f.dead
	}
	defer f.mu.Unlock()
	if err != nil {
		return nil, pathErr("open", name, err)
	}
	h, err := f.open(p, mode)
	return h, pathErr("open", name, err)
}

func (f *FS) open(p string, mode disk.Mode) (disk.File, error) {
	if f.dirs[p] {
		if mode&disk.Create != 0 && mode&disk.Excl != 0 {
			return nil, syscall.EEXIST
		}
		return nil, syscall.EISDIR
	}
	if !f.dirs[path.Dir(p)] {
		return nil, f.missing(p)
	}
	n := f.names[p]
	switch {
	case n == nil && mode&disk.Create == 0:
		return nil, syscall.ENOENT
	case n == nil:
		f.nextID++
		n = newInode(f.nextID)
		n.links++
		f.names[p] = n
		f.changes = append(f.changes, change{name: p, to: n})
	case mode&disk.Create != 0 && mode&disk.Excl != 0:
		return nil, syscall.EEXIST
	case mode&disk.Trunc != 0:
		f.account(n, func() { n.truncate(0, f.salt()) })
	}
	n.links++
	return &file{fs: f, n: n, name: p, write: mode&disk.Write != 0}, nil
}

// missing is the error for a path that leads nowhere: ENOTDIR when a file
// stands where a directory should, else ENOENT.
func (f *FS) missing(p string) error {
	for q := path.Dir(p); !f.dirs[q]; q = path.Dir(q) {
		if f.names[q] != nil {
			return syscall.ENOTDIR
		}
	}
	return syscall.ENOENT
}

func (f *FS) salt() uint64 { f.writes++; return f.writes * 0xd1342543de82ef95 }

// account runs what changes an inode's space and adds the difference up.
func (f *FS) account(n *inode, do func()) {
	was := n.used
	do()
	f.used += n.used - was
	n.mtime = time.Now()
}

func (f *FS) unlink(n *inode) {
	if n.links--; n.links == 0 {
		f.used -= n.used
	}
}

// Rename is disk.FS.Rename. It moves files only.
func (f *FS) Rename(from, to string) error {
	a, b := path.Clean(from), path.Clean(to)
	err := f.begin(step{op: OpRename, a: a, b: b})
	defer f.mu.Unlock()
	n := f.names[a]
	switch {
	case err != nil:
	case f.dirs[a] || f.dirs[b]:
		err = syscall.EISDIR
	case !f.dirs[path.Dir(a)]:
		err = f.missing(a)
	case !f.dirs[path.Dir(b)]:
		err = f.missing(b)
	case n == nil:
		err = syscall.ENOENT
	case a == b:
		return nil
	}
	if err != nil {
		return pathErr("rename", from, err)
	}
	if old := f.names[b]; old != nil {
		f.unlink(old)
	}
	c := change{name: b, to: n, from: a, moved: true}
	f.changes = append(f.changes, c)
	c.apply(f.names)
	return nil
}

// Remove is disk.FS.Remove.
func (f *FS) Remove(name string) error {
	p := path.Clean(name)
	err := f.begin(step{op: OpRemove, a: p})
	defer f.mu.Unlock()
	if err != nil {
		return pathErr("remove", name, err)
	}
	if f.dirs[p] {
		if len(f.list(p)) > 0 {
			return pathErr("remove", name, syscall.ENOTEMPTY)
		}
		f.commit(p)
		delete(f.dirs, p)
		return nil
	}
	n := f.names[p]
	if n == nil {
		return pathErr("remove", name, f.missing(p))
	}
	f.unlink(n)
	c := change{name: p}
	f.changes = append(f.changes, c)
	c.apply(f.names)
	return nil
}

// MkdirAll is disk.FS.MkdirAll. The directories are durable at once.
func (f *FS) MkdirAll(name string) error {
	p := path.Clean(name)
	f.mu.Lock()
	there := f.dirs[p]
	f.mu.Unlock()
	if there {
		return nil
	}
	err := f.begin(step{op: OpMkdir, a: p})
	defer f.mu.Unlock()
	if err != nil {
		return pathErr("mkdir", name, err)
	}
	for q := p; !f.dirs[q]; q = path.Dir(q) {
		if f.names[q] != nil {
			return pathErr("mkdir", name, syscall.ENOTDIR)
		}
	}
	for q := p; !f.dirs[q]; q = path.Dir(q) {
		f.dirs[q] = true
	}
	return nil
}

func (f *FS) list(p string) []string {
	var out []string
	for q := range f.names {
		if path.Dir(q) == p {
			out = append(out, path.Base(q))
		}
	}
	for q := range f.dirs {
		if q != p && path.Dir(q) == p {
			out = append(out, path.Base(q))
		}
	}
	slices.Sort(out)
	return out
}

// List is disk.FS.List.
func (f *FS) List(name string) ([]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := path.Clean(name)
	switch {
	case f.dead != nil:
		return nil, pathErr("open", name, f.dead)
	case f.names[p] != nil:
		return nil, pathErr("open", name, syscall.ENOTDIR)
	case !f.dirs[p]:
		return nil, pathErr("open", name, f.missing(p))
	}
	return f.list(p), nil
}

// Stat is disk.FS.Stat.
func (f *FS) Stat(name string) (disk.Stat, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := path.Clean(name)
	switch {
	case f.dead != nil:
		return disk.Stat{}, pathErr("stat", name, f.dead)
	case f.dirs[p]:
		return disk.Stat{Dir: true}, nil
	case f.names[p] == nil:
		return disk.Stat{}, pathErr("stat", name, f.missing(p))
	}
	return f.names[p].stat(), nil
}

func (n *inode) stat() disk.Stat {
	return disk.Stat{Size: n.size, Allocated: n.used * pageSize, ModTime: n.mtime}
}

// SyncDir is disk.FS.SyncDir.
func (f *FS) SyncDir(name string) error {
	p := path.Clean(name)
	err := f.begin(step{op: OpSyncDir, a: p})
	defer f.mu.Unlock()
	if err == nil && !f.dirs[p] {
		err = f.missing(p)
	}
	if err != nil {
		return pathErr("sync", name, err)
	}
	f.commit(p)
	return nil
}

// commit makes durable the changes of names in dir and, since changes of one
// name keep their order, those before them that they build on.
func (f *FS) commit(dir string) {
	needed := map[string]bool{}
	take := make([]bool, len(f.changes))
	for i := len(f.changes) - 1; i >= 0; i-- {
		c := f.changes[i]
		if path.Dir(c.name) == dir || needed[c.name] || c.moved && (path.Dir(c.from) == dir || needed[c.from]) {
			take[i] = true
			needed[c.name] = true
			if c.moved {
				needed[c.from] = true
			}
		}
	}
	var rest []change
	for i, c := range f.changes {
		if take[i] {
			c.apply(f.platter)
		} else {
			rest = append(rest, c)
		}
	}
	f.changes = rest
}

// Lock is disk.FS.Lock.
func (f *FS) Lock(name string) (disk.File, error) {
	h, err := f.Open(name, disk.Write|disk.Create)
	if err != nil {
		if pe := (*fs.PathError)(nil); errors.As(err, &pe) {
			pe.Op = "lock"
		}
		return nil, err
	}
	o := h.(*file)
	f.mu.Lock()
	busy := f.locks[o.n]
	if !busy && f.dead == nil {
		f.locks[o.n] = true
		o.locks = true
	}
	f.mu.Unlock()
	if busy {
		h.Close()
		return nil, pathErr("lock", name, syscall.EBUSY)
	}
	return h, nil
}

// Free is disk.FS.Free: what SetCapacity leaves, or 1 PiB.
func (f *FS) Free(string) (int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.dead != nil {
		return 0, f.dead
	}
	if f.capacity == 0 {
		return 1 << 50, nil
	}
	return max(0, f.capacity-f.used) * pageSize, nil
}
