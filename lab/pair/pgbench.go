package pair

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// PgbenchOptions are what Pgbench needs beside Options.
type PgbenchOptions struct {
	Options
	// Clients of the database, 0 is 4.
	Clients int
	// Plain puts qemu-nbd in the place of the pair and kills nobody: it shows
	// that the chain above it works, and how fast.
	Plain bool
}

// bestFailover is the longest stall that clients may see.
const bestFailover = 3.0

// Pgbench runs PostgreSQL on a pair and kills the primary frontend N times.
func Pgbench(ctx context.Context, o PgbenchOptions, r Report) (err error) {
	if o.Clients == 0 {
		o.Clients = 4
	}
	k, err := begin(ctx, o.Options, r)
	if err != nil {
		return err
	}
	defer k.end(&err)
	b := &bankRun{run: k, clients: o.Clients}
	if err := b.prepare(); err != nil {
		return fmt.Errorf("prepare the source: %w", err)
	}
	if o.Plain {
		return b.plain()
	}
	return b.replicated()
}

type bankRun struct {
	*run
	clients int
	source  string
	mount   *Mount
	db      *Cluster
	bank    *bank
}

// prepare makes a database at the old home: a source disk with ext4 and a
// filled, closed cluster on it.
func (b *bankRun) prepare() error {
	b.source = b.path("db.raw")
	f, err := os.Create(b.source)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(1<<30), f.Close()); err != nil {
		return err
	}
	if _, err := output(b.ctx, "mkfs.ext4", "-q", "-F", b.source); err != nil {
		return err
	}
	m, err := MountFile(b.ctx, b.source)
	if err != nil {
		return err
	}
	b.atEnd(func() error { return m.Close() })
	if err := b.cluster(m); err != nil {
		return err
	}
	if err := b.db.Init(b.ctx); err != nil {
		return err
	}
	if err := b.db.Start(b.ctx); err != nil {
		return err
	}
	b.bank, err = newBank(b.ctx, b.db, 2, b.clients, b.path("commits"))
	if err != nil {
		return err
	}
	return errors.Join(b.db.Stop(false), m.Close())
}

// cluster finds the database on a mount.
func (b *bankRun) cluster(m *Mount) (err error) {
	b.mount = m
	if b.db, err = NewCluster(filepath.Join(m.Dir, "db"), b.path("postgres")); err != nil {
		return err
	}
	if b.bank != nil {
		b.bank.db = b.db
	}
	db := b.db
	b.atEnd(func() error { return db.Stop(true) })
	return nil
}

// open mounts the export and starts the database on it.
func (b *bankRun) open(uri string) error {
	m, err := MountExport(b.ctx, uri, b.path("nbdfuse.log"))
	if err != nil {
		return err
	}
	b.atEnd(func() error { return m.Close() })
	if err := b.cluster(m); err != nil {
		return err
	}
	return b.db.Start(b.ctx)
}

// during runs the clients while f does something else.
func (b *bankRun) during(f func() error) error {
	ctx, stop := context.WithCancel(b.ctx)
	defer stop()
	done := make(chan error, 1)
	go func() { done <- b.bank.run(ctx, b.rng.Uint64()) }()
	err := f()
	stop()
	if e := <-done; e != nil {
		err = errors.Join(err, fmt.Errorf("a client of the database saw an error: %w", e))
	}
	return err
}

// verify is the audit of the running database, then of one that had to recover,
// and both programs that look for damage.
func (b *bankRun) verify() error {
	if err := b.bank.audit(b.ctx); err != nil {
		return fmt.Errorf("audit: %w", err)
	}
	if err := b.db.Stop(true); err != nil {
		return err
	}
	if err := b.mount.Detach(b.ctx); err != nil {
		return err
	}
	if err := b.mount.Check(b.ctx); err != nil {
		return err
	}
	b.Check("e2fsck finds nothing", true, "")
	if err := b.mount.Attach(b.ctx); err != nil {
		return err
	}
	if err := b.db.Start(b.ctx); err != nil {
		return err
	}
	if err := b.bank.audit(b.ctx); err != nil {
		return fmt.Errorf("audit after recovery: %w", err)
	}
	b.Check("every acknowledged commit is there", true, fmt.Sprintf("%d commits, before and after recovery", b.bank.commits()))
	if err := b.bank.amcheck(b.ctx); err != nil {
		return err
	}
	b.Check("pg_amcheck finds nothing", true, "")
	return errors.Join(b.db.Stop(false), b.mount.Close())
}

func (b *bankRun) report(took time.Duration) {
	n := float64(b.bank.commits())
	b.Measure("commits acknowledged", n, "")
	b.Measure("commits a second", n/took.Seconds(), "1/s")
	b.Measure("commit, median", b.bank.percentile(0.5).Seconds()*1e3, "ms")
	b.Measure("commit, p99", b.bank.percentile(0.99).Seconds()*1e3, "ms")
	b.AtMost("longest commit", b.bank.longest.Seconds(), bestFailover, "s")
}

func (b *bankRun) plain() error {
	server, err := b.peerServer("qemu-nbd", "--format=raw", "--persistent", "--shared=8", "--cache=writeback", "--aio=threads",
		"--export-name=db", "--socket="+b.path("qemu.sock"), b.source)
	if err != nil {
		return err
	}
	if err := server.Until(b.ctx, 10*time.Second, "listening", func() bool { _, err := os.Stat(b.path("qemu.sock")); return err == nil }); err != nil {
		return err
	}
	if err := b.open("nbd+unix:///db?socket=" + b.path("qemu.sock")); err != nil {
		return err
	}
	start := time.Now()
	if err := b.during(func() error { b.sleep(time.Duration(max(b.N, 1)) * time.Second); return nil }); err != nil {
		return err
	}
	b.report(time.Since(start))
	return b.verify()
}

func (b *bankRun) replicated() error {
	p, err := b.pair(Config{Volumes: []Volume{{"db", b.source}}})
	if err != nil {
		return err
	}
	if err := p.Start(b.ctx); err != nil {
		return err
	}
	if err := b.open(p.Proxy.Export("db")); err != nil {
		return err
	}
	var sync, down time.Duration
	start := time.Now()
	err = b.during(func() error {
		for i := range b.N {
			// Every client goes on before the next one, so that no transaction
			// adds up the stalls of several.
			if err := b.bank.progress(b.ctx, 5, time.Minute); err != nil {
				return err
			}
			b.sleep(b.between(500*time.Millisecond, 3*time.Second))
			primary, _, err := p.Primary(b.ctx, "db")
			if err != nil {
				return err
			}
			before := b.bank.commits()
			primary.Proc.Kill()
			d := b.between(0, 3*time.Second)
			down += d
			b.sleep(d)
			while := b.bank.commits() - before
			if err := primary.Start(b.ctx); err != nil {
				return err
			}
			took, err := p.WaitInSync(b.ctx, time.Minute)
			if err != nil {
				return err
			}
			sync = max(sync, took)
			b.Say("kill %d of %d: %s, away for %.1f s, %d commits meanwhile, in sync %.1f s after; longest commit so far %.2f s",
				i+1, b.N, primary.Name, d.Seconds(), while, took.Seconds(), b.bank.longest.Seconds())
		}
		b.sleep(time.Second)
		return b.ctx.Err()
	})
	if err != nil {
		return errors.Join(err, p.Words())
	}
	b.AtLeast("kills survived", float64(b.N), float64(b.N), "")
	b.Measure("longest time until both were in sync again", sync.Seconds(), "s")
	b.report(time.Since(start))
	if err := b.verify(); err != nil {
		return err
	}
	return p.Stop()
}
