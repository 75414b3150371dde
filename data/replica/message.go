package replica

import (
	"encoding/binary"
	"errors"
	"fmt"

	"forerun/block"
	"forerun/data/fence"
	"forerun/internal/msg"
)

// Types of messages; see SPEC.md. The numbers are part of the protocol.
const (
	typOpen   uint8 = 32 // primary: begin a session
	typWrite  uint8 = 33
	typZero   uint8 = 34
	typTrim   uint8 = 35
	typFlush  uint8 = 36
	typRanges uint8 = 37 // what was changed behind the hold
	typHash   uint8 = 38
	typSettle uint8 = 39 // all was copied: flush, and count as whole
	typMark   uint8 = 40 // position of the journal
	typHold   uint8 = 41 // flush, then hold

	typFwdOpen     uint8 = 48 // secondary: begin to forward changes
	typFwdWrite    uint8 = 49
	typFwdZero     uint8 = 50
	typFwdTrim     uint8 = 51
	typFwdFlush    uint8 = 52
	typFwdRead     uint8 = 53
	typFwdExtents  uint8 = 54
	typFwdPrefetch uint8 = 55

	typBeat   uint8 = msg.Urgent + 32 // primary: alive
	typAsk    uint8 = msg.Urgent + 33 // restarted primary: what do you know?
	typOffice uint8 = msg.Urgent + 34 // primary: you are primary now, I have stopped
)

// bodyLen is the length of a range message behind the volume's name.
const bodyLen = 8 + 8 + 8 + 4

// body is what range messages say: the session, a range, flags.
type body struct {
	token  uint64
	off, n int64
	flags  block.Flags
}

func (b body) append(p []byte) []byte {
	p = binary.BigEndian.AppendUint64(p, b.token)
	p = binary.BigEndian.AppendUint64(p, uint64(b.off))
	p = binary.BigEndian.AppendUint64(p, uint64(b.n))
	return binary.BigEndian.AppendUint32(p, uint32(b.flags))
}

var errShort = block.E("replica.message", "", block.KindInvalid, errors.New("the other node's message is malformed; do both run the same version?"))

// parseBody reads what append wrote; rest is what follows.
func parseBody(p []byte) (b body, rest []byte, err error) {
	if len(p) < bodyLen {
		return b, nil, errShort
	}
	be := binary.BigEndian
	b = body{be.Uint64(p), int64(be.Uint64(p[8:])), int64(be.Uint64(p[16:])), block.Flags(be.Uint32(p[24:]))}
	if b.off < 0 || b.n < 0 || b.off > 1<<62 || b.n > 1<<62 || !b.flags.Valid() {
		return b, nil, errShort
	}
	return b, p[bodyLen:], nil
}

// state is what open, beat, ask and office say, and their answers.
type state struct {
	node   string // who says so
	rec    fence.Record
	token  uint64
	inSync bool // beat: you are in sync; answers: what is here is whole
	agreed bool // answers: the session is the current one, or the primary was accepted
}

func (s state) append(p []byte) []byte {
	be := binary.BigEndian
	str := func(s string) {
		p = append(p, byte(len(s)))
		p = append(p, s...)
	}
	str(s.node)
	p = be.AppendUint64(p, s.rec.Epoch)
	p = be.AppendUint64(p, s.rec.Version)
	str(s.rec.Primary)
	str(s.rec.Preferred)
	str(string(s.rec.Cause))
	p = append(p, byte(min(len(s.rec.Members), 255)))
	for _, m := range s.rec.Members[:min(len(s.rec.Members), 255)] {
		str(m)
	}
	p = be.AppendUint64(p, s.token)
	f := byte(0)
	if s.inSync {
		f |= 1
	}
	if s.agreed {
		f |= 2
	}
	return append(p, f)
}

func parseState(volume string, p []byte) (s state, err error) {
	bad := false
	take := func(n int) []byte {
		if bad || len(p) < n {
			bad = true
			return make([]byte, n)
		}
		q := p[:n]
		p = p[n:]
		return q
	}
	str := func() string { return string(take(int(take(1)[0]))) }
	be := binary.BigEndian
	s.node = str()
	s.rec.Volume = volume
	s.rec.Epoch = be.Uint64(take(8))
	s.rec.Version = be.Uint64(take(8))
	s.rec.Primary = str()
	s.rec.Preferred = str()
	s.rec.Cause = fence.Cause(str())
	for range take(1)[0] {
		if bad {
			break
		}
		s.rec.Members = append(s.rec.Members, str())
	}
	s.token = be.Uint64(take(8))
	f := take(1)[0]
	s.inSync, s.agreed = f&1 != 0, f&2 != 0
	if bad {
		return s, errShort
	}
	return s, nil
}

// extentLen is the length of an extent in answers: offset, length, kind, state.
const extentLen = 18

func appendExtents(p []byte, list []block.Extent) []byte {
	for _, e := range list {
		p = binary.BigEndian.AppendUint64(p, uint64(e.Off))
		p = binary.BigEndian.AppendUint64(p, uint64(e.Len))
		p = append(p, byte(e.Kind), byte(e.State))
	}
	return p
}

func parseExtents(dst []block.Extent, p []byte) ([]block.Extent, error) {
	if len(p)%extentLen != 0 {
		return dst, errShort
	}
	for ; len(p) > 0; p = p[extentLen:] {
		e := block.Extent{Off: int64(binary.BigEndian.Uint64(p)), Len: int64(binary.BigEndian.Uint64(p[8:])),
			Kind: block.ExtentKind(p[16]), State: block.State(p[17])}
		if e.Off < 0 || e.Len <= 0 || e.Off > 1<<62 || e.Len > 1<<62 || e.Kind > block.Free || e.State > block.Modified {
			return dst, errShort
		}
		dst = append(dst, e)
	}
	return dst, nil
}

// prefix is how each message of a volume begins.
func prefix(volume string) []byte { return append([]byte{byte(len(volume))}, volume...) }

// Split takes the name of the volume off a message.
func Split(p []byte) (volume string, rest []byte, err error) {
	if len(p) < 1 || len(p) < 1+int(p[0]) {
		return "", nil, errShort
	}
	return string(p[1 : 1+p[0]]), p[1+p[0]:], nil
}

// unknown is the answer to a message for a volume that is not here.
func unknown(volume string) error {
	return block.E("replica.serve", volume, block.KindNotFound, fmt.Errorf("this node serves no volume %q (yet)", volume))
}
