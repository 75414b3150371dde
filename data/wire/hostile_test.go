package wire

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"forerun/block"
	"forerun/internal/chunk"
	"forerun/internal/pki"
)

// peer is a client by hand: it can say anything.
type peer struct {
	t  *testing.T
	tc *tls.Conn
	br *bufio.Reader
}

func (w *world) peer(h *hello) *peer {
	w.t.Helper()
	nc := must(w.wan.Dial("backend:1"))
	cfg := w.client.TLS.Clone()
	cfg.ServerName = "backend"
	cfg.NextProtos = []string{alpn}
	p := &peer{t: w.t, tc: tls.Client(nc, cfg)}
	p.br = newFrameReader(p.tc)
	if err := p.tc.Handshake(); err != nil {
		w.t.Fatal(err)
	}
	if h != nil {
		p.tc.Write(appendHello(nil, *h))
		if _, err := readWelcome(p.br); err != nil {
			w.t.Fatal(err)
		}
	}
	return p
}

func (p *peer) say(h header, payload []byte) { p.tc.Write(appendFrame(nil, h, payload)) }

// opened opens the disk as volume 1.
func (p *peer) opened() *peer {
	p.say(header{typ: tOpen, volume: 1, req: 1}, appendOpen(nil, openOrder{name: "disk"}))
	for {
		h, _, err := readFrame(p.br)
		if err != nil {
			p.t.Fatal(err)
		}
		if h.typ == tVolume {
			return p
		}
	}
}

// thrownOut reads until the connection ends and says whether an ERROR came first.
func (p *peer) thrownOut() (told bool) {
	p.tc.SetReadDeadline(time.Now().Add(time.Minute))
	for {
		h, _, err := readFrame(p.br)
		if err != nil {
			var ne net.Error
			if errors.As(err, &ne) && ne.Timeout() {
				p.t.Error("the connection was not closed")
			}
			return told
		}
		told = told || h.typ == tError && h.req == 0
	}
}

func fetchOf(f block.Flags, runs ...run) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(f))
	for _, r := range runs {
		b = appendRun(b, r)
	}
	return b
}

func TestHostileClients(t *testing.T) {
	demand := hello{min: 2, max: 2, session: sessionID{1}}
	back := hello{min: 2, max: 2, session: sessionID{2}, role: roleBackground}
	src := newSource(16<<20, 31, "")
	src.latency = 100 * time.Millisecond
	for name, f := range map[string]func(w *world) *peer{
		"huge frame": func(w *world) *peer {
			p := w.peer(&demand)
			p.tc.Write(appendHeader(nil, header{n: 1 << 31, typ: tPing}))
			return p
		},
		"unknown frame": func(w *world) *peer {
			p := w.peer(&demand)
			p.say(header{typ: 99}, []byte("?"))
			return p
		},
		"not opened": func(w *world) *peer {
			p := w.peer(&demand)
			p.say(header{typ: tFetch, volume: 7, req: 1}, fetchOf(0, run{0, 1}))
			return p
		},
		"beyond the end": func(w *world) *peer {
			p := w.peer(&demand).opened()
			p.say(header{typ: tFetch, volume: 1, req: 2}, fetchOf(0, run{255, 2}))
			return p
		},
		"below zero": func(w *world) *peer {
			p := w.peer(&demand).opened()
			p.say(header{typ: tFetch, volume: 1, req: 2}, fetchOf(0, run{-1, 1}))
			return p
		},
		"no chunks": func(w *world) *peer {
			p := w.peer(&demand).opened()
			p.say(header{typ: tFetch, volume: 1, req: 2}, fetchOf(0, run{0, 0}))
			return p
		},
		"half a run": func(w *world) *peer {
			p := w.peer(&demand).opened()
			p.say(header{typ: tFetch, volume: 1, req: 2}, make([]byte, 9))
			return p
		},
		"background on demand": func(w *world) *peer {
			p := w.peer(&demand).opened()
			p.say(header{typ: tFetch, volume: 1, req: 2}, fetchOf(block.Background, run{0, 1}))
			return p
		},
		"demand on background": func(w *world) *peer {
			p := w.peer(&back).opened()
			p.say(header{typ: tFetch, volume: 1, req: 2}, fetchOf(block.Demand, run{0, 1}))
			return p
		},
		"promotion on background": func(w *world) *peer {
			p := w.peer(&back).opened()
			p.say(header{typ: tPromote, volume: 1, req: 2}, appendRun(nil, run{0, 1}))
			return p
		},
		"odd flags": func(w *world) *peer {
			p := w.peer(&demand).opened()
			p.say(header{typ: tFetch, volume: 1, req: 2}, fetchOf(block.FUA, run{0, 1}))
			return p
		},
		"beyond its credit at once": func(w *world) *peer {
			p := w.peer(&demand).opened()
			p.say(header{typ: tFetch, volume: 1, req: 2}, fetchOf(0, run{0, 128}, run{0, 128}))
			return p
		},
		"beyond its credit in time": func(w *world) *peer {
			p := w.peer(&demand).opened()
			for i := range uint64(6) {
				p.say(header{typ: tFetch, volume: 1, req: 2 + i}, fetchOf(0, run{0, 20}))
			}
			return p
		},
		"too many opens": func(w *world) *peer {
			p := w.peer(&demand)
			for i := range uint16(2000) {
				p.say(header{typ: tOpen, volume: 1 + i, req: uint64(i) + 1}, appendOpen(nil, openOrder{name: "disk"}))
			}
			return p
		},
		"nameless open": func(w *world) *peer {
			p := w.peer(&demand)
			p.say(header{typ: tOpen, volume: 1, req: 1}, nil)
			return p
		},
		"short ping": func(w *world) *peer {
			p := w.peer(&demand)
			p.say(header{typ: tPing}, []byte{1})
			return p
		},
		"extents off the disk": func(w *world) *peer {
			p := w.peer(&demand).opened()
			p.say(header{typ: tExtents, volume: 1, req: 2}, appendExtentsOrder(nil, 0, 16<<20, 512))
			return p
		},
		"server's frame": func(w *world) *peer {
			p := w.peer(&demand).opened()
			p.say(header{typ: tChunk, volume: 1, req: 2}, make([]byte, 100))
			return p
		},
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, line, src, func(w *world) {
				w.opts.Credit = 50
				w.serve()
				c := w.dial() // somebody well-behaved beside
				defer c.Close()
				r := w.open(c)
				p := f(w)
				if !p.thrownOut() {
					t.Error("it was thrown out without being told why")
				}
				if err := w.read(r, 0, 1<<20); err != nil {
					t.Error(err)
				}
				if st := w.server.Stats(); st.Violations != 1 || st.Sessions != 1 {
					t.Errorf("%+v", st)
				}
			})
		})
	}
}

