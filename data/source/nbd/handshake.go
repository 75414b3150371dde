package nbd

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"syscall"
	"time"

	"forerun/block"
	p "forerun/internal/nbdproto"

	"golang.org/x/sys/unix"
)

const (
	handshakeTime  = 30 * time.Second
	maxOptionReply = 64 << 10 // bytes; the largest one the protocol needs is two strings
	maxReplies     = 1024     // per option
	maxListed      = 8        // exports named in an error
	// oldstyleMagic follows Magic in the handshake that has no negotiation.
	oldstyleMagic = 0x00420281861253
)

// export is what was negotiated on one connection.
type export struct {
	size       int64
	flags      uint16
	minBlock   uint32 // 1 or more, a power of two
	preferred  uint32 // 0 if the server did not say
	maxBlock   uint32 // largest payload
	structured bool
	status     bool   // base:allocation was agreed
	statusID   uint32 // its number in replies
}

// has says whether the server set all of the transmission flags.
func (e *export) has(flags uint16) bool { return e.flags&flags == flags }

// refusal is an answer of the server that trying again with the same
// configuration will hardly change.
type refusal struct {
	kind block.Kind
	err  error
}

func (r *refusal) Error() string { return r.err.Error() }
func (r *refusal) Unwrap() error { return r.err }

func refused(kind block.Kind, format string, a ...any) error {
	return &refusal{kind, fmt.Errorf(format, a...)}
}

// dial connects and negotiates. The net.Conn is in the transmission phase.
func dial(ctx context.Context, t Target) (nc net.Conn, ex export, err error) {
	nc, err = connect(ctx, t, func(ctx context.Context, h *handshake) (err error) {
		ex, err = h.run(ctx)
		return err
	})
	return nc, ex, err
}

// connect connects and has talk negotiate. If that fails the connection is closed.
func connect(ctx context.Context, t Target, talk func(context.Context, *handshake) error) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTime)
	defer cancel()
	d := net.Dialer{Control: giveUpLate, KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 9}}
	nc, err := d.DialContext(ctx, t.Network, t.Address)
	if err != nil {
		return nil, err
	}
	// Any end of ctx, also a cancel, interrupts the negotiation.
	stop := context.AfterFunc(ctx, func() { _ = nc.SetDeadline(time.Unix(1, 0)) })
	h := &handshake{t: t, nc: nc}
	err = talk(ctx, h)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		_ = nc.Close()
		if ctx.Err() != nil {
			err = fmt.Errorf("the server accepted the connection but did not finish the greeting (%w); it may be serving another client only", context.Cause(ctx))
		}
		return nil, err
	}
	return h.nc, nil
}

// giveUpLate bounds how long sent bytes may stay unacknowledged (tcp(7),
// TCP_USER_TIMEOUT), which keepalive alone does not.
func giveUpLate(network, _ string, c syscall.RawConn) error {
	if !strings.HasPrefix(network, "tcp") {
		return nil
	}
	return c.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(time.Minute/time.Millisecond)) // else the kernel's default holds
	})
}

type handshake struct {
	t  Target
	nc net.Conn
}

func (h *handshake) read(n int) ([]byte, error) {
	b := make([]byte, n)
	_, err := io.ReadFull(h.nc, b)
	if err == io.EOF {
		err = errors.New("the server closed the connection during the greeting")
	}
	return b, err
}

// run negotiates up to the transmission phase.
func (h *handshake) run(ctx context.Context) (export, error) {
	ex := export{minBlock: 1, maxBlock: p.MaxPayload}
	fixed, noZeroes, err := h.greet(ctx)
	if err != nil {
		return ex, err
	}
	if !fixed {
		return ex, h.exportName(&ex, noZeroes)
	}
	if err := h.structured(&ex); err != nil {
		return ex, err
	}
	err = h.goOption(&ex)
	var r *optionError
	if errors.As(err, &r) && r.rep == p.RepErrUnsup {
		return ex, h.exportName(&ex, noZeroes)
	}
	return ex, err
}

// greet exchanges the greetings and begins TLS where it is asked for.
func (h *handshake) greet(ctx context.Context) (fixed, noZeroes bool, err error) {
	b, err := h.read(16)
	if err != nil {
		return false, false, err
	}
	if binary.BigEndian.Uint64(b) != p.Magic {
		return false, false, refused(block.KindInvalid, "this is not an NBD server: it greets with %q", b[:8])
	}
	switch m := binary.BigEndian.Uint64(b[8:]); m {
	case p.OptMagic:
	case oldstyleMagic:
		return false, false, refused(block.KindUnsupported, "the server speaks the old style of NBD only, which has no options; run it as a newstyle server")
	default:
		return false, false, refused(block.KindInvalid, "the server's greeting continues with %#x, which is no version of NBD", m)
	}
	if b, err = h.read(2); err != nil {
		return false, false, err
	}
	flags := binary.BigEndian.Uint16(b)
	var reply uint32
	fixed = flags&p.FlagFixedNewstyle != 0
	if fixed {
		reply |= p.FlagCFixedNewstyle
	}
	noZeroes = flags&p.FlagNoZeroes != 0
	if noZeroes {
		reply |= p.FlagCNoZeroes
	}
	if _, err := h.nc.Write(binary.BigEndian.AppendUint32(nil, reply)); err != nil {
		return false, false, err
	}
	if h.t.TLS {
		if !fixed {
			return false, false, refused(block.KindUnsupported, "the server cannot negotiate TLS; nothing was sent in the clear")
		}
		if err := h.startTLS(ctx); err != nil {
			return false, false, err
		}
	}
	return fixed, noZeroes, nil
}

