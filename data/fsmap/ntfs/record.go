package ntfs

import (
	"errors"
	"fmt"

	"forerun/data/fsmap/internal/layout"
)

// errNotRecord means that there is no file record where one could be.
var errNotRecord = errors.New("there is no file record")

// run is n clusters of an attribute from vcn on, at cluster to, or nowhere (-1).
type run struct{ vcn, to, n int64 }

type runs []run

func (r runs) end() int64 {
	if len(r) == 0 {
		return 0
	}
	l := r[len(r)-1]
	return l.vcn + l.n
}

// attribute of a file, or the piece of one that a record holds.
type attribute struct {
	kind        uint32
	name        string
	flags       uint16 // compressed, encrypted, sparse
	away        bool   // the value is in clusters, not in the record
	value       []byte // when it is in the record
	runs        runs   // when it is not
	lowest      int64  // first vcn of runs
	initialized int64  // bytes that were written, of a first piece
}

// unfix undoes what protects a multi-sector record from being torn: the last
// two bytes of each 512 were replaced by a number, and kept.
func unfix(b []byte, magic string) error {
	if string(b[:4]) == "BAAD" {
		return errors.New("a record is marked as damaged")
	}
	if string(b[:4]) != magic {
		return errNotRecord
	}
	at, n := int(le.Uint16(b[4:])), int(le.Uint16(b[6:]))
	if n != len(b)/512+1 || at < 8 || at%2 != 0 || at+2*n > 510 {
		return fmt.Errorf("%d words of update sequence at %d in a record of %d bytes", n, at, len(b))
	}
	seq := le.Uint16(b[at:])
	for i := 1; i < n; i++ {
		end := b[i*512-2:]
		if le.Uint16(end) != seq {
			return errors.New("a record was written in part")
		}
		copy(end, b[at+2*i:][:2])
	}
	return nil
}

// raw reads file record i and says whether it is in use.
func (v *volume) raw(i int64) (b []byte, inUse bool, err error) {
	if i < 0 || i >= v.files {
		return nil, false, fmt.Errorf("there is no file record %d", i)
	}
	b = make([]byte, v.record)
	if err := v.read(v.mft, b, i*v.record); err != nil {
		return nil, false, err
	}
	if err := unfix(b, "FILE"); err != nil {
		return nil, false, err
	}
	inUse = le.Uint16(b[22:])&1 != 0
	// Records made before version 3.1 do not have their number.
	if inUse && le.Uint16(b[4:]) >= 48 && int64(le.Uint32(b[44:])) != i {
		return nil, false, fmt.Errorf("the record says that it is number %d", le.Uint32(b[44:]))
	}
	return b, inUse, nil
}

// file reads a record that must be in use and the first of its file.
func (v *volume) file(i int64) ([]byte, error) {
	b, inUse, err := v.raw(i)
	if err == nil && (!inUse || le.Uint64(b[32:]) != 0) {
		err = errors.New("the record is not in use")
	}
	return b, err
}

// attributes calls do for each attribute of a record.
func (v *volume) attributes(b []byte, do func(attribute) error) error {
	at, end := int(le.Uint16(b[20:])), int64(le.Uint32(b[24:]))
	if end > int64(len(b)) || at < 42 || at%8 != 0 {
		return fmt.Errorf("a record of %d bytes with attributes at %d", end, at)
	}
	b = b[:end]
	for {
		if at+4 > len(b) {
			return errors.New("the attributes of a record have no end")
		}
		kind := le.Uint32(b[at:])
		if kind == attrEnd {
			return nil
		}
		if at+24 > len(b) {
			return errors.New("an attribute is cut")
		}
		n := int64(le.Uint32(b[at+4:]))
		if n < 24 || n%8 != 0 || n > int64(len(b)-at) {
			return fmt.Errorf("an attribute of %d bytes", n)
		}
		a, err := v.attribute(b[at:at+int(n)], kind)
		if err != nil {
			return err
		}
		if err := do(a); err != nil {
			return err
		}
		at += int(n)
	}
}

