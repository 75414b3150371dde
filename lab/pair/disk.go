package pair

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"forerun/lab/load"
	"forerun/lab/oracle"
)

// disk is a source disk whose history an oracle knows, and the load on it.
type disk struct {
	k      *run
	name   string // of the volume
	source string
	size   int64
	hist   *oracle.History

	client  *load.Client
	resting bool // nothing was written for a while before the end
	stop    context.CancelFunc
	done    chan error

	mu    sync.Mutex
	stats load.Stats // guarded by mu: of loads that have ended
}

// newDisk makes an untouched source.
func (k *run) newDisk(name string, size int64) (*disk, error) {
	d := &disk{k: k, name: name, source: k.path(name + ".raw"), size: size, hist: oracle.New(k.Seed, size)}
	k.atEnd(func() error {
		d.leave()
		return nil
	})
	return d, oracle.WriteBase(d.source, k.Seed, size)
}

func (d *disk) volume() Volume { return Volume{d.name, d.source} }

// dial connects to the volume at n, from now on.
func (d *disk) dial(n *Node) (err error) {
	ctx, cancel := context.WithTimeout(d.k.ctx, time.Minute)
	defer cancel()
	d.leave()
	if d.client, err = load.Dial(ctx, n.Socket, d.name); err != nil {
		return errors.Join(err, n.Trouble("was asked for its export"))
	}
	if d.client.Size != d.size {
		return fmt.Errorf("the export has %d bytes, the source %d", d.client.Size, d.size)
	}
	return nil
}

// leave ends the load and the connection.
func (d *disk) leave() {
	if d.client != nil {
		d.rest()
		d.client.Close()
		d.client = nil
	}
}

// work begins the load in the background.
func (d *disk) work(c load.Config) {
	ctx, cancel := context.WithCancel(d.k.ctx)
	d.stop, d.done = cancel, make(chan error, 1)
	c.Seed = d.k.rng.Uint64()
	if c.Depth == 0 {
		c.Depth = 6
	}
	go func(client *load.Client, done chan error) {
		st, err := load.Run(ctx, client, d.hist, c)
		d.mu.Lock()
		d.stats.Writes += st.Writes + st.Zeros
		d.stats.Reads += st.Reads
		d.stats.Flushes += st.Flushes
		d.stats.Bytes += st.Bytes
		d.stats.Longest = max(d.stats.Longest, st.Longest)
		d.mu.Unlock()
		done <- err
	}(d.client, d.done)
}

// rest ends the load and says how it went.
func (d *disk) rest() error {
	if d.stop == nil {
		return nil
	}
	d.stop()
	err := <-d.done
	d.stop = nil
	if err != nil {
		return fmt.Errorf("the workload on %s: %w", d.name, err)
	}
	return nil
}

// failed says whether the load has ended by itself, and how.
func (d *disk) failed() error {
	select {
	case err := <-d.done:
		d.done <- err
		return errors.Join(errors.New("the load ended by itself"), err)
	default:
		return nil
	}
}

// judge reads the whole volume through the connection.
func (d *disk) judge(what string) error {
	if err := d.hist.Verify(d.client); err != nil {
		return fmt.Errorf("volume %s, %s: %w", d.name, what, err)
	}
	return nil
}

// judgeFile compares a file with the newest state of the volume.
func (d *disk) judgeFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err == nil && st.Size() != d.size {
		err = fmt.Errorf("%s has %d bytes, the volume %d", path, st.Size(), d.size)
	}
	if err != nil {
		return err
	}
	return d.hist.Verify(f)
}

// judgeCut says which moment of the volume the source shows.
func (d *disk) judgeCut() (oracle.Cut, error) {
	f, err := os.Open(d.source)
	if err != nil {
		return oracle.Cut{}, err
	}
	defer f.Close()
	c, err := d.hist.JudgeCut(f)
	if err != nil {
		return c, fmt.Errorf("the source of %s: %w", d.name, err)
	}
	return c, nil
}

// report notes what the loads did.
func (d *disk) report() {
	h := d.hist.Stats()
	d.k.Measure(d.name+": writes acknowledged", float64(h.Acked), "")
	d.k.Measure(d.name+": flushes", float64(h.Flushes), "")
	d.k.Measure(d.name+": sectors judged", float64(h.Checked), "")
}

// wrong says whether err is about wrong bytes, not about a lost connection.
func wrong(err error) bool {
	var w *oracle.Wrong
	return errors.As(err, &w)
}