func (h *handshake) send(opt uint32, data []byte) error {
	b := make([]byte, 0, 16+len(data))
	b = binary.BigEndian.AppendUint64(b, p.OptMagic)
	b = binary.BigEndian.AppendUint32(b, opt)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	_, err := h.nc.Write(append(b, data...))
	return err
}

// optionError is an error reply to an option.
type optionError struct {
	opt, rep uint32
	text     string
}

func (e *optionError) Error() string {
	what := map[uint32]string{
		p.RepErrUnsup: "not supported", p.RepErrPolicy: "forbidden by the server's policy", p.RepErrInvalid: "called invalid",
		p.RepErrPlatform: "not supported on the server's platform", p.RepErrTLSReqd: "refused without TLS",
		p.RepErrUnknown: "unknown to it", p.RepErrShutdown: "refused, the server is shutting down",
		p.RepErrBlockSizeReq: "refused without block sizes", p.RepErrTooBig: "too big for it",
	}[e.rep]
	if what == "" {
		what = fmt.Sprintf("refused with error %#x", e.rep)
	}
	s := fmt.Sprintf("the server answered option %d: %s", e.opt, what)
	if e.text != "" {
		s += fmt.Sprintf(" (it says %q)", e.text)
	}
	return s
}

// replies reads the replies to one option up to the acknowledgement or an
// error, and gives those in between to each.
func (h *handshake) replies(opt uint32, each func(rep uint32, data []byte) error) error {
	for range maxReplies {
		b, err := h.read(20)
		if err != nil {
			return err
		}
		if m := binary.BigEndian.Uint64(b); m != p.RepMagic {
			return fmt.Errorf("a reply to option %d begins with %#x, not the magic number", opt, m)
		}
		if o := binary.BigEndian.Uint32(b[8:]); o != opt {
			return fmt.Errorf("the server replied to option %d, asked was %d", o, opt)
		}
		rep, n := binary.BigEndian.Uint32(b[12:]), binary.BigEndian.Uint32(b[16:])
		if n > maxOptionReply {
			return fmt.Errorf("a reply to option %d is %d bytes long, at most %d are allowed", opt, n, maxOptionReply)
		}
		data, err := h.read(int(n))
		if err != nil {
			return err
		}
		switch {
		case rep&p.RepFlagError != 0:
			return &optionError{opt, rep, string(data[:min(len(data), p.MaxString)])}
		case rep == p.RepAck:
			return nil
		case each != nil:
			if err := each(rep, data); err != nil {
				return err
			}
		}
	}
	return fmt.Errorf("more than %d replies to option %d", maxReplies, opt)
}

// startTLS is the first option sent, so nothing is negotiated in the clear.
func (h *handshake) startTLS(ctx context.Context) error {
	if err := h.send(p.OptStartTLS, nil); err != nil {
		return err
	}
	if err := h.replies(p.OptStartTLS, nil); err != nil {
		var oe *optionError
		if errors.As(err, &oe) {
			return refused(block.KindDenied, "the server does not offer TLS (%w); use nbd:// if the clear is meant", err)
		}
		return err
	}
	conf, err := tlsConfig(h.t)
	if err != nil {
		return &refusal{block.KindInvalid, err}
	}
	tc := tls.Client(h.nc, conf)
	if err := tc.HandshakeContext(ctx); err != nil {
		return refused(block.KindDenied, "TLS with the server failed: %w", err)
	}
	h.nc = tc
	return nil
}

func (h *handshake) structured(ex *export) error {
	if err := h.send(p.OptStructuredReply, nil); err != nil {
		return err
	}
	var oe *optionError
	err := h.replies(p.OptStructuredReply, nil)
	switch {
	case err == nil:
		ex.structured = true
	case !errors.As(err, &oe):
		return err
	case oe.rep == p.RepErrTLSReqd:
		return refused(block.KindDenied, "the server wants TLS: use an nbds:// URI")
	}
	if !ex.structured {
		return nil // metadata contexts need structured replies
	}
	data := appendString(nil, h.t.Export)
	data = binary.BigEndian.AppendUint32(data, 1)
	data = appendString(data, p.ContextAllocation)
	if err := h.send(p.OptSetMetaContext, data); err != nil {
		return err
	}
	err = h.replies(p.OptSetMetaContext, func(rep uint32, data []byte) error {
		if rep == p.RepMetaContext && len(data) >= 4 && string(data[4:]) == p.ContextAllocation {
			ex.status, ex.statusID = true, binary.BigEndian.Uint32(data)
		}
		return nil
	})
	if err != nil {
		ex.status = false
		if !errors.As(err, &oe) {
			return err
		}
	}
	return nil
}

