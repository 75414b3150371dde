package nbd

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"net"
	"unicode/utf8"

	"forerun/block"
	"forerun/internal/nbdproto"
)

const (
	// maxOption is the longest option data in bytes that is looked at: an
	// export's name of the longest kind and a few queries.
	maxOption = 64 << 10
	// maxSkip is the longest option data that is read past and refused; a
	// client that announces more is not one.
	maxSkip = 1 << 20
	// maxOptions bounds a client that haggles for ever.
	maxOptions = 1024
	// maxQueries bounds the queries of one metadata context option.
	maxQueries = 64
	// maxMessage bounds the text of an error in bytes.
	maxMessage = 512
)

// chosen is what the handshake led to.
type chosen struct {
	name       string
	export     *export
	structured bool
	contexts   []uint32 // ids of the selected metadata contexts
}

// handshake is the option haggling of one connection. It reads exactly what
// belongs to it, so that nothing sent in plain text is taken for something sent
// under TLS (CVE-2021-3716 was that), and nothing of the next phase is lost.
type handshake struct {
	s        *Server
	nc       net.Conn // replaced by the encrypted one
	forceTLS bool
	secure   bool

	noZeroes   bool
	structured bool
	contexts   []uint32
	contextsOf string // the export that contexts were selected for
	out        []byte
}

var be = binary.BigEndian

// run haggles. It returns nil, nil when the client went away in order.
func (h *handshake) run() (*chosen, error) {
	hello := be.AppendUint64(nil, nbdproto.Magic)
	hello = be.AppendUint64(hello, nbdproto.OptMagic)
	hello = be.AppendUint16(hello, nbdproto.FlagFixedNewstyle|nbdproto.FlagNoZeroes)
	if _, err := h.nc.Write(hello); err != nil {
		return nil, err
	}
	var head [nbdproto.OptionLen]byte
	if _, err := io.ReadFull(h.nc, head[:nbdproto.ClientFlagsLen]); err != nil {
		return nil, err
	}
	cf := be.Uint32(head[:])
	if cf&^(nbdproto.FlagCFixedNewstyle|nbdproto.FlagCNoZeroes) != 0 {
		return nil, fmt.Errorf("the client set unknown flags %#x", cf)
	}
	h.noZeroes = cf&nbdproto.FlagCNoZeroes != 0
	for range maxOptions {
		if _, err := io.ReadFull(h.nc, head[:]); err != nil {
			return nil, err
		}
		opt, n, ok := nbdproto.ParseOption(head[:])
		if !ok {
			return nil, errors.New("the client sent no option where one was due")
		}
		if n > maxSkip {
			return nil, fmt.Errorf("the client announced %d bytes of option %d", n, opt)
		}
		if n > maxOption || cf&nbdproto.FlagCFixedNewstyle == 0 && opt != nbdproto.OptExportName {
			if _, err := io.CopyN(io.Discard, h.nc, int64(n)); err != nil {
				return nil, err
			}
			if opt == nbdproto.OptExportName {
				return nil, errors.New("the client asked for an export by too long a name")
			}
			typ := nbdproto.RepErrTooBig
			if n <= maxOption {
				typ = nbdproto.RepErrInvalid
			}
			if err := h.reply(opt, typ, "this option is not possible here"); err != nil {
				return nil, err
			}
			continue
		}
		data := make([]byte, n)
		if _, err := io.ReadFull(h.nc, data); err != nil {
			return nil, err
		}
		c, err := h.option(opt, data)
		if err == errAborted {
			return nil, nil
		}
		if c != nil || err != nil {
			return c, err
		}
	}
	return nil, fmt.Errorf("the client sent %d options and chose nothing", maxOptions)
}

var errAborted = errors.New("the client aborted")

// option answers one option. It returns a choice when haggling is over.
func (h *handshake) option(opt uint32, data []byte) (*chosen, error) {
	if h.forceTLS && !h.secure {
		switch opt {
		case nbdproto.OptStartTLS, nbdproto.OptAbort:
		case nbdproto.OptExportName:
			return nil, errors.New("the client did not begin TLS, which this address requires")
		default:
			return nil, h.reply(opt, nbdproto.RepErrTLSReqd, "this address requires TLS")
		}
	}
	switch opt {
	case nbdproto.OptExportName:
		return h.exportName(string(data))
	case nbdproto.OptAbort:
		_ = h.reply(opt, nbdproto.RepAck, "")
		return nil, errAborted
	case nbdproto.OptList:
		return nil, h.list(data)
	case nbdproto.OptStartTLS:
		return nil, h.startTLS(data)
	case nbdproto.OptInfo, nbdproto.OptGo:
		return h.info(opt, data)
	case nbdproto.OptStructuredReply:
		if len(data) != 0 {
			return nil, h.reply(opt, nbdproto.RepErrInvalid, "the option takes no data")
		}
		h.structured = true
		return nil, h.reply(opt, nbdproto.RepAck, "")
	case nbdproto.OptListMetaContext, nbdproto.OptSetMetaContext:
		return nil, h.metaContext(opt, data)
	}
	return nil, h.reply(opt, nbdproto.RepErrUnsup, "")
}

// reply sends one reply with a text, after those that were queued.
func (h *handshake) reply(opt, typ uint32, text string) error {
	h.queue(opt, typ, []byte(text))
	_, err := h.nc.Write(h.out)
	h.out = h.out[:0]
	return err
}

// queue keeps a reply until the final one is sent.
func (h *handshake) queue(opt, typ uint32, data []byte) {
	h.out = nbdproto.AppendOptionReply(h.out, opt, typ, data)
}

