// Package nbdproto holds the numbers of the NBD protocol, as the NBD project's
// doc/proto.md defines them, and the mapping between its errors and ours. The
// server (data/export/nbd) and the client (data/source/nbd) share it.
//
// Names are those of the specification without the NBD_ prefix, in Go's case.
package nbdproto

import "forerun/block"

// Magic numbers of the handshake and the transmission phase.
const (
	Magic                uint64 = 0x4e42444d41474943 // "NBDMAGIC"
	OptMagic             uint64 = 0x49484156454F5054 // "IHAVEOPT"
	RepMagic             uint64 = 0x3e889045565a9
	RequestMagic         uint32 = 0x25609513
	SimpleReplyMagic     uint32 = 0x67446698
	StructuredReplyMagic uint32 = 0x668e33ef
)

// Handshake flags, server then client.
const (
	FlagFixedNewstyle  uint16 = 1 << 0
	FlagNoZeroes       uint16 = 1 << 1
	FlagCFixedNewstyle uint32 = 1 << 0
	FlagCNoZeroes      uint32 = 1 << 1
)

// Options.
const (
	OptExportName      uint32 = 1
	OptAbort           uint32 = 2
	OptList            uint32 = 3
	OptStartTLS        uint32 = 5
	OptInfo            uint32 = 6
	OptGo              uint32 = 7
	OptStructuredReply uint32 = 8
	OptListMetaContext uint32 = 9
	OptSetMetaContext  uint32 = 10
)

// Option replies.
const (
	RepAck             uint32 = 1
	RepServer          uint32 = 2
	RepInfo            uint32 = 3
	RepMetaContext     uint32 = 4
	RepFlagError       uint32 = 1 << 31
	RepErrUnsup        uint32 = 1<<31 | 1
	RepErrPolicy       uint32 = 1<<31 | 2
	RepErrInvalid      uint32 = 1<<31 | 3
	RepErrPlatform     uint32 = 1<<31 | 4
	RepErrTLSReqd      uint32 = 1<<31 | 5
	RepErrUnknown      uint32 = 1<<31 | 6
	RepErrShutdown     uint32 = 1<<31 | 7
	RepErrBlockSizeReq uint32 = 1<<31 | 8
	RepErrTooBig       uint32 = 1<<31 | 9
)

// Information types of OptInfo and OptGo.
const (
	InfoExport      uint16 = 0
	InfoName        uint16 = 1
	InfoDescription uint16 = 2
	InfoBlockSize   uint16 = 3
)

// Transmission flags.
const (
	FlagHasFlags        uint16 = 1 << 0
	FlagReadOnly        uint16 = 1 << 1
	FlagSendFlush       uint16 = 1 << 2
	FlagSendFUA         uint16 = 1 << 3
	FlagRotational      uint16 = 1 << 4
	FlagSendTrim        uint16 = 1 << 5
	FlagSendWriteZeroes uint16 = 1 << 6
	FlagSendDF          uint16 = 1 << 7
	FlagCanMultiConn    uint16 = 1 << 8
	FlagSendResize      uint16 = 1 << 9
	FlagSendCache       uint16 = 1 << 10
	FlagSendFastZero    uint16 = 1 << 11
)

// Commands.
const (
	CmdRead        uint16 = 0
	CmdWrite       uint16 = 1
	CmdDisc        uint16 = 2
	CmdFlush       uint16 = 3
	CmdTrim        uint16 = 4
	CmdCache       uint16 = 5
	CmdWriteZeroes uint16 = 6
	CmdBlockStatus uint16 = 7
)

// Command flags.
const (
	CmdFlagFUA      uint16 = 1 << 0
	CmdFlagNoHole   uint16 = 1 << 1
	CmdFlagDF       uint16 = 1 << 2
	CmdFlagReqOne   uint16 = 1 << 3
	CmdFlagFastZero uint16 = 1 << 4
)

// Structured reply flags and types.
const (
	ReplyFlagDone        uint16 = 1 << 0
	ReplyTypeNone        uint16 = 0
	ReplyTypeOffsetData  uint16 = 1
	ReplyTypeOffsetHole  uint16 = 2
	ReplyTypeBlockStatus uint16 = 5
	ReplyTypeError       uint16 = 1<<15 | 1
	ReplyTypeErrorOffset uint16 = 1<<15 | 2
)

// base:allocation status bits.
const (
	StateHole uint32 = 1 << 0
	StateZero uint32 = 1 << 1
)

// Sizes and limits, in bytes, that the specification gives.
const (
	RequestLen         = 28
	SimpleReplyLen     = 16
	StructuredReplyLen = 20
	MaxString          = 4096
	MaxPayload         = 32 << 20
)

// Names of metadata contexts.
const (
	ContextAllocation = "base:allocation"
	ContextState      = "forerun:state"
)

// Error numbers of the protocol.
const (
	EPERM     uint32 = 1
	EIO       uint32 = 5
	ENOMEM    uint32 = 12
	EINVAL    uint32 = 22
	ENOSPC    uint32 = 28
	EOVERFLOW uint32 = 75
	ENOTSUP   uint32 = 95
	ESHUTDOWN uint32 = 108
)

// Errno maps the kind of an error to the protocol's number. write says whether
// the request was one that changes the device: the protocol answers those
// beyond the end with ENOSPC and others with EINVAL.
func Errno(k block.Kind, write bool) uint32 {
	switch k {
	case block.KindNone:
		return 0
	case block.KindInvalid:
		return EINVAL
	case block.KindRange:
		if write {
			return ENOSPC
		}
		return EINVAL
	case block.KindReadOnly, block.KindDenied, block.KindFenced:
		return EPERM
	case block.KindNoSpace:
		return ENOSPC
	case block.KindUnsupported:
		return ENOTSUP
	case block.KindClosed, block.KindCanceled:
		return ESHUTDOWN
	}
	return EIO
}

// Kind maps an error number of the protocol to a kind, the other way.
func Kind(errno uint32) block.Kind {
	switch errno {
	case 0:
		return block.KindNone
	case EPERM:
		return block.KindReadOnly
	case EINVAL:
		return block.KindInvalid
	case ENOSPC:
		return block.KindNoSpace
	case ENOTSUP:
		return block.KindUnsupported
	case ESHUTDOWN:
		return block.KindUnavailable
	}
	return block.KindIO
}