func TestHelloRefusals(t *testing.T) {
	src := newSource(1<<20, 32, "")
	inWorld(t, line, src, func(w *world) {
		w.serve()
		c := w.dial()
		defer c.Close()
		for name, tc := range map[string]struct {
			bytes []byte
			kind  block.Kind
		}{
			"newer version": {appendHello(nil, hello{min: 3, max: 9, session: sessionID{1}}), block.KindUnsupported},
			"rubbish":       {bytes.Repeat([]byte("GET / HTTP/1.1\r\n"), 10), 0},
			"not a hello":   {appendFrame([]byte(magic), header{typ: tPing}, make([]byte, 8)), 0},
			"odd role":      {appendHello(nil, hello{min: 2, max: 2, role: 3}), 0},
			"index":         {appendHello(nil, hello{min: 2, max: 2, role: roleBackground, index: 200}), 0},
		} {
			p := w.peer(nil)
			p.tc.Write(tc.bytes)
			_, err := readWelcome(p.br)
			if err == nil || tc.kind != 0 && block.KindOf(err) != tc.kind {
				t.Errorf("%s: %v", name, err)
			}
			p.tc.Close()
		}
		// Somebody else's session.
		w.client.TLS = clientTLS(w, "f2")
		p := w.peer(nil)
		p.tc.Write(appendHello(nil, hello{min: 2, max: 2, session: c.id}))
		if _, err := readWelcome(p.br); block.KindOf(err) != block.KindDenied {
			t.Errorf("somebody else's session: %v", err)
		}
		p.tc.Close()
	})
}

