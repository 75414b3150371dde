package backend

import (
	"forerun/api"
	"forerun/data/wire"
	"forerun/internal/chunk"
)

// codecNames are the packed forms as status names them.
var codecNames = [...]string{chunk.Raw: "raw", chunk.Zstd: "zstd", chunk.S2: "s2", chunk.Zeros: "zeros",
	chunk.Known: "signature", chunk.Bundle: "bundle", chunk.Branch: "zstd-x86"}

// packing says how chunks are packed.
func packing(st wire.ServerStats, s *api.Sending) {
	most := 0
	for level, n := range st.Levels {
		if n > most {
			most, s.PackLevel = n, chunk.Level(level).String()
		}
	}
	for c, n := range st.Codecs {
		if n.Chunks > 0 {
			s.Codecs = append(s.Codecs, api.Codec{Codec: codecNames[c], Chunks: n.Chunks, PlainBytes: n.PlainBytes, PackedBytes: n.PackedBytes})
		}
	}
}
