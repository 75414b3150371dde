package block

// ExtentKind says what the bytes of an extent are.
type ExtentKind uint8

// The kinds of extent. The numbers travel over the wire and never change.
const (
	// Data must be read to be known.
	Data ExtentKind = 0
	// ZeroData is allocated and reads as zeros.
	ZeroData ExtentKind = 1
	// Hole is not provisioned and reads as zeros.
	Hole ExtentKind = 2
	// Free is not used by the file system on it; it still reads as whatever is there.
	Free ExtentKind = 3
)

// Zero says whether an extent of this kind reads as zeros.
func (k ExtentKind) Zero() bool { return k == ZeroData || k == Hole }

// String names the kind.
func (k ExtentKind) String() string {
	if int(k) < 4 {
		return [...]string{"data", "zero", "hole", "free"}[k]
	}
	return "invalid"
}

// State says where the bytes of an extent are in a migration. Only a volume sets it.
type State uint8

// The states of a chunk in the volume map. The numbers are part of the
// forerun:state metadata context and of formats.
const (
	// NoState: the device keeps no map.
	NoState State = 0
	// Untouched: only the source has it.
	Untouched State = 1
	// Held: verified and kept at this site.
	Held State = 2
	// ZeroState: known to read as zeros, nothing is kept.
	ZeroState State = 3
	// Modified: the workload wrote into it.
	Modified State = 4
)

// String names the state as status and nbdinfo show it.
func (s State) String() string {
	if int(s) < 5 {
		return [...]string{"none", "untouched", "held", "zero", "modified"}[s]
	}
	return "invalid"
}

// Extent is a range with a meaning.
type Extent struct {
	Off, Len int64 // bytes
	Kind     ExtentKind
	State    State
}

// End is the first byte after the extent.
func (e Extent) End() int64 { return e.Off + e.Len }

// AppendExtent appends e to dst, joining it with the last extent when they
// touch and mean the same. An empty e changes nothing.
func AppendExtent(dst []Extent, e Extent) []Extent {
	if e.Len <= 0 {
		return dst
	}
	if n := len(dst); n > 0 {
		l := &dst[n-1]
		if l.End() == e.Off && l.Kind == e.Kind && l.State == e.State {
			l.Len += e.Len
			return dst
		}
	}
	return append(dst, e)
}
