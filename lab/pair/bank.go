package pair

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"
)

// bank is pgbench's workload with clients that write down, in a file outside
// the database, each commit that was acknowledged.
type bank struct {
	db    *Cluster
	scale int

	mu       sync.Mutex
	file     *os.File
	record   *bufio.Writer
	acked    []int64 // guarded by mu: by client, how many of its commits were acknowledged
	latency  []time.Duration
	longest  time.Duration
	longWhen time.Time
}

// newBank fills the database. record is the file for acknowledged commits.
func newBank(ctx context.Context, db *Cluster, scale, clients int, record string) (*bank, error) {
	if _, err := db.Run(ctx, "pgbench", "--initialize", "--quiet", "--scale", strconv.Itoa(scale), "postgres"); err != nil {
		return nil, err
	}
	p, err := db.Connect(ctx)
	if err != nil {
		return nil, err
	}
	defer p.Close()
	if _, err := p.Query("CREATE TABLE commits (client int, seq bigint, PRIMARY KEY (client, seq)); CREATE EXTENSION amcheck"); err != nil {
		return nil, err
	}
	f, err := os.Create(record)
	if err != nil {
		return nil, err
	}
	return &bank{db: db, scale: scale, file: f, record: bufio.NewWriter(f), acked: make([]int64, clients)}, nil
}

// run moves money with all clients until ctx ends or one sees an error.
func (b *bank) run(ctx context.Context, seed uint64) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for i := range b.acked {
		wg.Go(func() {
			if err := b.client(ctx, i, rand.New(rand.NewPCG(seed, uint64(i)))); err != nil {
				cancel(fmt.Errorf("client %d: %w", i, err))
			}
		})
	}
	wg.Wait()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

func (b *bank) client(ctx context.Context, i int, rng *rand.Rand) error {
	p, err := b.db.Connect(ctx)
	if err != nil {
		return err
	}
	defer p.Close()
	b.mu.Lock()
	n := b.acked[i]
	b.mu.Unlock()
	for ctx.Err() == nil {
		n++
		branch, delta := 1+rng.IntN(b.scale), rng.IntN(10001)-5000
		teller, account := 10*(branch-1)+1+rng.IntN(10), 1+rng.IntN(100_000*b.scale)
		start := time.Now()
		_, err := p.Query(fmt.Sprintf("BEGIN; UPDATE pgbench_accounts SET abalance = abalance + %[1]d WHERE aid = %[2]d;"+
			" UPDATE pgbench_tellers SET tbalance = tbalance + %[1]d WHERE tid = %[3]d;"+
			" UPDATE pgbench_branches SET bbalance = bbalance + %[1]d WHERE bid = %[4]d;"+
			" INSERT INTO pgbench_history (tid, bid, aid, delta, mtime) VALUES (%[3]d, %[4]d, %[2]d, %[1]d, now());"+
			" INSERT INTO commits VALUES (%[5]d, %[6]d); COMMIT", delta, account, teller, branch, i, n))
		if err != nil {
			return fmt.Errorf("commit %d: %w", n, err)
		}
		if err := b.note(i, n, time.Since(start)); err != nil {
			return err
		}
	}
	return nil
}

func (b *bank) note(client int, seq int64, took time.Duration) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.acked[client] = seq
	b.latency = append(b.latency, took)
	if took > b.longest {
		b.longest, b.longWhen = took, time.Now()
	}
	fmt.Fprintln(b.record, client, seq)
	return b.record.Flush()
}

// progress waits until each client has made n more commits.
func (b *bank) progress(ctx context.Context, n int64, limit time.Duration) error {
	b.mu.Lock()
	from := slices.Clone(b.acked)
	b.mu.Unlock()
	for end := time.Now().Add(limit); ; {
		b.mu.Lock()
		least := int64(math.MaxInt64)
		for i, a := range b.acked {
			least = min(least, a-from[i])
		}
		b.mu.Unlock()
		if least >= n {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("a client made %d commits in %v", least, limit)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// commits is how many were acknowledged.
func (b *bank) commits() (n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, a := range b.acked {
		n += a
	}
	return n
}

// percentile of the latency of commits, q from 0 to 1.
func (b *bank) percentile(q float64) time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.latency) == 0 {
		return 0
	}
	l := slices.Clone(b.latency)
	slices.Sort(l)
	return l[min(len(l)-1, int(q*float64(len(l))))]
}

// audit looks whether every commit in the file is in the database, nothing is
// there that nobody asked for, and no money was made or lost.
func (b *bank) audit(ctx context.Context) error {
	p, err := b.db.Connect(ctx)
	if err != nil {
		return err
	}
	defer p.Close()
	rows, err := p.Query("SELECT client, count(*), max(seq), min(seq) FROM commits GROUP BY client ORDER BY client")
	if err != nil {
		return err
	}
	have := map[int][3]int64{}
	for _, r := range rows {
		var v [4]int64
		for i := range v {
			if v[i], err = strconv.ParseInt(r[i], 10, 64); err != nil {
				return err
			}
		}
		have[int(v[0])] = [3]int64{v[1], v[2], v[3]}
	}
	recorded, err := b.recorded()
	if err != nil {
		return err
	}
	for i, n := range recorded {
		h := have[i]
		// The commits of a client are its numbers from 1 on; the last one asked
		// for may be there although nobody was told.
		if h[0] != h[1] || n > 0 && h[2] != 1 {
			return fmt.Errorf("client %d: %d commits are there, numbers %d to %d", i, h[0], h[2], h[1])
		}
		if h[1] < n || h[1] > n+1 {
			return fmt.Errorf("client %d: %d commits were acknowledged, %d are there", i, n, h[1])
		}
	}
	sums, err := p.Query("SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers)," +
		" (SELECT sum(bbalance) FROM pgbench_branches), (SELECT coalesce(sum(delta), 0) FROM pgbench_history)," +
		" (SELECT count(*) FROM pgbench_history), (SELECT count(*) FROM commits)")
	if err != nil {
		return err
	}
	if s := sums[0]; s[0] != s[1] || s[1] != s[2] || s[2] != s[3] || s[4] != s[5] {
		return fmt.Errorf("accounts, tellers, branches, history, commits: %v", s)
	}
	return nil
}

// recorded reads the file.
func (b *bank) recorded() ([]int64, error) {
	text, err := os.ReadFile(b.file.Name())
	if err != nil {
		return nil, err
	}
	last := make([]int64, len(b.acked))
	for len(text) > 0 {
		var client int
		var seq int64
		n := slices.Index(text, '\n')
		if n < 0 {
			break
		}
		if _, err := fmt.Sscan(string(text[:n]), &client, &seq); err != nil || client >= len(last) || seq != last[client]+1 {
			return nil, fmt.Errorf("the record says %q", text[:n])
		}
		last[client] = seq
		text = text[n+1:]
	}
	return last, nil
}

// amcheck lets PostgreSQL look at each of its tables and indexes.
func (b *bank) amcheck(ctx context.Context) error {
	_, err := b.db.Run(ctx, "pg_amcheck", "--all", "--install-missing", "--heapallindexed", "--parent-check")
	return err
}