// TestDawdlers fills the server with connections that say nothing.
func TestDawdlers(t *testing.T) {
	src := newSource(1<<20, 33, "")
	inWorld(t, line, src, func(w *world) {
		w.opts.MaxPending = 8
		w.serve()
		var idle []net.Conn
		for range 30 {
			idle = append(idle, must(w.wan.Dial("backend:1")))
		}
		c := w.dial() // gets in all the same
		if err := w.read(w.open(c), 0, 4096); err != nil {
			t.Error(err)
		}
		w.server.mu.Lock()
		n := len(w.server.pending)
		w.server.mu.Unlock()
		if n > 8 {
			t.Errorf("%d connections are pending", n)
		}
		time.Sleep(6 * time.Second)
		for i, nc := range idle {
			nc.SetReadDeadline(time.Now().Add(time.Second))
			if _, err := nc.Read(make([]byte, 1)); err == nil || errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("connection %d is still there: %v", i, err)
			}
		}
		// One that is let in and then falls silent goes after Idle.
		p := w.peer(&hello{min: 2, max: 2, session: sessionID{9}})
		began := time.Now()
		p.thrownOut()
		if took := time.Since(began); took < 8*time.Second || took > 12*time.Second {
			t.Errorf("a silent client was given up after %v", took)
		}
		c.Close()
	})
}

// TestDeafClient asks for much and reads nothing: it must not cost more than its budget.
func TestDeafClient(t *testing.T) {
	src := newSource(64<<20, 34, "")
	inWorld(t, line, src, func(w *world) {
		w.serve()
		p := w.peer(&hello{min: 2, max: 2, session: sessionID{9}, role: roleBackground}).opened()
		p.say(header{typ: tFetch, volume: 1, req: 2}, fetchOf(block.Background, run{0, 1000}))
		stop := make(chan struct{})
		quiet := make(chan struct{})
		go func() {
			defer close(quiet)
			for {
				select {
				case <-stop:
					return
				case <-time.After(time.Second):
					p.say(header{typ: tPing}, make([]byte, 8))
				}
			}
		}()
		time.Sleep(20 * time.Second)
		read := w.server.Stats().SourceBytes
		if most := int64(budgetBackground + 2*maxRead + 8<<20); read > most { // 8 MiB: the line's own window
			t.Errorf("%d bytes were read for a client that takes none", read)
		}
		c := w.dial()
		if err := w.read(w.open(c), 0, 4<<20); err != nil {
			t.Error(err)
		}
		c.Close()
		close(stop)
		<-quiet
		p.tc.NetConn().Close()
	})
}

// TestUnverifiedTLS makes sure that a server cannot be made to serve without
// verified clients.
func TestUnverifiedTLS(t *testing.T) {
	dir := certificates(t)
	cfg := must(pki.NBDServerTLS(dir, "b1", false))
	if _, err := NewServer(ServerOptions{TLS: cfg, Lookup: func(string) (Served, error) { return Served{}, nil }}); block.KindOf(err) != block.KindInvalid {
		t.Error(err)
	}
}

// fakeBackend serves connections by hand.
func (w *world) fakeBackend(f func(h hello, v uint16, tc *tls.Conn, br *bufio.Reader) error) {
	ln := must(w.wan.Listen("backend:1"))
	cfg := must(pki.ServerTLS(w.dir, "b1", pki.RoleFrontend))
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer nc.Close()
				tc := tls.Server(nc, cfg)
				br := newFrameReader(tc)
				h, err := readHello(br)
				if err != nil {
					return
				}
				tc.Write(appendWelcome(nil, welcome{version: 2, credit: 100, idle: time.Minute}))
				for {
					fh, _, err := readFrame(br)
					if err != nil {
						return
					}
					switch fh.typ {
					case tOpen:
						info := block.Info{Size: int64(len(w.src.data)), BlockSize: 512, ID: w.src.id}
						tc.Write(appendFrame(nil, header{typ: tVolume, volume: fh.volume, req: fh.req}, appendVolume(nil, volumeInfo{info, w.chunk})))
					case tFetch:
						if f(h, fh.volume, tc, br) != nil {
							return
						}
					}
				}
			}()
		}
	}()
	w.stop = func() { ln.Close(); <-done; w.stop = nil }
}

func chunkFrame(v uint16, req uint64, index int64, p chunk.Packed, data []byte) []byte {
	b := appendChunkHead(nil, &piece{index: index, plain: p.Plain, packed: len(p.Data), codec: p.Codec, sig: p.Sig})
	return appendFrame(nil, header{typ: tChunk, volume: v, req: req}, append(b, data...))
}

