package bench

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"forerun/api"
	"forerun/lab/guest"
	"forerun/lab/netns"
	"forerun/lab/rig"
)

// lineBytes is part d: what crosses the line for whole disks, one after the
// other at one frontend. Bytes do not depend on who else uses the machine, so
// two repetitions are enough to show that.
func (b *linkBench) lineBytes() error {
	source, err := b.guestDisk()
	if err != nil {
		return err
	}
	data := b.path("guest-data")
	plain, err := withoutHoles(data, source)
	if err != nil {
		return err
	}
	packed, err := zstd1(b.ctx, data)
	if err != nil {
		return errors.Join(err, os.Remove(data))
	}
	if err := os.Remove(data); err != nil {
		return err
	}
	b.Measure("d: guest, data", float64(plain)/1e6, "MB")
	b.Measure("d: guest, zstd -1 of its data", float64(packed)/1e6, "MB")

	similar, grown, zeros := b.path("similar.raw"), b.path("grown.raw"), b.path("zeros.raw")
	if err := changedCopy(similar, source, b.Seed, 0.10); err != nil {
		return err
	}
	if err := b.grownCopy(grown, source); err != nil {
		return err
	}
	const zeroBytes = 1 << 30
	if err := writtenZeros(zeros, zeroBytes); err != nil {
		return err
	}
	clone := b.path("clone.raw")
	if err := guest.Copy(clone, source); err != nil {
		return err
	}
	for range min(b.o.N, 2) {
		var first, chunks float64
		err := b.oneByOne([]rig.Disk{{Volume: "guest", Source: source}, {Volume: "similar", Source: similar},
			{Volume: "clone", Source: clone}, {Volume: "grown", Source: grown}, {Volume: "zeros", Source: zeros}}, nil,
			func(d rig.Disk, down, up int64, v api.Volume) {
				name := "d: " + d.Volume + ": "
				// Files have no headers of TCP and IP either.
				n := float64(v.WAN.ReceivedBytes)
				b.Noted(name+"to the target", n/1e6, "MB", fmt.Sprintf("%.2f MB with TCP and IP; to the source %.2f MB; %d chunks held, %d zero", float64(down)/1e6, float64(up)/1e6, v.Chunks.Held, v.Chunks.Zero))
				switch d.Volume {
				case "guest":
					first, chunks = n, float64(v.Chunks.Held)
					b.AtMost(name+"bytes / zstd -1 of its data", ratio(n, float64(packed)), 0.95, "x")
				case "similar":
					b.AtMost(name+"bytes / the first guest's", ratio(n, first), 0.20, "x")
				case "clone":
					b.AtMost(name+"bytes per chunk", ratio(n, chunks), 64, "B")
				case "grown":
					b.Measure(name+"bytes / the first guest's", ratio(n, first), "x")
				case "zeros":
					b.AtMost(name+"bytes / its size", ratio(n, zeroBytes), 0.001, "x")
				}
			})
		if err != nil {
			return err
		}
	}
	for _, f := range []string{similar, grown, zeros, clone} {
		if err := os.Remove(f); err != nil {
			return err
		}
	}
	return b.shifted()
}

