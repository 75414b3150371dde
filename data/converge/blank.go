package converge

import (
	"bytes"
	"io"

	"forerun/disk"
)

// A target that holds data is only overwritten when that is asked for. A new
// block device, or a file that was given its size beforehand, has a size and
// nothing in it, so it is looked at: the beginning and end of each range that
// takes space, where partition tables and file systems leave their marks, and
// a block here and there between them.
const (
	blankEdge   = 1 << 20 // bytes, at either end
	blankStops  = 256     // blocks looked at between them
	blankBlock  = 4 << 10 // bytes
	blankRanges = 4096    // more of them than this is data
)

// blank says whether nothing but zeros was seen in the file or device at name.
func blank(fsys disk.FS, name string) (bool, error) {
	f, err := fsys.Open(name, disk.Read)
	if err != nil {
		return false, err
	}
	defer f.Close()
	at := int64(0)
	for range blankRanges {
		start, end, err := f.Data(at)
		if err == io.EOF {
			return true, nil
		}
		if err != nil {
			return false, err
		}
		if ok, err := blankRange(f, start, end); !ok || err != nil {
			return false, err
		}
		at = end
	}
	return false, nil
}

func blankRange(f disk.File, start, end int64) (bool, error) {
	buf := make([]byte, blankEdge)
	zero := func(from, to int64) (bool, error) {
		if to <= from {
			return true, nil
		}
		p := buf[:to-from]
		if n, err := f.ReadAt(p, from); err != nil && !(err == io.EOF && int64(n) == to-from) {
			return false, err
		}
		return len(bytes.TrimLeft(p, "\x00")) == 0, nil
	}
	if ok, err := zero(start, min(start+blankEdge, end)); !ok || err != nil {
		return false, err
	}
	if ok, err := zero(max(start, end-blankEdge), end); !ok || err != nil {
		return false, err
	}
	for i := range int64(blankStops) {
		at := start + (end-start)/blankStops*i
		if ok, err := zero(at, min(at+blankBlock, end)); !ok || err != nil {
			return false, err
		}
	}
	return true, nil
}