// lookup finds an export. A name that is no name is not looked up.
func (h *handshake) lookup(name string) (block.Device, string, error) {
	if len(name) > nbdproto.MaxString || !utf8.ValidString(name) {
		return nil, "", block.E("nbd.lookup", "", block.KindNotFound, errors.New("not the name of an export"))
	}
	dev, text, err := h.s.opt.Exports.Lookup(name)
	if err == nil && dev == nil {
		err = block.E("nbd.lookup", name, block.KindNotFound, nil)
	}
	return dev, clip(text, nbdproto.MaxString), err
}

// clip cuts s to at most n bytes of whole characters.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}

func (h *handshake) exportName(name string) (*chosen, error) {
	dev, _, err := h.lookup(name)
	if err != nil {
		return nil, err
	}
	c := h.choose(name, dev)
	out := be.AppendUint64(nil, uint64(c.export.info.Size))
	out = be.AppendUint16(out, flags(c.export.info, h.structured))
	if !h.noZeroes {
		out = append(out, make([]byte, nbdproto.ExportNamePadding)...)
	}
	if _, err := h.nc.Write(out); err != nil {
		h.s.exports.close(c.export)
		return nil, err
	}
	return c, nil
}

func (h *handshake) choose(name string, dev block.Device) *chosen {
	c := &chosen{name: name, export: h.s.exports.open(dev), structured: h.structured}
	if h.contextsOf == name {
		c.contexts = h.contexts
	}
	return c
}

func (h *handshake) list(data []byte) error {
	if len(data) != 0 {
		return h.reply(nbdproto.OptList, nbdproto.RepErrInvalid, "the option takes no data")
	}
	for _, name := range h.s.opt.Exports.List() {
		if len(name) > nbdproto.MaxString {
			continue
		}
		item := be.AppendUint32(nil, uint32(len(name)))
		h.queue(nbdproto.OptList, nbdproto.RepServer, append(item, name...))
	}
	return h.reply(nbdproto.OptList, nbdproto.RepAck, "")
}

func (h *handshake) startTLS(data []byte) error {
	switch {
	case len(data) != 0:
		return h.reply(nbdproto.OptStartTLS, nbdproto.RepErrInvalid, "the option takes no data")
	case h.secure:
		return h.reply(nbdproto.OptStartTLS, nbdproto.RepErrInvalid, "TLS has begun already")
	case h.s.tls == nil:
		return h.reply(nbdproto.OptStartTLS, nbdproto.RepErrPolicy, "this server has no certificate")
	}
	if err := h.reply(nbdproto.OptStartTLS, nbdproto.RepAck, ""); err != nil {
		return err
	}
	t := tls.Server(h.nc, h.s.tls)
	// The deadline on the connection bounds it.
	if err := t.HandshakeContext(context.Background()); err != nil {
		return fmt.Errorf("TLS: %w", err)
	}
	// Nothing that was agreed on in plain text counts.
	h.nc, h.secure = t, true
	h.structured, h.contexts, h.contextsOf = false, nil, ""
	return nil
}

func (h *handshake) info(opt uint32, data []byte) (*chosen, error) {
	name, infos, ok := nbdproto.ParseInfo(data)
	if !ok {
		return nil, h.reply(opt, nbdproto.RepErrInvalid, "the option's lengths do not add up")
	}
	dev, text, err := h.lookup(name)
	if err != nil {
		return nil, h.reply(opt, lookupError(err), clip(err.Error(), maxMessage))
	}
	di := dev.Info()
	export := be.AppendUint16(nil, nbdproto.InfoExport)
	export = be.AppendUint64(export, uint64(di.Size))
	h.queue(opt, nbdproto.RepInfo, be.AppendUint16(export, flags(di, h.structured)))
	var sent [4]bool
	for _, i := range infos {
		if int(i) >= len(sent) || sent[i] {
			continue
		}
		sent[i] = true
		b := be.AppendUint16(nil, i)
		switch i {
		case nbdproto.InfoName:
			h.queue(opt, nbdproto.RepInfo, append(b, name...))
		case nbdproto.InfoDescription:
			if text != "" {
				h.queue(opt, nbdproto.RepInfo, append(b, text...))
			}
		case nbdproto.InfoBlockSize:
			b = be.AppendUint32(b, 1)
			b = be.AppendUint32(b, preferred(di))
			h.queue(opt, nbdproto.RepInfo, be.AppendUint32(b, nbdproto.MaxPayload))
		}
	}
	if opt == nbdproto.OptInfo {
		return nil, h.reply(opt, nbdproto.RepAck, "")
	}
	// Opened before it is acknowledged, so that the flags sent are those that hold.
	c := h.choose(name, dev)
	if err := h.reply(opt, nbdproto.RepAck, ""); err != nil {
		h.s.exports.close(c.export)
		return nil, err
	}
	return c, nil
}

// lookupError is the reply type for a failed Lookup.
func lookupError(err error) uint32 {
	switch block.KindOf(err) {
	case block.KindNotFound:
		return nbdproto.RepErrUnknown
	case block.KindClosed, block.KindUnavailable:
		return nbdproto.RepErrShutdown
	}
	return nbdproto.RepErrPolicy
}

// preferred is the preferred block size: a power of two of at least 4 KiB, as
// qemu wants it, 64 KiB if the device does not say.
func preferred(i block.Info) uint32 {
	p := i.PreferredIO
	if p <= 0 {
		p = 64 << 10
	}
	p = min(max(p, i.BlockSize, 4096), 4<<20)
	return 1 << (bits.Len(uint(p)) - 1)
}