func TestCorruptChunksAreNotRead(t *testing.T) {
	src := newSource(1<<20, 35, "")
	inWorld(t, line, src, func(w *world) {
		w.chunk = 16 * kib
		var bend func(p *chunk.Packed)
		w.fakeBackend(func(h hello, v uint16, tc *tls.Conn, br *bufio.Reader) error {
			plain := bytes.Repeat([]byte{1, 2, 3, 4}, 4*kib)
			p := chunk.Seal(nil, plain, chunk.Zstd)
			bend(&p)
			// Answer whatever is asked: ids count up from the OPENs.
			var b []byte
			for id := uint64(1); id < 40; id++ {
				b = append(b, chunkFrame(v, id, 0, p, p.Data)...)
			}
			_, err := tc.Write(b)
			return err
		})
		c := w.dial()
		defer c.Close()
		r := w.open(c)
		for name, f := range map[string]func(p *chunk.Packed){
			"flipped":     func(p *chunk.Packed) { p.Data = bytes.Clone(p.Data); p.Data[len(p.Data)/2] ^= 4 },
			"signature":   func(p *chunk.Packed) { p.Sig[3]++ },
			"codec":       func(p *chunk.Packed) { p.Codec = 77 },
			"other codec": func(p *chunk.Packed) { p.Codec = chunk.S2 },
			"length":      func(p *chunk.Packed) { p.Plain = 8 * kib },
		} {
			bend = f
			if err := r.ReadAt(w.ctx, make([]byte, 512), 512, 0); block.KindOf(err) != block.KindCorrupt {
				t.Errorf("%s: %v", name, err)
			}
		}
		// Fetch hands on what came: the sink verifies.
		bend = func(p *chunk.Packed) { p.Sig[3]++ }
		err := r.Fetch(w.ctx, []int64{0}, 0, func(_ int64, p chunk.Packed, err error) {
			if err != nil || p.Open(make([]byte, p.Plain)) == nil {
				t.Errorf("delivered %v, %v", p.Codec, err)
			}
		})
		if err != nil {
			t.Error(err)
		}
		bend = func(*chunk.Packed) {}
		if err := r.ReadAt(w.ctx, make([]byte, 512), 512, 0); err != nil {
			t.Error(err)
		}
		if c.Stats().Reconnects != 0 {
			t.Error("the connection was given up for bad content")
		}
	})
}

func TestHostileServers(t *testing.T) {
	src := newSource(1<<20, 36, "")
	for name, answer := range map[string]func(v uint16) []byte{
		"huge frame":    func(uint16) []byte { return appendHeader(nil, header{n: 1 << 30, typ: tChunk}) },
		"unknown frame": func(uint16) []byte { return appendFrame(nil, header{typ: 99}, nil) },
		"packed too long": func(v uint16) []byte {
			return chunkFrame(v, 2, 0, chunk.Packed{Plain: 10, Data: make([]byte, 20)}, nil)
		},
		"plain too long": func(v uint16) []byte {
			return chunkFrame(v, 2, 0, chunk.Packed{Plain: 1 << 30, Data: make([]byte, 20)}, nil)
		},
		"more of nothing": func(v uint16) []byte {
			return appendFrame(nil, header{typ: tMore, volume: v, req: 2}, make([]byte, 50))
		},
		"zeros for ever": func(v uint16) []byte {
			return appendFrame(nil, header{typ: tZeros, volume: v, req: 2}, appendRun(nil, run{0, 1<<32 - 1}))
		},
		"unasked volume": func(v uint16) []byte {
			return appendFrame(nil, header{typ: tVolume, volume: v, req: 77}, appendVolume(nil, volumeInfo{block.Info{Size: 512, BlockSize: 512}, 64 * kib}))
		},
		"begins, and again": func(v uint16) []byte {
			return bytes.Repeat(chunkFrame(v, 2, 0, chunk.Packed{Plain: 64 * kib, Data: make([]byte, 64*kib)}, []byte{1}), 2)
		},
		"begins too many": func(v uint16) (b []byte) {
			for i := range int64(16) {
				b = append(b, chunkFrame(v, 2, i, chunk.Packed{Plain: 64 * kib, Data: make([]byte, 64*kib)}, []byte{1})...)
			}
			return b
		},
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, line, src, func(w *world) {
				w.client.BackgroundConns = 1
				n := 0
				w.fakeBackend(func(h hello, v uint16, tc *tls.Conn, br *bufio.Reader) error {
					if n++; n > 2 {
						return io.EOF
					}
					_, err := tc.Write(answer(v))
					return err
				})
				c := w.dial()
				defer c.Close()
				r := w.open(c)
				ctx, cancel := context.WithTimeout(w.ctx, 3*time.Second)
				defer cancel()
				if err := r.ReadAt(ctx, make([]byte, 512), 0, 0); block.KindOf(err) != block.KindCanceled {
					t.Errorf("read: %v", err)
				}
				if c.Stats().Reconnects == 0 {
					t.Error("the connection was kept")
				}
			})
		})
	}
}