func appendString(b []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint32(b, uint32(len(s))), s...)
}

func (h *handshake) goOption(ex *export) error {
	data := appendString(nil, h.t.Export)
	data = binary.BigEndian.AppendUint16(data, 1)
	data = binary.BigEndian.AppendUint16(data, p.InfoBlockSize)
	if err := h.send(p.OptGo, data); err != nil {
		return err
	}
	seen := false
	err := h.replies(p.OptGo, func(rep uint32, data []byte) error {
		if rep != p.RepInfo || len(data) < 2 {
			return nil
		}
		switch binary.BigEndian.Uint16(data) {
		case p.InfoExport:
			if len(data) != 12 {
				return fmt.Errorf("the export's size came in %d bytes, not 12", len(data))
			}
			seen = true
			return ex.setSize(binary.BigEndian.Uint64(data[2:]), binary.BigEndian.Uint16(data[10:]))
		case p.InfoBlockSize:
			if len(data) != 14 {
				return fmt.Errorf("the block sizes came in %d bytes, not 14", len(data))
			}
			ex.minBlock = binary.BigEndian.Uint32(data[2:])
			ex.preferred = binary.BigEndian.Uint32(data[6:])
			ex.maxBlock = binary.BigEndian.Uint32(data[10:])
			return ex.checkBlocks()
		}
		return nil
	})
	var oe *optionError
	if errors.As(err, &oe) {
		switch oe.rep {
		case p.RepErrUnsup:
			return err
		case p.RepErrTLSReqd:
			return refused(block.KindDenied, "the server wants TLS: use an nbds:// URI")
		case p.RepErrUnknown:
			return h.unknown(oe)
		case p.RepErrPolicy:
			return refused(block.KindDenied, "%w", oe)
		}
		return refused(block.KindUnavailable, "%w", oe)
	}
	if err == nil && !seen {
		return errors.New("the server opened the export without telling its size")
	}
	if err == nil && ex.size%int64(ex.minBlock) != 0 {
		return refused(block.KindInvalid, "the export has %d bytes, not a multiple of the server's own blocks of %d: its end could not be read", ex.size, ex.minBlock)
	}
	return err
}

// unknown explains that there is no such export by naming those there are.
func (h *handshake) unknown(cause error) error {
	var names []string
	more := 0
	if err := h.send(p.OptList, nil); err == nil {
		_ = h.replies(p.OptList, func(rep uint32, data []byte) error { // what was heard so far is told
			if rep != p.RepServer || len(data) < 4 {
				return nil
			}
			n := binary.BigEndian.Uint32(data)
			if int64(n) > int64(len(data)-4) {
				return errors.New("bad list")
			}
			if len(names) == maxListed {
				more++
				return nil
			}
			names = append(names, fmt.Sprintf("%q", data[4:4+min(n, 256)]))
			return nil
		})
	}
	what := fmt.Sprintf("the server has no export named %q", h.t.Export)
	switch {
	case more > 0:
		what += fmt.Sprintf("; it offers %s and %d more", strings.Join(names, ", "), more)
	case len(names) > 0:
		what += "; it offers " + strings.Join(names, ", ")
	}
	return &refusal{block.KindNotFound, fmt.Errorf("%s: %w", what, cause)}
}

// exportName opens the export the way servers without OptGo understand: it
// cannot say no, it can only close the connection.
func (h *handshake) exportName(ex *export, noZeroes bool) error {
	if err := h.send(p.OptExportName, []byte(h.t.Export)); err != nil {
		return err
	}
	n := 10
	if !noZeroes {
		n += 124
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(h.nc, b); err != nil {
		return fmt.Errorf("the server closed the connection when asked for the export %q: is that its name? (%w)", h.t.Export, err)
	}
	return ex.setSize(binary.BigEndian.Uint64(b), binary.BigEndian.Uint16(b[8:]))
}

func (e *export) setSize(size uint64, flags uint16) error {
	switch {
	case size == 0:
		return refused(block.KindInvalid, "the export is empty: a disk of 0 bytes cannot be served")
	case size > 1<<61:
		return refused(block.KindInvalid, "the server says the export has %d bytes", size)
	case flags&p.FlagHasFlags == 0:
		flags = 0 // the others mean nothing then
	}
	e.size, e.flags = int64(size), flags
	return nil
}

func (e *export) checkBlocks() error {
	lo, pref, hi := e.minBlock, e.preferred, e.maxBlock
	if pref&(pref-1) != 0 || pref < lo {
		e.preferred = 0 // a hint only
	}
	if lo == 0 || lo&(lo-1) != 0 || lo > 64<<10 || hi < lo {
		return refused(block.KindInvalid, "the server's block sizes make no sense: minimum %d, preferred %d, maximum %d", lo, pref, hi)
	}
	e.maxBlock = min(hi, p.MaxPayload) &^ (max(lo, 512) - 1)
	if e.maxBlock == 0 {
		return refused(block.KindUnsupported, "the server takes at most %d bytes in a request, fewer than a sector", hi)
	}
	return nil
}
