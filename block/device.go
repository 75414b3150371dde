package block

import "context"

// Device is the one wide contract of the house: a disk as its user sees it.
// All methods but Close may be called from many goroutines at once. Calls that
// overlap in time and in range have no order between them, but readers never
// see a mix inside one 512-byte sector.
//
// ctx bounds the wait, not the durability: a call that returns because ctx
// ended may have happened or not.
type Device interface {
	// Info describes the device. It is cheap, and constant while the device is open.
	Info() Info
	// ReadAt fills p with the bytes at off.
	ReadAt(ctx context.Context, p []byte, off int64, f Flags) error
	// WriteAt stores p at off. With FUA it is durable on return.
	WriteAt(ctx context.Context, p []byte, off int64, f Flags) error
	// Zero makes n bytes at off read as zeros. With MayTrim the device may
	// release the space; without it, a device that can reserve keeps it.
	Zero(ctx context.Context, off, n int64, f Flags) error
	// Trim says that the content of n bytes at off is no longer needed.
	// Every device of this project makes trimmed whole blocks read as zeros
	// or leaves them as they were; it never returns anything else.
	Trim(ctx context.Context, off, n int64, f Flags) error
	// Flush makes every write acknowledged before the call durable.
	Flush(ctx context.Context, f Flags) error
	// Extents appends to dst the extents of [off, off+n) in order, without
	// gaps, beginning exactly at off, and returns the longer slice. It may
	// cover less than n but at least one byte; it never covers more than n.
	// An extent reported as zero kind (Kind.Zero) reads as zeros now.
	Extents(ctx context.Context, dst []Extent, off, n int64, f Flags) ([]Extent, error)
	// Prefetch brings [off, off+n) near, and returns when it is, or could not be.
	// A device that is near already returns nil at once.
	Prefetch(ctx context.Context, off, n int64, f Flags) error
	// Close releases the device. It does not flush. Calls after Close fail
	// with KindClosed. Close waits for calls under way.
	Close() error
}

// Info is what a device can do and how large it is. Storeys copy the Info from
// below and change what they change.
type Info struct {
	// Size in bytes. A multiple of BlockSize.
	Size int64
	// BlockSize is the smallest addressable unit in bytes, a power of two:
	// offsets and lengths of all calls are multiples of it. 1 means any.
	BlockSize int
	// PreferredIO is the transfer size in bytes that costs least per byte, 0 if unknown.
	PreferredIO int
	// MaxIO is the largest length in bytes of one ReadAt or WriteAt, 0 for no limit.
	MaxIO int
	// ReadOnly devices refuse WriteAt, Zero and Trim with KindReadOnly.
	ReadOnly bool
	// CanTrim says that Trim releases space. Where it is false Trim is
	// accepted and does nothing.
	CanTrim bool
	// CanExtents says that Extents knows more than "all is data".
	CanExtents bool
	// ID names the content's origin, so that a disk that was swapped for
	// another one between two sessions is noticed. Empty if unknown.
	ID string
}

// Flags says how a request is to be served. It travels down every storey and
// over the wire; its numbers are part of formats and never change.
type Flags uint32

// The low two bits are the class, the others are independent.
const (
	// Demand is what the workload waits for. It goes first.
	Demand Flags = 0
	// WriteBack carries changes to the old home: below Demand, above Background.
	WriteBack Flags = 1
	// Background is work nobody waits for.
	Background Flags = 2

	// FUA: durable before return (WriteAt, Zero, Trim).
	FUA Flags = 1 << 2
	// MayTrim: Zero may release the space.
	MayTrim Flags = 1 << 3
	// Local: answer from what is known here, never cross the link
	// (Extents: what is untouched counts as data).
	Local Flags = 1 << 4
	// FastZero: Zero fails with KindUnsupported rather than being as slow as a write.
	FastZero Flags = 1 << 5
	// Soon: of its class, ahead of the rest (read-ahead goes before the sweep).
	Soon Flags = 1 << 6
	// Full: answer with the bytes, not with a signature that the asker is
	// believed to have (a fetch across the link whose signature-only answer was a wrong guess).
	Full Flags = 1 << 7

	classMask Flags = 3
	flagsMask Flags = 1<<8 - 1
)

// Class returns only the class bits: Demand, WriteBack or Background.
func (f Flags) Class() Flags { return f & classMask }

// Has says whether all bits of g are set in f.
func (f Flags) Has(g Flags) bool { return f&g == g }

// Valid says whether f holds only known bits and a known class.
func (f Flags) Valid() bool { return f&^flagsMask == 0 && f&classMask <= Background }

// String names the class, for logs and status.
func (f Flags) String() string {
	s := [...]string{"demand", "write-back", "background", "invalid"}[f&classMask]
	for _, b := range [...]struct {
		bit  Flags
		name string
	}{{FUA, "+fua"}, {MayTrim, "+may-trim"}, {Local, "+local"}, {FastZero, "+fast-zero"}, {Soon, "+soon"}, {Full, "+full"}} {
		if f&b.bit != 0 {
			s += b.name
		}
	}
	return s
}
