package nbdproto

import "encoding/binary"

// Lengths in bytes of the fixed parts of messages.
const (
	ServerHelloLen    = 18 // magic, option magic, handshake flags
	ClientFlagsLen    = 4
	OptionLen         = 16 // option magic, option, length
	OptionReplyLen    = 20 // reply magic, option, reply type, length
	ExportNameReply   = 10 // size, transmission flags; 124 zeros more without FlagCNoZeroes
	ExportNamePadding = 124
	OffsetDataLen     = 8  // offset, before the data of a ReplyTypeOffsetData chunk
	OffsetHoleLen     = 12 // offset, hole size
	ErrorLen          = 6  // error number, message length, before the message of an error chunk
)

var be = binary.BigEndian

// Request is the header of a request in the transmission phase.
type Request struct {
	Flags, Type uint16
	Cookie      uint64
	Offset      uint64 // bytes
	Length      uint32 // bytes; that many follow the header of a CmdWrite
}

// Append appends the RequestLen bytes of r to dst.
func (r Request) Append(dst []byte) []byte {
	dst = be.AppendUint32(dst, RequestMagic)
	dst = be.AppendUint16(dst, r.Flags)
	dst = be.AppendUint16(dst, r.Type)
	dst = be.AppendUint64(dst, r.Cookie)
	dst = be.AppendUint64(dst, r.Offset)
	return be.AppendUint32(dst, r.Length)
}

// ParseRequest reads a request from the first RequestLen bytes of b, which
// must have that many. It answers false for another magic number.
func ParseRequest(b []byte) (Request, bool) {
	_ = b[RequestLen-1]
	return Request{
		Flags: be.Uint16(b[4:]), Type: be.Uint16(b[6:]), Cookie: be.Uint64(b[8:]),
		Offset: be.Uint64(b[16:]), Length: be.Uint32(b[24:]),
	}, be.Uint32(b) == RequestMagic
}

// SimpleReply is a whole simple reply, or the header of one that carries data.
type SimpleReply struct {
	Errno  uint32
	Cookie uint64
}

// Put writes r to the first SimpleReplyLen bytes of b.
func (r SimpleReply) Put(b []byte) {
	_ = b[SimpleReplyLen-1]
	be.PutUint32(b, SimpleReplyMagic)
	be.PutUint32(b[4:], r.Errno)
	be.PutUint64(b[8:], r.Cookie)
}

// ParseSimpleReply reads a simple reply from the first SimpleReplyLen bytes of
// b. It answers false for another magic number.
func ParseSimpleReply(b []byte) (SimpleReply, bool) {
	_ = b[SimpleReplyLen-1]
	return SimpleReply{Errno: be.Uint32(b[4:]), Cookie: be.Uint64(b[8:])}, be.Uint32(b) == SimpleReplyMagic
}

// Chunk is the header of a structured reply chunk.
type Chunk struct {
	Flags, Type uint16
	Cookie      uint64
	Length      uint32 // bytes of payload that follow
}

// Put writes c to the first StructuredReplyLen bytes of b.
func (c Chunk) Put(b []byte) {
	_ = b[StructuredReplyLen-1]
	be.PutUint32(b, StructuredReplyMagic)
	be.PutUint16(b[4:], c.Flags)
	be.PutUint16(b[6:], c.Type)
	be.PutUint64(b[8:], c.Cookie)
	be.PutUint32(b[16:], c.Length)
}

// ParseChunk reads the header of a chunk from the first StructuredReplyLen
// bytes of b. It answers false for another magic number.
func ParseChunk(b []byte) (Chunk, bool) {
	_ = b[StructuredReplyLen-1]
	return Chunk{
		Flags: be.Uint16(b[4:]), Type: be.Uint16(b[6:]), Cookie: be.Uint64(b[8:]), Length: be.Uint32(b[16:]),
	}, be.Uint32(b) == StructuredReplyMagic
}

