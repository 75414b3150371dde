package main

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"forerun/api"
	"forerun/api/client"
	"forerun/data/source/nbd"
)

// used is an ext4 disk of 64 MiB: eight files of 5 MiB of noise of which six
// were deleted again. It returns where the content of one of these begins.
func (s *site) used(name string) (img string, freed int64) {
	s.t.Helper()
	t := s.t
	dir := t.TempDir()
	r := rand.New(rand.NewPCG(7, 7))
	b := make([]byte, 5*mib)
	for i := range 8 {
		fillNoise(r, b)
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint("f", i)), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	img = s.path(name)
	output(t, "mkfs.ext4", "-q", "-F", "-b", "4096", "-d", dir, img, "64M")
	var blocks []string
	for i := 0; i < 8; i++ {
		if i == 2 || i == 5 {
			continue
		}
		if i == 4 {
			blocks = strings.Fields(output(t, "debugfs", "-R", fmt.Sprintf("blocks /f%d", i), img))
		}
		output(t, "debugfs", "-w", "-R", fmt.Sprintf("rm /f%d", i), img)
	}
	output(t, "e2fsck", "-fn", img)
	n, err := strconv.ParseInt(blocks[len(blocks)/2], 10, 64)
	if err != nil {
		t.Fatal(blocks, err)
	}
	return img, n * 4096
}

