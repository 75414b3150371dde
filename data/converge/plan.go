package converge

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"io"
	"path"

	"forerun/block"
	"forerun/disk"
)

// PlanName is the name of the plan in its directory.
const PlanName = "cutover"

const planMax = 64 << 10

// Phase is how far a plan is. The words stand in the file.
type Phase string

// The phases of a plan.
const (
	// PhaseNone: there is no plan.
	PhaseNone Phase = ""
	// PhaseCopying: the source side is primary.
	PhaseCopying Phase = "copying"
	// PhaseCanceling: the source side is primary, the target is being given up.
	PhaseCanceling Phase = "canceling"
	// PhaseSwitched: the target is primary.
	PhaseSwitched Phase = "switched"
	// PhaseDone: as PhaseSwitched, and the source side has been taken down.
	PhaseDone Phase = "done"
)

// Plan is what survives a restart: which side is primary, and where the target is.
type Plan struct {
	Phase     Phase  `json:"phase"`
	ID        string `json:"id"`     // ties the marks to the plan; hexadecimal
	Target    string `json:"target"` // path
	Created   bool   `json:"created"`
	Size      int64  `json:"size"`      // of the volume, bytes
	Threshold int64  `json:"threshold"` // bytes
	Rounds    int    `json:"rounds"`    // finished when it was last written
	// PauseUs is how long the switch held I/O, in microseconds, once done.
	PauseUs int64 `json:"pause_us,omitempty"`
	// Doubt: the target failed to flush, so the copy begins anew and zeros are
	// written even where it shows zeros.
	Doubt bool `json:"doubt,omitempty"`
}

// OnTarget says whether the target is primary: the stack is to be built on it.
func (p Plan) OnTarget() bool { return p.Phase == PhaseSwitched || p.Phase == PhaseDone }

func (p Plan) planID() (id planID) {
	hex.Decode(id[:], []byte(p.ID))
	return id
}

type planFile struct {
	Version int `json:"version"`
	Plan
}

// LoadPlan reads the plan in dir. Without one its Phase is PhaseNone. A damaged
// plan is KindCorrupt: nobody can say which side is primary.
func LoadPlan(fsys disk.FS, dir string) (Plan, error) {
	name := path.Join(dir, PlanName)
	f, err := fsys.Open(name, disk.Read)
	if block.KindOf(err) == block.KindNotFound {
		return Plan{}, nil
	}
	if err != nil {
		return Plan{}, block.E("converge.plan", name, 0, err)
	}
	defer f.Close()
	b := make([]byte, planMax)
	n, err := f.ReadAt(b, 0)
	if err != nil && err != io.EOF {
		return Plan{}, block.E("converge.plan", name, 0, err)
	}
	p, err := parsePlan(b[:n])
	if err != nil {
		return Plan{}, block.E("converge.plan", name, 0, fmt.Errorf(
			"%w; it says whether the source side or the target is primary: restore it, or find out which was written last before serving either", err))
	}
	return p, nil
}

func parsePlan(b []byte) (Plan, error) {
	const sum = 10
	if len(b) < sum || string(b[len(b)-sum:]) != fmt.Sprintf("\n%08x\n", crc32.Checksum(b[:len(b)-sum], castagnoli)) {
		return Plan{}, corrupt("the plan of the cut-over is damaged")
	}
	var v planFile
	if err := json.Unmarshal(b[:len(b)-sum], &v); err != nil {
		return Plan{}, corrupt("the plan of the cut-over: %w", err)
	}
	if v.Version != 1 {
		return Plan{}, block.E("converge.parse", "", block.KindUnsupported, fmt.Errorf("version %d of the plan is not known here", v.Version))
	}
	switch v.Phase {
	case PhaseCopying, PhaseCanceling, PhaseSwitched, PhaseDone:
	default:
		return Plan{}, corrupt("the phase %q of the plan is not known", v.Phase)
	}
	if id, err := hex.DecodeString(v.ID); err != nil || len(id) != len(planID{}) || v.Size <= 0 || v.Target == "" {
		return Plan{}, corrupt("the plan of the cut-over has id %q, size %d, target %q", v.ID, v.Size, v.Target)
	}
	return v.Plan, nil
}

func savePlan(fsys disk.FS, dir string, p Plan) error {
	b, err := json.Marshal(planFile{1, p})
	if err != nil {
		return err
	}
	b = fmt.Appendf(b, "\n%08x\n", crc32.Checksum(b, castagnoli))
	return publish(fsys, path.Join(dir, PlanName), func(f disk.File) error {
		_, err := f.WriteAt(b, 0)
		return err
	})
}
