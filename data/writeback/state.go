package writeback

import (
	"encoding/json"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"time"

	"forerun/block"
	"forerun/disk"
)

const (
	stateName    = "state"
	stateVersion = 1
	stateMax     = 16 << 20
)

// groupState is what the receiver knows of a group for ever.
type groupState struct {
	// Applied is the checkpoint that was last carried out, Cut when its frontend
	// made the cut (its clock), At when it was finished here.
	Applied checkpointID `json:"applied"`
	Cut     time.Time    `json:"cut,omitzero"`
	At      time.Time    `json:"at,omitzero"`
	Volumes []string     `json:"volumes"`
}

// volumeState is what it knows of a volume.
type volumeState struct {
	Group string `json:"group"`
	// Epoch is the highest seen, Node who has it.
	Epoch uint64 `json:"epoch"`
	Node  string `json:"node"`
	// Known: changes were stored for it.
	Known bool `json:"known,omitempty"`
	// Damaged: a stored checkpoint was damaged, so the source may be anything
	// between two checkpoints until everything was compared.
	Damaged bool `json:"damaged,omitempty"`
	// Released: the move was called off, the source is somebody else's.
	Released bool `json:"released,omitempty"`
	// Forced: without its frontend, which may have had more.
	Forced bool `json:"forced,omitempty"`
	// Unwritten is the last report of the frontend, at ReportAt by our clock.
	Unwritten Unwritten `json:"unwritten,omitzero"`
	ReportAt  time.Time `json:"report_at,omitzero"`
}

// state is the file.
type state struct {
	Version int                    `json:"version"`
	Groups  map[string]groupState  `json:"groups"`
	Volumes map[string]volumeState `json:"volumes"`
}

func newState() state {
	return state{Version: stateVersion, Groups: map[string]groupState{}, Volumes: map[string]volumeState{}}
}

func (s state) clone() state {
	s.Groups, s.Volumes = maps.Clone(s.Groups), maps.Clone(s.Volumes)
	return s
}

func loadState(fs disk.FS, name string) (state, error) {
	s := newState()
	f, err := fs.Open(name, disk.Read)
	if block.KindOf(err) == block.KindNotFound {
		return s, nil
	}
	if err != nil {
		return s, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return s, err
	}
	b := make([]byte, min(st.Size, stateMax))
	n, err := f.ReadAt(b, 0)
	if err != nil && err != io.EOF {
		return s, err
	}
	s, err = parseState(b[:n])
	if err != nil {
		return s, fmt.Errorf("%w; it says which checkpoint each source has: restore it, or remove %s and have everything compared", err, name)
	}
	return s, nil
}

// sumLen is the length of the line with the checksum.
const sumLen = 10

func parseState(b []byte) (state, error) {
	s := newState()
	corrupt := func(err error) (state, error) {
		return s, block.E("writeback.state", "", block.KindCorrupt, err)
	}
	if len(b) < sumLen || string(b[len(b)-sumLen:]) != fmt.Sprintf("\n%08x\n", crc32.Checksum(b[:len(b)-sumLen], castagnoli)) {
		return corrupt(errFormat)
	}
	if err := json.Unmarshal(b[:len(b)-sumLen], &s); err != nil {
		return corrupt(err)
	}
	if s.Version != stateVersion {
		return s, block.E("writeback.state", "", block.KindUnsupported, fmt.Errorf("version %d is not known here", s.Version))
	}
	if s.Groups == nil {
		s.Groups = map[string]groupState{}
	}
	if s.Volumes == nil {
		s.Volumes = map[string]volumeState{}
	}
	return s, nil
}

func (s state) marshal() []byte {
	b := encode(s)
	return fmt.Appendf(b, "\n%08x\n", crc32.Checksum(b, castagnoli))
}
