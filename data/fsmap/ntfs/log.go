package ntfs

import (
	"errors"
	"fmt"

	"forerun/data/fsmap/internal/layout"
)

const (
	restartClean = 0x2    // flag of a restart area: the volume was dismounted
	noClient     = 0xffff // nobody uses the log
	emptyLook    = 64 << 10
)

// restart is what a restart page of the log says.
type restart struct {
	lsn   int64
	major int
	clean bool
}

// cleanLog is nil when $LogFile says that the volume was dismounted, or says
// nothing at all.
//
// Windows since 8 writes version 2.0 while a volume is mounted, and 1.1 again
// when it dismounts it: after a shutdown for a fast start 2.0 is left.
func (v *volume) cleanLog() (empty bool, err error) {
	s, err := v.content(fileLog)
	if err != nil {
		return false, fmt.Errorf("$LogFile: %w", err)
	}
	b := make([]byte, min(emptyLook, s.size))
	if len(b) < 2*4096 {
		return false, fmt.Errorf("$LogFile has %d bytes", s.size)
	}
	if err := s.readAt(b, 0); err != nil {
		return false, fmt.Errorf("$LogFile: %w", err)
	}
	empty = true
	for _, c := range b {
		empty = empty && c == 0xff
	}
	if empty {
		return true, nil
	}
	if string(b[:4]) != "RSTR" {
		return false, ErrDirty // CHKD: changed by chkdsk, and not mounted since
	}
	page := int64(le.Uint32(b[16:]))
	if !layout.Power(page, 512, emptyLook/2) || 2*page > int64(len(b)) {
		return false, fmt.Errorf("$LogFile has pages of %d bytes", page)
	}
	newest, err := parseRestart(b[:page])
	if err != nil {
		return false, fmt.Errorf("$LogFile: %w", err)
	}
	// One of the two pages may be older, or never have been written.
	if second := b[page : 2*page]; string(second[:4]) == "RSTR" {
		r, err := parseRestart(second)
		if err != nil {
			return false, fmt.Errorf("$LogFile: %w", err)
		}
		if r.lsn > newest.lsn {
			newest = r
		}
	}
	if !newest.clean || newest.major != 1 {
		return false, ErrDirty
	}
	return false, nil
}

func parseRestart(b []byte) (r restart, err error) {
	if err := unfix(b, "RSTR"); err != nil {
		return r, err
	}
	at := int(le.Uint16(b[24:]))
	if at < 30 || at%8 != 0 || at+48 > len(b) || at+48 > 510 {
		return r, errors.New("its restart area is not where it can be")
	}
	a := b[at:]
	return restart{lsn: int64(le.Uint64(a)), major: int(le.Uint16(b[28:])),
		clean: le.Uint16(a[14:])&restartClean != 0 || le.Uint16(a[12:]) == noClient}, nil
}
