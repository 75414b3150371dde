package chunk

import (
	"fmt"
	"io"
	"math/bits"

	"github.com/buildbarn/go-cdc"
)

// MinPiece is the least length in bytes of a piece, but for a region shorter
// than twice that of its volume's pieces, which is one piece.
const MinPiece = 3 << 10

// Cutter cuts regions of one size into pieces by their content: bytes that
// moved are cut in the same places, wherever in the region they are by now.
//
// The pieces of a region of n bytes are at least 3n/64 bytes long, not less
// than MinPiece, and less than twice that; on average they are 4/3 of the least,
// so a region has about 16 (fewer below 64 KiB). Where a region ends a piece ends,
// which costs about two pieces in 16 when content moved: 13 % of the bytes are
// new then, and 100 % with chunks that are not cut by content.
//
// It is RepMaxCDC (github.com/buildbarn/go-cdc) over the whole region. Where it
// cuts decides signatures that stores keep for years, so it never changes.
type Cutter struct {
	cdc cdc.ContentDefinedChunker
}

// NewCutter makes the cutter of a volume whose chunks are regions of that many
// bytes: a power of two from MinSize to MaxSize.
func NewCutter(region int) (*Cutter, error) {
	if region < MinSize || region > MaxSize || bits.OnesCount(uint(region)) != 1 {
		return nil, fmt.Errorf("a region of %d bytes: the size must be a power of two from %d to %d", region, MinSize, MaxSize)
	}
	return &Cutter{cdc.NewRepMaxContentDefinedChunker(&cdc.FastContentDefinedChunkerGearTable, max(MinPiece, region*3/64), region)}, nil
}

// Cut appends the lengths of the pieces of plain, which is at most a region, to
// dst. It may be called from many goroutines.
func (c *Cutter) Cut(dst []int, plain []byte) []int {
	r := c.cdc.NewChunkReader(&peeker{plain})
	for {
		p, err := r.ReadNextChunk()
		if err != nil {
			return dst // the end: the peeker has no other error
		}
		dst = append(dst, len(p))
	}
}

// peeker reads bytes that are all there.
type peeker struct{ left []byte }

func (p *peeker) Peek(n int) ([]byte, error) {
	if n > len(p.left) {
		return p.left, io.EOF
	}
	return p.left[:n], nil
}

func (p *peeker) Discard(n int) (int, error) {
	p.left = p.left[n:]
	return n, nil
}
