package daemon

import (
	"encoding/json"
	"fmt"

	"forerun/block"
)

// MsgSources asks a backend, on the connection that takes changes back, which
// of some sources do not answer it now: AskSources → AnswerSources. Package
// writeback numbers its own messages from 1 up, and daemons theirs from 96.
const MsgSources uint8 = 96

// AskSources is the payload of MsgSources for volumes by name.
func AskSources(volumes []string) []byte {
	b, err := json.Marshal(volumes)
	if err != nil {
		panic(err) // strings always marshal
	}
	return b
}

// AnswerSources answers the payload of AskSources: for each volume whose source
// does not answer, why says so; it returns nothing for the others. A payload
// that is none is KindInvalid.
func AnswerSources(p []byte, why func(volume string) string) ([]byte, error) {
	var volumes []string
	if err := json.Unmarshal(p, &volumes); err != nil {
		return nil, block.E("sources.serve", "", block.KindInvalid, err)
	}
	away := map[string]string{}
	for _, v := range volumes {
		if w := why(v); w != "" {
			away[v] = w
		}
	}
	return json.Marshal(away)
}

// ReadSources reads the answer: by volume, why its source does not answer. One
// that cannot be read is KindInvalid.
func ReadSources(p []byte) (away map[string]string, err error) {
	if err := json.Unmarshal(p, &away); err != nil {
		return nil, block.E("sources.ask", "", block.KindInvalid, fmt.Errorf("the backend's answer: %w", err))
	}
	return away, nil
}
