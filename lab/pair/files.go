package pair

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// files is a busy directory: files that come, change their names and go, and a
// list that grows by one synced line at a time.
type files struct {
	dir string

	mu    sync.Mutex
	acked []time.Time // guarded by mu: when line i was synced
}

const listName = "list"

// run works until ctx ends or something fails.
func (f *files) run(ctx context.Context, seed uint64) error {
	rng := rand.New(rand.NewPCG(seed, 0x66696c65))
	list, err := os.OpenFile(filepath.Join(f.dir, listName), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer list.Close()
	for ctx.Err() == nil {
		f.mu.Lock()
		n := len(f.acked)
		f.mu.Unlock()
		if _, err := fmt.Fprintln(list, n); err != nil {
			return err
		}
		if err := list.Sync(); err != nil {
			return err
		}
		f.mu.Lock()
		f.acked = append(f.acked, time.Now())
		f.mu.Unlock()
		for range rng.IntN(5) {
			if err := f.churn(rng); err != nil {
				return err
			}
		}
		time.Sleep(time.Duration(rng.IntN(10)) * time.Millisecond)
	}
	return nil
}

func (f *files) churn(rng *rand.Rand) error {
	name := func() string {
		return filepath.Join(f.dir, fmt.Sprintf("d%d", rng.IntN(4)), fmt.Sprintf("f%d", rng.IntN(24)))
	}
	a, b := name(), name()
	for _, p := range []string{a, b} {
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			return err
		}
	}
	gone := func(err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	switch rng.IntN(4) {
	case 0:
		return gone(os.Remove(a))
	case 1:
		return gone(os.Rename(a, b))
	}
	p := make([]byte, rng.IntN(40_000))
	for i := range p {
		p[i] = byte(rng.Uint32())
	}
	return os.WriteFile(a, p, 0o644)
}

// synced is how many lines were synced, and when line i was.
func (f *files) synced(i int) (n int, at time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if i < len(f.acked) {
		at = f.acked[i]
	}
	return len(f.acked), at
}

// lines reads the list in another copy of the directory: how many whole lines
// it has. They must be the first ones, in order.
func lines(dir string) (n int, err error) {
	f, err := os.Open(filepath.Join(dir, listName))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for in := bufio.NewScanner(f); in.Scan(); n++ {
		if in.Text() != fmt.Sprint(n) {
			return n, fmt.Errorf("line %d of the list is %q", n, strings.ToValidUTF8(in.Text(), "?"))
		}
	}
	return n, nil
}

// fsDisk is a source with an ext4 file system, used through a pair.
type fsDisk struct {
	k      *run
	name   string
	source string
	mount  *Mount
	files  *files
	stop   context.CancelFunc
	done   chan error
}

func (k *run) newFS(name string, size int64) (*fsDisk, error) {
	d := &fsDisk{k: k, name: name, source: k.path(name + ".raw"), files: &files{}}
	f, err := os.Create(d.source)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		return nil, err
	}
	_, err = output(k.ctx, "mkfs.ext4", "-q", "-F", d.source)
	return d, err
}

func (d *fsDisk) volume() Volume { return Volume{d.name, d.source} }

// work mounts the volume at n and begins to work on it.
func (d *fsDisk) work(n *Node) (err error) {
	if d.mount, err = MountExport(d.k.ctx, n.Export(d.name), d.k.path("nbdfuse.log")); err != nil {
		return err
	}
	d.files.dir = d.mount.Dir
	ctx, cancel := context.WithCancel(d.k.ctx)
	d.stop, d.done = cancel, make(chan error, 1)
	seed := d.k.rng.Uint64()
	go func() { d.done <- d.files.run(ctx, seed) }()
	d.k.atEnd(func() error {
		d.lose()
		return nil
	})
	return nil
}

// rest ends the work and says how it went; the file system stays mounted.
func (d *fsDisk) rest() error {
	if d.stop == nil {
		return nil
	}
	d.stop()
	err := <-d.done
	d.stop = nil
	if err != nil {
		return fmt.Errorf("the file system on %s: %w", d.name, err)
	}
	return nil
}

// lose takes the mount away without a word to the file system, as a dying
// machine does.
func (d *fsDisk) lose() {
	if d.mount == nil {
		return
	}
	d.mount.fuse.Kill()
	d.rest()
	d.mount.clear()
	d.mount = nil
}

// copySource copies the source as it is to another file.
func (d *fsDisk) copySource() (string, error) {
	to := d.source + ".copy"
	_, err := output(d.k.ctx, "cp", "--sparse=always", d.source, to)
	return to, err
}

// judgeSource looks whether the file system on the source is whole, and how
// many lines of the list it has.
func (d *fsDisk) judgeSource() (n int, err error) {
	img, err := d.copySource()
	if err != nil {
		return 0, err
	}
	defer os.Remove(img)
	m, err := MountFile(d.k.ctx, img)
	if err != nil {
		return 0, fmt.Errorf("the source of %s cannot be mounted: %w", d.name, err)
	}
	n, err = lines(m.Dir)
	if err = errors.Join(err, m.Close()); err == nil {
		err = fsck(d.k.ctx, img)
	}
	if err != nil {
		return n, fmt.Errorf("the source of %s: %w", d.name, err)
	}
	return n, nil
}
