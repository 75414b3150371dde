package sector

import "errors"

var (
	errRange  = errors.New("the offset and length are not a range")
	errBeyond = errors.New("the range ends beyond the end of the disk")
	errAlign  = errors.New("the range is not whole sectors of 512 bytes")
)

// ErrPad is the cause of refusing bytes behind the end of the content.
var ErrPad = errors.New("bytes other than zero behind the end of the content: its length is not a multiple of 512 and nothing is kept in the rest of the last sector")
