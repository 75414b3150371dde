package fill

// Order decides what the background asks for next. It is pure: it holds a
// position and is told what is absent. Today it is a sweep in disk order that
// starts again at the front when it has passed the end, because chunks behind
// it may have become absent again.
type Order struct {
	cursor int64 // next chunk the sweep looks at
	end    int64 // chunks of the volume
}

// NewOrder returns a sweep over a volume of the given number of chunks.
func NewOrder(chunks int64) *Order { return &Order{end: chunks} }

// Cursor is the first chunk the sweep has not passed.
func (o *Order) Cursor() int64 { return o.cursor }

// Next appends to dst up to most chunks to ask for, given absent, which
// appends up to most absent chunks at or after from in ascending order. None
// means that nothing from the cursor to limit is absent; the cursor then
// stands at limit.
func (o *Order) Next(dst []int64, limit int64, most int, absent func(dst []int64, from int64, most int) []int64) []int64 {
	had := len(dst)
	dst = absent(dst, o.cursor, most)
	for i := had; i < len(dst); i++ {
		if dst[i] >= limit {
			dst = dst[:i]
			break
		}
	}
	if len(dst) == had {
		o.cursor = max(o.cursor, limit)
		return dst
	}
	o.cursor = dst[len(dst)-1] + 1
	return dst
}

// Wrap goes back to the front when the sweep is at the end, and says whether
// it was.
func (o *Order) Wrap() bool {
	if o.cursor < o.end {
		return false
	}
	o.cursor = 0
	return true
}
