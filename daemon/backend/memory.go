package backend

import (
	"context"
	"fmt"
	"net/url"
	"path/filepath"
	"sync"
	"time"

	"forerun/block"
	"forerun/data/sigs"
	"forerun/data/source"
	"forerun/data/wire"
	"forerun/disk"
	"forerun/internal/chunk"
)

// memory is what the backend remembers of one source's chunks. It is the
// server's Signatures.
type memory struct {
	volume string
	file   string // the source's, empty for one without a file of its own
	table  *sigs.Table
	scan   *sigs.Scanner

	ctx    context.Context // of what runs beside it
	cancel context.CancelFunc
	work   sync.WaitGroup

	mu       sync.Mutex
	scanning bool // guarded by mu
	closed   bool // guarded by mu
}

var _ wire.Signatures = (*memory)(nil)

// remember opens what is remembered of a source, and puts a storey over it that
// keeps that true.
func (b *Backend) remember(s *served) error {
	m := &memory{volume: s.spec.Name}
	if path, ok := source.File(s.spec.Source); ok {
		m.file = path
	}
	state, err := m.state()
	if err != nil {
		return err
	}
	dir := filepath.Join(b.cfg.StateDir, "signatures")
	if err := disk.OS().MkdirAll(dir); err != nil {
		return block.E("state", dir, block.KindNone, err)
	}
	size, unit := s.dev.Info().Size, int64(s.spec.ChunkBytes)
	log := b.cfg.Log.With("volume", s.spec.Name)
	params, sum := "fixed", chunk.Sum
	if *s.spec.Content {
		if s.cutter, err = chunk.NewCutter(s.spec.ChunkBytes); err != nil {
			return err
		}
		params, sum = "content 1", func(plain []byte) chunk.Sig { return s.cutter.Sum(&chunk.Key{}, plain) }
	}
	m.table, err = sigs.Open(disk.OS(), filepath.Join(dir, url.PathEscape(s.spec.Name)), sigs.Options{
		Chunks: (size + unit - 1) / unit, ChunkBytes: unit, Params: params, State: state, Log: log})
	if err != nil {
		return err
	}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	m.scan = sigs.NewScanner(s.dev, m.table, sigs.ScanOptions{Hold: func() bool { return b.server.DemandWaits() }, Sum: sum, Log: log})
	s.dev = sigs.Watch(s.dev, m.table)
	dev := s.dev
	m.work.Go(func() { m.keep(m.ctx, dev) })
	s.memory = m
	return nil
}

// state is the source's change state, empty when nobody can tell.
func (m *memory) state() (string, error) {
	if m.file == "" {
		return "", nil
	}
	return sigs.FileState(m.file)
}

// settleEvery is how often it is looked whether what is known can be kept.
const settleEvery = 5 * time.Second

// keep has what is known survive a crash, now and then, until ctx ends.
func (m *memory) keep(ctx context.Context, dev block.Device) {
	tick := time.NewTicker(settleEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		// What fails is tried again; until then a crash costs hashing anew.
		_, _ = m.table.Settle(m.flushed(dev))
	}
}

// flushed is the state of a source whose changes are durable.
func (m *memory) flushed(dev block.Device) func() (string, error) {
	return func() (string, error) {
		if err := dev.Flush(context.Background(), block.Background); err != nil {
			return "", err
		}
		return m.state()
	}
}

// close ends the scan and closes the table; dev is still open.
func (m *memory) close(dev block.Device) error {
	m.mu.Lock()
	again := m.closed
	m.closed = true
	m.mu.Unlock()
	if again {
		return nil
	}
	m.cancel()
	m.work.Wait()
	if err := m.table.Close(m.flushed(dev)); err != nil {
		return fmt.Errorf("what was known of volume %s is forgotten: %w", m.volume, err)
	}
	return nil
}

// Get is wire.Signatures.
func (m *memory) Get(i int64) (sig chunk.Sig, zero, ok bool) {
	k, sig := m.table.Get(i)
	return sig, k == sigs.Zero, k != sigs.Unknown
}

// Token is wire.Signatures.
func (m *memory) Token(i int64) uint64 { return uint64(m.table.Token(i)) }

// Learn is wire.Signatures.
func (m *memory) Learn(i int64, token uint64, sig chunk.Sig, zero bool) {
	k := sigs.Data
	if zero {
		k = sigs.Zero
	}
	m.table.Learn(i, sigs.Token(token), k, sig)
}

// Wait is wire.Signatures. The first to wait has the source scanned.
func (m *memory) Wait(ctx context.Context, seen uint64) (uint64, error) {
	m.mu.Lock()
	if !m.scanning && !m.closed {
		m.scanning = true
		m.work.Go(func() { m.scan.Run(m.ctx) })
	}
	m.mu.Unlock()
	now, err := m.table.Wait(ctx, int64(seen))
	return uint64(now), err
}
