package fence

import (
	"encoding/binary"
	"fmt"
	"slices"
	"time"

	"forerun/block"
)

// maxRequest bounds what a request or answer can be: all names at their longest.
const maxRequest = 8 << 10

func malformed(what string) error {
	return &block.Error{Op: "fence.parse", Kind: block.KindInvalid, Err: fmt.Errorf("malformed %s", what)}
}

func appendString(b []byte, s string) []byte {
	return append(append(b, byte(len(s))), s...)
}

func appendStrings(b []byte, l []string) []byte {
	b = append(b, byte(len(l)))
	for _, s := range l {
		b = appendString(b, s)
	}
	return b
}

// cursor takes fields off a message; after the first that is not there all are empty.
type cursor struct {
	b   []byte
	bad bool
}

func (c *cursor) take(n int) []byte {
	if c.bad || len(c.b) < n {
		c.bad = true
		return make([]byte, n)
	}
	p := c.b[:n]
	c.b = c.b[n:]
	return p
}

func (c *cursor) u8() uint8   { return c.take(1)[0] }
func (c *cursor) u16() uint16 { return binary.BigEndian.Uint16(c.take(2)) }
func (c *cursor) u32() uint32 { return binary.BigEndian.Uint32(c.take(4)) }
func (c *cursor) u64() uint64 { return binary.BigEndian.Uint64(c.take(8)) }
func (c *cursor) string() string {
	n := int(c.u8())
	if c.bad {
		return ""
	}
	return string(c.take(n))
}

func (c *cursor) strings() []string {
	n := int(c.u8())
	if n > maxMembers {
		c.bad = true
	}
	var l []string
	for range n {
		if c.bad {
			return nil
		}
		l = append(l, c.string())
	}
	return l
}

// end says whether all was there and nothing more.
func (c *cursor) end() bool { return !c.bad && len(c.b) == 0 }

func appendRequest(b []byte, q request) []byte {
	flag := byte(0)
	if q.flag {
		flag = 1
	}
	b = appendString(b, q.volume)
	b = appendString(b, q.node)
	b = binary.BigEndian.AppendUint64(b, q.epoch)
	b = binary.BigEndian.AppendUint64(b, q.version)
	return appendStrings(append(b, flag), q.members)
}

// parseRequest reads a request and checks that it makes sense.
func parseRequest(typ uint8, p []byte) (request, error) {
	if len(p) > maxRequest {
		return request{}, malformed("request: it is too long")
	}
	c := cursor{b: p}
	q := request{op: op(typ), volume: c.string(), node: c.string(), epoch: c.u64(), version: c.u64()}
	flag := c.u8()
	q.members = c.strings()
	q.flag = flag == 1
	if !c.end() || flag > 1 || !nameOK(q.volume) || !nameOK(q.node) {
		return request{}, malformed("request")
	}
	if q.flag && q.op != opTakeover && q.op != opHandover {
		return request{}, malformed("request: a flag that means nothing here")
	}
	switch q.op {
	case opGet, opClaim, opRenew, opTakeover, opDrop:
		if len(q.members) > 0 {
			return request{}, malformed("request: members that mean nothing here")
		}
	case opSetMembers:
		if !membersOK(q.members) || !slices.Contains(q.members, q.node) {
			return request{}, malformed("request: members have to be sorted, each once, the primary among them")
		}
	case opHandover:
		if len(q.members) != 1 || !nameOK(q.members[0]) {
			return request{}, malformed("request: a handover goes to one node")
		}
	default:
		return request{}, &block.Error{Op: "fence.parse", Kind: block.KindUnsupported,
			Err: fmt.Errorf("request %d is not known to this arbiter; is it an older version?", typ)}
	}
	return q, nil
}

func appendAnswer(b []byte, a answer, r Record) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(a.kind))
	b = binary.BigEndian.AppendUint32(b, uint32(a.wait/time.Millisecond))
	return append(appendRecord(b, r), a.text...)
}

// appendRecord appends a record without its volume.
func appendRecord(b []byte, r Record) []byte {
	b = binary.BigEndian.AppendUint64(b, r.Epoch)
	b = binary.BigEndian.AppendUint64(b, r.Version)
	b = append(b, byte(slices.Index(causes, r.Cause)))
	b = appendString(b, r.Primary)
	b = appendString(b, r.Preferred)
	return appendStrings(b, r.Members)
}

// causes by their numbers in messages and files.
var causes = []Cause{"", CauseClaim, CauseTakeover, CauseForce, CauseHandover}

func (c *cursor) record(volume string) Record {
	r := Record{Volume: volume, Epoch: c.u64(), Version: c.u64()}
	if n := int(c.u8()); n < len(causes) {
		r.Cause = causes[n]
	} else {
		c.bad = true
	}
	r.Primary, r.Preferred, r.Members = c.string(), c.string(), c.strings()
	return r
}

// parseAnswer reads an answer about a volume. The record has epoch 0 when
// nobody ever claimed it and no primary when it was dropped.
func parseAnswer(volume string, p []byte) (answer, Record, error) {
	if len(p) > maxRequest {
		return answer{}, Record{}, malformed("answer: it is too long")
	}
	c := cursor{b: p}
	a := answer{kind: block.Kind(c.u16()), wait: time.Duration(c.u32()) * time.Millisecond}
	r := c.record(volume)
	if c.bad {
		return answer{}, Record{}, malformed("answer")
	}
	a.text = string(c.b)
	if a.kind > block.KindExists {
		a.kind = block.KindIO
	}
	if r.Epoch == 0 && r.Version == 0 && r.Primary == "" && len(r.Members) == 0 && r.Preferred == "" && r.Cause == "" {
		return a, r, nil
	}
	if err := r.check(); err != nil {
		return answer{}, Record{}, malformed("answer: " + err.Error())
	}
	return a, r, nil
}
