package bench

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"

	"golang.org/x/sys/unix"
)

// noise writes n bytes that no compression shortens and that occur once.
func noise(w io.Writer, seed uint64, n int64) error {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	_, err := io.CopyN(w, rand.NewChaCha8(key), n)
	return err
}

// half writes n bytes, a multiple of 4096, of which half compress to nothing:
// in each 4 KiB noise and then a phrase again and again.
func half(w io.Writer, seed uint64, n int64) error {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], ^seed)
	rng := rand.NewChaCha8(key)
	page := make([]byte, 4096)
	for i := 2048; i < len(page); i += copy(page[i:], "the disk serves while its bytes are elsewhere; ") {
	}
	for ; n > 0; n -= int64(len(page)) {
		rng.Read(page[:2048]) // never fails
		if _, err := w.Write(page); err != nil {
			return err
		}
	}
	return nil
}

// prepare writes a file of size bytes with f, unless the directory, which was
// named by the user then, holds it from an earlier run.
func (b *linkBench) prepare(name string, size int64, f func(w io.Writer, seed uint64, n int64) error) (string, error) {
	path := b.path(fmt.Sprintf("%s-%d-%d.raw", name, b.Seed, size))
	if st, err := os.Stat(path); err == nil && st.Size() == size {
		return path, nil
	}
	out, err := os.Create(path + ".tmp")
	if err != nil {
		return "", err
	}
	w := bufio.NewWriterSize(out, 1<<20)
	if err := errors.Join(f(w, b.Seed, size), w.Flush(), out.Close()); err != nil {
		return "", err
	}
	return path, os.Rename(path+".tmp", path)
}

// dataRanges calls f for each range of the file that is not a hole.
func dataRanges(file *os.File, f func(off, n int64) error) error {
	fd := int(file.Fd())
	for at := int64(0); ; {
		data, err := unix.Seek(fd, at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%s: look for data: %w", file.Name(), err)
		}
		if at, err = unix.Seek(fd, data, unix.SEEK_HOLE); err != nil {
			return fmt.Errorf("%s: look for a hole: %w", file.Name(), err)
		}
		if err := f(data, at-data); err != nil {
			return err
		}
	}
}

// withoutHoles writes the data of src, without its holes, to dst and returns how much it is.
func withoutHoles(dst, src string) (n int64, err error) {
	in, err := os.Open(src)
	if err != nil {
		return 0, err
	}
	defer in.Close()
	out, err := os.Create(dst)
	if err != nil {
		return 0, err
	}
	err = dataRanges(in, func(off, m int64) error {
		k, err := io.Copy(out, io.NewSectionReader(in, off, m))
		n += k
		return err
	})
	return n, errors.Join(err, out.Close())
}

// zstd1 is the size in bytes of the file under zstd -1.
func zstd1(ctx context.Context, path string) (n int64, err error) {
	c := exec.CommandContext(ctx, "zstd", "-1", "-q", "-c", path)
	c.Stdout = byteCounter{&n}
	if err := c.Run(); err != nil {
		return 0, fmt.Errorf("zstd -1 %s: %w", path, err)
	}
	return n, nil
}

type byteCounter struct{ n *int64 }

func (c byteCounter) Write(p []byte) (int, error) {
	*c.n += int64(len(p))
	return len(p), nil
}
