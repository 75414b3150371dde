package writeback

import (
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"forerun/block"
	"forerun/internal/chunk"
)

// The types of message. SPEC.md has them; the numbers never change.
const (
	typHello   = 1
	typBegin   = 2
	typData    = 3
	typProbe   = 4
	typCommit  = 5
	typApplied = 6
	typReport  = 7
	typRelease = 8
	typDiscard = 9
)

// version of the protocol, in hello and begin.
const version = 1

// nonce tells one cut from another that was given the same id.
type nonce [16]byte

func (n nonce) String() string { return hex.EncodeToString(n[:]) }

// MarshalText gives hexadecimal digits.
func (n nonce) MarshalText() ([]byte, error) { return []byte(n.String()), nil }

// UnmarshalText reads what MarshalText gives.
func (n *nonce) UnmarshalText(b []byte) error {
	if len(b) != 2*len(n) {
		return fmt.Errorf("%d digits where %d are due", len(b), 2*len(n))
	}
	_, err := hex.Decode(n[:], b)
	return err
}

// checkpointID names a checkpoint of a group.
type checkpointID struct {
	ID    uint64 `json:"id"`
	Nonce nonce  `json:"nonce"`
}

type helloRequest struct {
	Version int      `json:"version"`
	Group   string   `json:"group"`
	Volumes []string `json:"volumes"`
}

type helloVolume struct {
	// Known: changes of this volume were stored here.
	Known    bool `json:"known"`
	Released bool `json:"released"`
	Forced   bool `json:"forced"` // released without its frontend
	// Damaged: everything must be compared.
	Damaged bool   `json:"damaged"`
	Epoch   uint64 `json:"epoch"`
	Node    string `json:"node"`
}

type helloAnswer struct {
	// Last was stored most recently; id 0 for none.
	Last    checkpointID           `json:"last"`
	Applied uint64                 `json:"applied"`
	Volumes map[string]helloVolume `json:"volumes"`
}

type beginVolume struct {
	Name  string `json:"name"`
	Epoch uint64 `json:"epoch"`
	Size  int64  `json:"size"`
	// Full: everything that may differ from the source is sent or compared.
	Full bool `json:"full,omitempty"`
}

type beginRequest struct {
	Version int    `json:"version"`
	Group   string `json:"group"`
	checkpointID
	Volumes []beginVolume `json:"volumes"`
}

type beginAnswer struct {
	Stored bool   `json:"stored"` // nothing is left to do
	Handle uint64 `json:"handle"`
	Next   uint32 `json:"next"` // the first piece that is not here
}

type commitRequest struct {
	Group string `json:"group"`
	checkpointID
	Handle uint64    `json:"handle"`
	Pieces uint32    `json:"pieces"`
	Sum    string    `json:"digest"` // over the signatures of the pieces
	Cut    time.Time `json:"cut"`    // by the frontend's clock
}

type appliedRequest struct {
	Group string `json:"group"`
	ID    uint64 `json:"id"`
}

type appliedAnswer struct {
	Applied bool   `json:"applied"`
	Reason  string `json:"reason,omitempty"`
}

// Unwritten is what a volume has that its source lacks, as its frontend knows it.
type Unwritten struct {
	Bytes int64 `json:"bytes"` // written since the last checkpoint
	// Oldest is a moment before the oldest of these writes, by the frontend's
	// clock; zero when there are none.
	Oldest time.Time `json:"oldest,omitzero"`
}

type reportVolume struct {
	Name  string `json:"name"`
	Epoch uint64 `json:"epoch"`
	Unwritten
}

type reportRequest struct {
	Group   string         `json:"group"`
	Volumes []reportVolume `json:"volumes"`
}

type releaseRequest struct {
	Group  string `json:"group"`
	Volume string `json:"volume"`
	Epoch  uint64 `json:"epoch"`
	ID     uint64 `json:"id"` // the checkpoint that has everything
}

func invalid(op, object, format string, a ...any) error {
	return block.E(op, object, block.KindInvalid, fmt.Errorf(format, a...))
}

// checkName refuses what cannot be the name of a group or volume.
func checkName(op, name string) error {
	if name == "" || len(name) > 255 || strings.ContainsAny(name, "/\x00") {
		return invalid(op, "", "%q is no name of a volume or group: it is empty, too long, or has a slash", name)
	}
	return nil
}

func decode(op string, p []byte, to any) error {
	if err := json.Unmarshal(p, to); err != nil {
		return invalid(op, "", "the request cannot be read: %w", err)
	}
	return nil
}

func encode(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // plain structs only
	}
	return b
}

