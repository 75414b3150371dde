package nbd

import (
	"strings"

	"forerun/internal/nbdproto"
)

// The metadata contexts and their ids, which are indices plus one.
const (
	allocationID uint32 = 1
	stateID      uint32 = 2
)

var contextNames = [...]string{nbdproto.ContextAllocation, nbdproto.ContextState}

// matches says whether a query finds the context of that name. When listing,
// a namespace alone finds all that is in it; when selecting it finds nothing.
func matches(query, name string, listing bool) bool {
	if query == name {
		return true
	}
	ns, leaf, ok := strings.Cut(query, ":")
	return listing && ok && leaf == "" && strings.HasPrefix(name, ns+":")
}

func (h *handshake) metaContext(opt uint32, data []byte) error {
	setting := opt == nbdproto.OptSetMetaContext
	if setting {
		// What was set before is gone even when this fails.
		h.contexts, h.contextsOf = nil, ""
	}
	if !h.structured {
		return h.reply(opt, nbdproto.RepErrInvalid, "structured replies must be agreed on first")
	}
	name, queries, ok := nbdproto.ParseMetaContext(data)
	if !ok {
		return h.reply(opt, nbdproto.RepErrInvalid, "the option's lengths do not add up")
	}
	if len(queries) > maxQueries {
		return h.reply(opt, nbdproto.RepErrTooBig, "too many queries")
	}
	for _, q := range queries {
		if !strings.Contains(q, ":") {
			return h.reply(opt, nbdproto.RepErrInvalid, "a query has no namespace")
		}
	}
	if _, _, err := h.lookup(name); err != nil {
		return h.reply(opt, lookupError(err), clip(err.Error(), maxMessage))
	}
	var ids []uint32
	for i, c := range contextNames {
		found := !setting && len(queries) == 0
		for _, q := range queries {
			found = found || matches(q, c, !setting)
		}
		if !found {
			continue
		}
		id := uint32(i + 1)
		ids = append(ids, id)
		if !setting {
			id = 0
		}
		h.queue(opt, nbdproto.RepMetaContext, append(be.AppendUint32(nil, id), c...))
	}
	if setting {
		h.contexts, h.contextsOf = ids, name
	}
	return h.reply(opt, nbdproto.RepAck, "")
}