// TestSkipFree: what the file system of the source does not use does not
// cross the link (H2); read it all the same, and it is what the source has
// (H5); files made after the start survive, and the disk is sound (H6).
func TestSkipFree(t *testing.T) {
	need(t, "mkfs.ext4", "debugfs", "e2fsck")
	ctx := context.Background()
	s := newSite(t)
	src, freed := s.used("src.raw")
	if r, err := os.ReadFile(src); err != nil || bytes.Equal(r[freed:freed+4096], make([]byte, 4096)) {
		t.Fatal("the freed block is zeros: nothing can be seen from it", err)
	}
	before, err := os.ReadFile(src)
	if err != nil {
		t.Fatal(err)
	}
	s.startBackend("d=" + src)
	s.startFrontend([]string{"d"}, "--skip-free", "--checkpoint-interval", "200ms")
	v := s.awaitFilled("d")
	// 10 MiB of files, 4 MiB of journal, which is zeros, and metadata.
	if got := v.WAN.ReceivedBytes; got > 15*mib {
		t.Errorf("%.1f MiB crossed the link", float64(got)/mib)
	}
	if free := v.Chunks.Free * v.ChunkBytes; free < 28*mib {
		t.Errorf("%d chunks are free, 30 MiB were", v.Chunks.Free)
	}
	if v.Phase != api.PhaseFilled || v.Fill.RemainingBytes != 0 || v.Chunks.Untouched != 0 {
		t.Errorf("%+v", v)
	}
	back, err := client.New(s.path("bstate")).Volume(ctx, "d")
	if err != nil || len(back.FileSystems) != 1 || back.FileSystems[0].Type != "ext4" || back.FileSystems[0].FreeBytes < 30*mib || back.FileSystems[0].Reason != "" {
		t.Errorf("%+v, %v", back.FileSystems, err)
	}
	t.Logf("link %.1f MiB, %.1f MiB are left at the source", float64(v.WAN.ReceivedBytes)/mib, float64(v.Chunks.Free*v.ChunkBytes)/mib)

	u, err := nbd.ParseURI(s.uri("d"))
	if err != nil {
		t.Fatal(err)
	}
	dev, err := nbd.Open(ctx, u, nbd.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	p := make([]byte, 4096)
	if err := dev.ReadAt(ctx, p, freed, 0); err != nil || !bytes.Equal(p, before[freed:freed+4096]) {
		t.Errorf("a freed block does not read as at the source: %v", err)
	}
	if n := s.status("d").Chunks.Free; n != v.Chunks.Free-1 {
		t.Errorf("%d chunks are free after one was read, %d were before", n, v.Chunks.Free)
	}

	// A new file, as a file system that was mounted here would write it: what
	// debugfs changes in a copy of the disk is written to the volume.
	work := s.path("work.raw")
	if err := os.WriteFile(work, before, 0o600); err != nil {
		t.Fatal(err)
	}
	fresh := s.path("fresh")
	b := make([]byte, 3*mib+777)
	fillNoise(rand.New(rand.NewPCG(8, 8)), b)
	if err := os.WriteFile(fresh, b, 0o600); err != nil {
		t.Fatal(err)
	}
	output(t, "debugfs", "-w", "-R", "write "+fresh+" fresh", work)
	after, err := os.ReadFile(work)
	if err != nil {
		t.Fatal(err)
	}
	written := 0
	for off := 0; off < len(after); off += 4096 {
		if q := after[off : off+4096]; !bytes.Equal(q, before[off:off+4096]) {
			written++
			if err := dev.WriteAt(ctx, q, int64(off), 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	if written < 700 {
		t.Fatalf("only %d blocks were written", written)
	}
	if err := dev.Flush(ctx, 0); err != nil {
		t.Fatal(err)
	}
	s.sound(src, after, func() bool { // checkpoints bring it to the source
		w := s.status("d").Writeback
		return w != nil && w.LastID > 0 && w.UnwrittenBytes == 0
	})

	s.awaitFilled("d") // chunks that are written in part are wanted after all
	native := s.path("native.raw")
	output(t, binary, "cutover", "--state", s.path("fstate"), "--volume", "d", "--to", native, "--wait")
	got := s.status("d").WAN.ReceivedBytes
	s.frontend.end(t, syscall.SIGTERM)
	if got > 24*mib {
		t.Errorf("%.1f MiB crossed the link until the cut-over", float64(got)/mib)
	}
	output(t, "e2fsck", "-fn", native)
	for _, f := range []string{"f2", "f5", "fresh"} {
		for k, img := range []string{work, native} {
			output(t, "debugfs", "-R", fmt.Sprintf("dump /%s %s", f, s.path(fmt.Sprint("out", k))), img)
		}
		same(t, s.path("out0"), s.path("out1"))
	}
	// What nobody wrote or read reads as zeros now.
	r, err := os.ReadFile(native)
	if err != nil {
		t.Fatal(err)
	}
	zeros := 0
	for off := 0; off < len(r); off += 4096 {
		q := r[off : off+4096]
		switch {
		case bytes.Equal(q, after[off:off+4096]):
		case bytes.Equal(q, make([]byte, 4096)):
			zeros++
		default:
			t.Fatalf("the block at %d is neither the source's nor zeros", off)
		}
	}
	if zeros < 5000 {
		t.Errorf("only %d blocks were left at the source", zeros)
	}
}

// sound waits and then compares a source with what it should hold.
func (s *site) sound(src string, want []byte, ready func() bool) {
	s.t.Helper()
	s.await(s.frontend, ready)
	s.await(s.backend, func() bool {
		got, err := os.ReadFile(src)
		return err == nil && bytes.Equal(got, want)
	})
}

// TestSkipFreeHasItsReasons: a file system that was mounted when its disk was
// taken is copied in whole, and so is any without the switch, or when the
// backend was told not to look.
func TestSkipFreeHasItsReasons(t *testing.T) {
	need(t, "mkfs.ext4", "debugfs", "e2fsck")
	s := newSite(t)
	clean, _ := s.used("clean.raw")
	mounted := s.path("mounted.raw")
	b, err := os.ReadFile(clean)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(mounted, b, 0o600); err != nil {
		t.Fatal(err)
	}
	output(t, "debugfs", "-w", "-R", "feature needs_recovery", mounted)
	all := func(volume string) {
		t.Helper()
		if v := s.awaitFilled(volume); v.Chunks.Free != 0 || v.Chunks.Held*v.ChunkBytes < 38*mib {
			t.Errorf("%s: %+v", volume, v.Chunks)
		}
	}
	systems := func(volume string) []api.FileSystem {
		t.Helper()
		v, err := client.New(s.path("bstate")).Volume(context.Background(), volume)
		if err != nil {
			t.Fatal(err)
		}
		return v.FileSystems
	}
	s.startBackend("mounted="+mounted, "clean="+clean)
	s.startFrontend([]string{"mounted"}, "--skip-free", "--policy", "isolated")
	all("mounted")
	if f := systems("mounted"); len(f) != 1 || !strings.Contains(f[0].Reason, "not unmounted cleanly") {
		t.Errorf("%+v", f)
	}
	if out := output(t, binary, "status", "--state", s.path("bstate"), "--volume", "mounted"); !strings.Contains(out, "not unmounted cleanly") {
		t.Errorf("status does not say why:\n%s", out)
	}
	s.frontend.end(t, syscall.SIGTERM)
	s.startFrontend([]string{"clean"}, "--policy", "isolated")
	all("clean")
	if f := systems("clean"); len(f) != 1 || f[0].Reason != "" {
		t.Errorf("%+v", f)
	}
	s.backend.end(t, syscall.SIGTERM)
	s.startBackend("clean="+clean, "other="+mounted, "--no-fsmap")
	if f := systems("clean"); len(f) != 0 {
		t.Errorf("it was told not to look: %+v", f)
	}
}