// shifted sends a file and the same one 1 KiB further on, with chunks of fixed
// size and with chunks that the content bounds.
func (b *linkBench) shifted() error {
	const size = 64 << 20
	one, err := b.prepare("shift", size, noise)
	if err != nil {
		return err
	}
	two, err := b.prepare("shifted", size+64<<10, func(w io.Writer, seed uint64, n int64) error {
		in, err := os.Open(one)
		if err != nil {
			return err
		}
		defer in.Close()
		err = noise(w, seed+1, 1<<10)
		if err == nil {
			_, err = io.Copy(w, in)
		}
		if err == nil {
			err = noise(w, seed+2, 63<<10)
		}
		return err
	})
	if err != nil {
		return err
	}
	for _, mode := range []string{"fixed", "content"} {
		var args []string
		if mode == "content" {
			g := &rig.Rig{Bin: b.bin}
			if !g.Knows(b.ctx, "backend", "--chunking") {
				b.Say("d: the backend knows no --chunking: chunks bounded by content are left out")
				continue
			}
			args = []string{"--chunking", "one=content", "--chunking", "two=content"}
		}
		err := b.oneByOne([]rig.Disk{{Volume: "one", Source: one}, {Volume: "two", Source: two}}, args, func(d rig.Disk, down, up int64, v api.Volume) {
			switch name := "d: shifted by 1 KiB, chunks by " + mode + ": bytes / size"; {
			case d.Volume == "one":
				b.Measure("d: file, chunks by "+mode+": bytes / size", float64(v.WAN.ReceivedBytes)/size, "x")
			case mode == "content":
				b.AtMost(name, float64(v.WAN.ReceivedBytes)/size, 0.25, "x")
			default:
				b.Measure(name, float64(v.WAN.ReceivedBytes)/size, "x")
			}
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// oneByOne fills the disks at one frontend, one after the other, and tells what
// crossed for each. The frontend knows a disk only when its turn has come, or
// what it holds would be announced, and counted, with an earlier one. down and up
// are bytes on the line, TCP and IP included; what the session counts is in v.
func (b *linkBench) oneByOne(disks []rig.Disk, backend []string, each func(d rig.Disk, down, up int64, v api.Volume)) error {
	return b.over(point{rate: mbit100, rtt: 40 * time.Millisecond}, 0, func() error {
		dir, err := b.dir("bytes")
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		g, err := b.linkRig(dir, disks[0].Source, "--fill-paused")
		if err != nil {
			return err
		}
		g.Volume, g.More = disks[0].Volume, disks[1:]
		g.BackendArgs = append(backend, g.BackendArgs...)
		defer g.Kill()
		if err := g.PKI(b.ctx); err != nil {
			return err
		}
		if err := g.StartBackend(b.ctx); err != nil {
			return err
		}
		for i, d := range disks {
			if g.Frontend != nil {
				if err := g.Frontend.Stop(time.Minute); err != nil {
					return err
				}
			}
			g.More = disks[1 : 1+i]
			before := b.line.Stats()
			if _, err := g.StartFrontend(b.ctx); err != nil {
				return err
			}
			if err := g.FillOf(b.ctx, d.Volume, "resume", 0); err != nil {
				return err
			}
			v, err := g.WaitFilledOf(b.ctx, d.Volume, 20*time.Minute, nil)
			if err != nil {
				return err
			}
			b.quiet(before)
			down, up := b.crossed(before)
			each(d, down, up, v)
		}
		return nil
	})
}

// quiet waits until the line carries no more than pings.
func (b *linkBench) quiet(before netns.Stats) {
	for range 50 {
		down, up := b.crossed(before)
		time.Sleep(200 * time.Millisecond)
		d, u := b.crossed(before)
		if d-down+u-up < 8<<10 {
			return
		}
	}
}

// changedCopy copies src to dst and puts fresh text into a share of those
// blocks of 64 KiB that hold data.
func changedCopy(dst, src string, seed uint64, share float64) error {
	if err := guest.Copy(dst, src); err != nil {
		return err
	}
	f, err := os.OpenFile(dst, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	const block = 64 << 10
	var blocks []int64
	err = dataRanges(f, func(off, n int64) error {
		for at := (off + block - 1) / block; (at+1)*block <= off+n; at++ {
			blocks = append(blocks, at*block)
		}
		return nil
	})
	if err != nil {
		return err
	}
	rng := rand.New(rand.NewPCG(seed, 0x74657874))
	rng.Shuffle(len(blocks), func(i, k int) { blocks[i], blocks[k] = blocks[k], blocks[i] })
	for _, at := range blocks[:int(share*float64(len(blocks)))] {
		if _, err := f.WriteAt(text(rng, block), at); err != nil {
			return err
		}
	}
	return f.Close()
}

// text is n bytes of words out of a few thousand, some of them far more often
// than others; zstd -1 packs a chunk of it about as well as a system's files.
func text(rng *rand.Rand, n int) []byte {
	var t bytes.Buffer
	for t.Len() < n {
		// The product of two is small more often than large.
		w := rng.IntN(90) * rng.IntN(90)
		for v := w*2654435761>>4 | 1<<(8+w%16); v > 0; v /= 26 {
			t.WriteByte(byte('a' + v%26))
		}
		t.WriteByte(' ')
	}
	return t.Bytes()[:n]
}

// grownCopy copies the guest's disk and adds files through its file system:
// fresh text, and copies of files that are there.
func (b *linkBench) grownCopy(dst, src string) error {
	if err := guest.Copy(dst, src); err != nil {
		return err
	}
	mnt := b.path("mnt")
	if err := os.MkdirAll(mnt, 0o755); err != nil {
		return err
	}
	out, err := rig.Local(b.ctx, "mount", "-o", fmt.Sprintf("loop,offset=%d", guest.PartitionStart), dst, mnt).CombinedOutput()
	if err != nil {
		return fmt.Errorf("mount: %w: %s", err, out)
	}
	rng := rand.New(rand.NewPCG(b.Seed, 0x66696c6573))
	dir := filepath.Join(mnt, "root", "added")
	err = os.MkdirAll(dir, 0o755)
	for i := 0; i < 300 && err == nil; i++ {
		err = os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), text(rng, 1<<10+rng.IntN(400<<10)), 0o644)
	}
	if err == nil {
		out, err = rig.Local(b.ctx, "cp", "-a", filepath.Join(mnt, "usr", "bin"), dir).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("cp: %w: %s", err, out)
		}
	}
	if out, e := rig.Local(b.ctx, "umount", mnt).CombinedOutput(); e != nil {
		err = errors.Join(err, fmt.Errorf("umount: %w: %s", e, out))
	}
	return err
}

// writtenZeros makes a file of n zeros that takes n bytes on its disk.
func writtenZeros(path string, n int64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	buf := make([]byte, 1<<20)
	for ; n > 0; n -= int64(len(buf)) {
		if _, err := f.Write(buf); err != nil {
			f.Close()
			return err
		}
	}
	return f.Close()
}
