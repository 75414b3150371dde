package ntfs

import (
	"errors"
	"strings"
)

// lookup finds a file in the root directory, whatever the case of its name,
// and returns its number, -1 when there is none. It looks at every block of
// the index rather than trust its order.
func (v *volume) lookup(name string) (int64, error) {
	b, err := v.file(fileRoot)
	if err != nil {
		return -1, err
	}
	listed := false
	err = v.attributes(b, func(a attribute) error {
		listed = listed || a.kind == attrList
		return nil
	})
	if err != nil {
		return -1, err
	}
	if listed {
		return -1, errors.New("it is in more pieces than one record describes")
	}
	root, err := v.named(b, attrIndexRoot, "$I30")
	if err != nil {
		return -1, err
	}
	if root.away || len(root.value) < 32 {
		return -1, errors.New("its index is of no known form")
	}
	n, err := entries(root.value[16:], name)
	if n >= 0 || err != nil || root.value[28]&1 == 0 { // small: nothing beside the root
		return n, err
	}
	a, err := v.named(b, attrIndex, "$I30")
	if err != nil {
		return -1, err
	}
	if !a.away {
		return -1, errors.New("its index is of no known form")
	}
	s, err := v.stream(a)
	if err != nil {
		return -1, err
	}
	if s.size > indexMost*v.index {
		return -1, errors.New("it is too large to be searched")
	}
	block := make([]byte, v.index)
	for at := int64(0); at+v.index <= s.size; at += v.index {
		if err := s.readAt(block, at); err != nil {
			return -1, err
		}
		if err := unfix(block, "INDX"); errors.Is(err, errNotRecord) {
			continue // never used
		} else if err != nil {
			return -1, err
		}
		if n, err := entries(block[24:], name); n >= 0 || err != nil {
			return n, err
		}
	}
	return -1, nil
}

// entries looks for name in the entries of an index node, of which b is the header and what follows.
func entries(b []byte, name string) (int64, error) {
	bad := errors.New("its index is of no known form")
	at, end := int64(le.Uint32(b)), int64(le.Uint32(b[4:]))
	if at < 16 || end > int64(len(b)) {
		return -1, bad
	}
	for at+16 <= end {
		e := b[at:end]
		n, key, flags := int64(le.Uint16(e[8:])), int64(le.Uint16(e[10:])), le.Uint16(e[12:])
		if n < 16 || n > int64(len(e)) || 16+key > n {
			return -1, bad
		}
		if flags&2 != 0 { // the last one, without a key
			return -1, nil
		}
		if key >= 66 {
			k := e[16:][:key]
			if c := int64(k[64]); 66+2*c <= key && strings.EqualFold(wide(k[66:][:2*c]), name) {
				return int64(le.Uint64(e) & (1<<48 - 1)), nil
			}
		}
		at += n
	}
	return -1, bad
}