// AppendOption appends an option and its data, as the client sends them.
func AppendOption(dst []byte, opt uint32, data []byte) []byte {
	dst = be.AppendUint64(dst, OptMagic)
	dst = be.AppendUint32(dst, opt)
	dst = be.AppendUint32(dst, uint32(len(data)))
	return append(dst, data...)
}

// ParseOption reads an option's number and the length of its data in bytes
// from the first OptionLen bytes of b. It answers false for another magic number.
func ParseOption(b []byte) (opt, length uint32, ok bool) {
	_ = b[OptionLen-1]
	return be.Uint32(b[8:]), be.Uint32(b[12:]), be.Uint64(b) == OptMagic
}

// AppendOptionReply appends a reply to an option, as the server sends it.
func AppendOptionReply(dst []byte, opt, typ uint32, data []byte) []byte {
	dst = be.AppendUint64(dst, RepMagic)
	dst = be.AppendUint32(dst, opt)
	dst = be.AppendUint32(dst, typ)
	dst = be.AppendUint32(dst, uint32(len(data)))
	return append(dst, data...)
}

// ParseOptionReply reads the option, the reply type and the length of the data
// in bytes from the first OptionReplyLen bytes of b. It answers false for
// another magic number.
func ParseOptionReply(b []byte) (opt, typ, length uint32, ok bool) {
	_ = b[OptionReplyLen-1]
	return be.Uint32(b[8:]), be.Uint32(b[12:]), be.Uint32(b[16:]), be.Uint64(b) == RepMagic
}

// AppendInfo appends the data of OptInfo or OptGo.
func AppendInfo(dst []byte, export string, infos ...uint16) []byte {
	dst = be.AppendUint32(dst, uint32(len(export)))
	dst = append(dst, export...)
	dst = be.AppendUint16(dst, uint16(len(infos)))
	for _, i := range infos {
		dst = be.AppendUint16(dst, i)
	}
	return dst
}

// ParseInfo reads the data of OptInfo or OptGo. It answers false when the
// lengths inside do not add up to those of data.
func ParseInfo(data []byte) (export string, infos []uint16, ok bool) {
	name, rest, ok := cutString(data)
	if !ok || len(rest) < 2 {
		return "", nil, false
	}
	n := int(be.Uint16(rest))
	rest = rest[2:]
	if len(rest) != 2*n {
		return "", nil, false
	}
	for ; len(rest) > 0; rest = rest[2:] {
		infos = append(infos, be.Uint16(rest))
	}
	return name, infos, true
}

// AppendMetaContext appends the data of OptListMetaContext or OptSetMetaContext.
func AppendMetaContext(dst []byte, export string, queries ...string) []byte {
	dst = be.AppendUint32(dst, uint32(len(export)))
	dst = append(dst, export...)
	dst = be.AppendUint32(dst, uint32(len(queries)))
	for _, q := range queries {
		dst = be.AppendUint32(dst, uint32(len(q)))
		dst = append(dst, q...)
	}
	return dst
}

// ParseMetaContext reads the data of OptListMetaContext or OptSetMetaContext.
// It answers false when the lengths inside do not add up to those of data.
func ParseMetaContext(data []byte) (export string, queries []string, ok bool) {
	name, rest, ok := cutString(data)
	if !ok || len(rest) < 4 {
		return "", nil, false
	}
	n := be.Uint32(rest)
	rest = rest[4:]
	if uint64(n)*4 > uint64(len(rest)) {
		return "", nil, false
	}
	for range n {
		var q string
		if q, rest, ok = cutString(rest); !ok {
			return "", nil, false
		}
		queries = append(queries, q)
	}
	return name, queries, len(rest) == 0
}

// cutString cuts a string with a length of 32 bits before it off b. Strings
// longer than MaxString are no strings.
func cutString(b []byte) (s string, rest []byte, ok bool) {
	if len(b) < 4 {
		return "", nil, false
	}
	n := be.Uint32(b)
	b = b[4:]
	if n > MaxString || uint64(n) > uint64(len(b)) {
		return "", nil, false
	}
	return string(b[:n]), b[n:], true
}