func (q *helloRequest) check() error {
	if q.Version != version {
		return block.E("writeback.hello", q.Group, block.KindUnsupported, fmt.Errorf("version %d is not spoken here; run the same release on both sides", q.Version))
	}
	if len(q.Volumes) == 0 || len(q.Volumes) > maxVolumes {
		return invalid("writeback.hello", q.Group, "%d volumes; 1 to %d are possible", len(q.Volumes), maxVolumes)
	}
	for _, v := range q.Volumes {
		if err := checkName("writeback.hello", v); err != nil {
			return err
		}
	}
	return checkName("writeback.hello", q.Group)
}

func (q *beginRequest) check() error {
	if q.Version != version {
		return block.E("writeback.begin", q.Group, block.KindUnsupported, fmt.Errorf("version %d is not spoken here; run the same release on both sides", q.Version))
	}
	if len(q.Volumes) == 0 || len(q.Volumes) > maxVolumes || q.ID == 0 {
		return invalid("writeback.begin", q.Group, "checkpoint %d of %d volumes", q.ID, len(q.Volumes))
	}
	seen := map[string]bool{}
	for _, v := range q.Volumes {
		if err := checkName("writeback.begin", v.Name); err != nil {
			return err
		}
		if seen[v.Name] || v.Size <= 0 {
			return invalid("writeback.begin", q.Group, "volume %s of %d bytes, perhaps named twice", v.Name, v.Size)
		}
		seen[v.Name] = true
	}
	return checkName("writeback.begin", q.Group)
}

// dataHead is what stands before a packed piece.
const dataHead = 12

func appendDataHead(b []byte, handle uint64, index uint32) []byte {
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint64(b, handle), index)
}

func parseData(p []byte) (handle uint64, index uint32, packed []byte, err error) {
	if len(p) < dataHead {
		return 0, 0, nil, invalid("writeback.data", "", "a piece of %d bytes", len(p))
	}
	return binary.BigEndian.Uint64(p), binary.BigEndian.Uint32(p[8:]), p[dataHead:], nil
}

const (
	probeHead = 8
	probeLen  = 20 // of one entry, without the signature
	maxProbes = 1024
	// maxProbeData bounds what one probe makes the backend read.
	maxProbeData = 8 << 20
)

// probe asks whether a range of a source has certain bytes, or is zeros.
type probe struct {
	extent
	sig chunk.Sig // of the bytes, unless they are zeros
}

func appendProbe(b []byte, p probe) []byte {
	be := binary.BigEndian
	b = be.AppendUint16(b, uint16(p.vol))
	b = append(b, byte(p.kind), 0)
	b = be.AppendUint64(b, uint64(p.off))
	b = be.AppendUint64(b, uint64(p.n))
	if p.kind == kindData {
		b = append(b, p.sig[:]...)
	}
	return b
}

func parseProbes(p []byte, vols func(handle uint64) ([]bounds, error)) (all []probe, err error) {
	const op = "writeback.probe"
	if len(p) < probeHead {
		return nil, invalid(op, "", "a request of %d bytes", len(p))
	}
	be := binary.BigEndian
	limits, err := vols(be.Uint64(p))
	if err != nil {
		return nil, err
	}
	total := int64(0)
	for p = p[probeHead:]; len(p) > 0; {
		if len(p) < probeLen || len(all) == maxProbes {
			return nil, invalid(op, "", "entry %d is cut off or too many", len(all))
		}
		q := probe{extent: extent{vol: int(be.Uint16(p)), kind: kind(p[2])}}
		off, n := be.Uint64(p[4:]), be.Uint64(p[12:])
		if q.vol >= len(limits) || q.kind > kindHole || p[3] != 0 {
			return nil, invalid(op, "", "an entry of kind %d for volume %d of %d", q.kind, q.vol, len(limits))
		}
		v := limits[q.vol]
		if n == 0 || off > uint64(v.size) || n > uint64(v.size)-off || v.block > 1 && (off|n)&uint64(v.block-1) != 0 {
			return nil, block.E(op, "", block.KindRange, fmt.Errorf("%d bytes at %d of a volume of %d bytes", n, off, v.size))
		}
		q.off, q.n = int64(off), int64(n)
		p = p[probeLen:]
		if q.kind == kindData {
			if total += q.n; total > maxProbeData || q.n > chunk.MaxSize || len(p) < chunk.SigLen {
				return nil, invalid(op, "", "entry %d is cut off or too long", len(all))
			}
			copy(q.sig[:], p)
			p = p[chunk.SigLen:]
		}
		all = append(all, q)
	}
	if len(all) == 0 {
		return nil, invalid(op, "", "it asks nothing")
	}
	return all, nil
}

var errFormat = errors.New("the bytes do not match their checksum")

func appendHandle(b []byte, handle uint64) []byte { return binary.BigEndian.AppendUint64(b, handle) }

// discardRequest ends a clone.
type discardRequest struct {
	Volume string `json:"volume"`
	Clone  string `json:"clone"`
}