func (v *volume) attribute(b []byte, kind uint32) (a attribute, err error) {
	a = attribute{kind: kind, away: b[8] != 0, flags: le.Uint16(b[12:])}
	if n := int(b[9]); n > 0 {
		at := int(le.Uint16(b[10:]))
		if at+2*n > len(b) {
			return a, errors.New("the name of an attribute is cut")
		}
		a.name = wide(b[at:][:2*n])
	}
	if !a.away {
		at, n := int64(le.Uint16(b[20:])), int64(le.Uint32(b[16:]))
		if at+n > int64(len(b)) {
			return a, errors.New("the value of an attribute is cut")
		}
		a.value = b[at : at+n]
		return a, nil
	}
	if len(b) < 64 {
		return a, errors.New("an attribute is cut")
	}
	a.lowest = int64(le.Uint64(b[16:]))
	highest := int64(le.Uint64(b[24:]))
	at := int(le.Uint16(b[32:]))
	if a.lowest < 0 || a.lowest > 1<<50 || highest < a.lowest-1 || at < 64 || at > len(b) {
		return a, errors.New("the clusters of an attribute are of no known form")
	}
	if a.lowest == 0 {
		a.initialized = int64(le.Uint64(b[56:]))
		if a.initialized < 0 || a.initialized > int64(le.Uint64(b[48:])) {
			return a, errors.New("an attribute has impossible sizes")
		}
	}
	if a.runs, err = v.decode(b[at:], a.lowest); err != nil {
		return a, err
	}
	if end := a.runs.end(); len(a.runs) > 0 && end != highest+1 {
		return a, fmt.Errorf("an attribute ends at cluster %d, its runs at %d", highest+1, end)
	}
	return a, nil
}

// decode reads a list of runs: lengths and distances, each in as few bytes as
// it takes. One without a distance is nowhere.
func (v *volume) decode(b []byte, vcn int64) (out runs, err error) {
	bad := errors.New("a list of runs is of no known form")
	to := int64(0)
	for {
		if len(b) == 0 {
			return nil, bad
		}
		if b[0] == 0 {
			return out, nil
		}
		ln, dn := int(b[0]&15), int(b[0]>>4)
		if ln == 0 || ln > 8 || dn > 8 || 1+ln+dn > len(b) || len(out) >= maxRuns {
			return nil, bad
		}
		n, d := signed(b[1:][:ln]), signed(b[1+ln:][:dn])
		b = b[1+ln+dn:]
		if n <= 0 || n > 1<<50 || vcn > 1<<51 {
			return nil, bad
		}
		r := run{vcn, -1, n}
		if dn > 0 {
			if d < -to || d > v.clusters-to {
				return nil, bad
			}
			if to += d; n > v.clusters-to {
				return nil, bad
			}
			r.to = to
		}
		out = append(out, r)
		vcn += n
	}
}

func signed(b []byte) (n int64) {
	if len(b) > 0 && b[len(b)-1]&0x80 != 0 {
		n = -1
	}
	for i := len(b) - 1; i >= 0; i-- {
		n = n<<8 | int64(b[i])
	}
	return n
}

// only returns the unnamed attribute of a kind that a record must have.
func (v *volume) only(b []byte, kind uint32) (a attribute, err error) { return v.named(b, kind, "") }

func (v *volume) named(b []byte, kind uint32, name string) (a attribute, err error) {
	found := 0
	err = v.attributes(b, func(x attribute) error {
		if x.kind == kind && x.name == name {
			a = x
			found++
		}
		return nil
	})
	if err == nil && found != 1 {
		err = fmt.Errorf("the file has %d attributes of type %#x", found, kind)
	}
	if err == nil && a.away && a.lowest != 0 {
		err = errors.New("an attribute begins elsewhere")
	}
	return a, err
}

// stream is the content of a file.
type stream struct {
	v     *volume
	value []byte
	runs  runs
	size  int64 // bytes that can be read
}

// content opens the data of a file that one record describes, all of it written.
func (v *volume) content(i int64) (stream, error) {
	b, err := v.file(i)
	if err != nil {
		return stream{}, err
	}
	a, err := v.only(b, attrData)
	if err != nil {
		return stream{}, err
	}
	return v.stream(a)
}

func (v *volume) stream(a attribute) (stream, error) {
	switch {
	case a.flags != 0:
		return stream{}, errors.New("it is compressed, sparse or encrypted")
	case !a.away:
		return stream{v: v, value: a.value, size: int64(len(a.value))}, nil
	case a.runs.end() < (a.initialized+v.cluster-1)/v.cluster:
		return stream{}, errors.New("it is in more pieces than one record describes")
	}
	return stream{v: v, runs: a.runs, size: a.initialized}, nil
}

func (s stream) readAt(p []byte, off int64) error {
	if off < 0 || off > s.size || int64(len(p)) > s.size-off {
		return fmt.Errorf("%d bytes at %d of %d", len(p), off, s.size)
	}
	if s.runs == nil {
		copy(p, s.value[off:])
		return nil
	}
	return s.v.read(s.runs, p, off)
}

// read fills p from the clusters of runs.
func (v *volume) read(rs runs, p []byte, off int64) error {
	for _, r := range rs {
		start, end := r.vcn*v.cluster, (r.vcn+r.n)*v.cluster
		if off >= end {
			continue
		}
		if off < start || r.to < 0 {
			return errors.New("a part of it is nowhere")
		}
		n := min(int64(len(p)), end-off)
		if err := layout.Read(v.r, p[:n], r.to*v.cluster+off-start); err != nil {
			return err
		}
		if p, off = p[n:], off+n; len(p) == 0 {
			return nil
		}
	}
	return errors.New("a part of it is missing")
}
