package stack

import (
	"os"
	"path/filepath"
	"testing"

	"forerun/block"
)

// TestReservedTargets: no way of writing a path leads a cut-over into the state.
func TestReservedTargets(t *testing.T) {
	dir := t.TempDir()
	state := filepath.Join(dir, "state")
	if err := os.MkdirAll(filepath.Join(state, "store"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, to := range map[string]string{
		"link": state, "inner": filepath.Join(state, "store"), "coming": filepath.Join(state, "later"),
		"chain": "coming", "loop": "loop", "free": filepath.Join(dir, "elsewhere"), "statement": dir,
	} {
		if err := os.Symlink(to, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	v := &Volume{opts: Options{Reserved: []string{filepath.Join(dir, "link")}}} // it may itself be given as a link
	for target, want := range map[string]block.Kind{
		"state": block.KindInvalid, "state/x": block.KindInvalid, "state/store/x": block.KindInvalid, "state/nodir/x": block.KindInvalid,
		"link": block.KindInvalid, "link/x": block.KindInvalid, "inner/x": block.KindInvalid, "coming": block.KindInvalid, "chain": block.KindInvalid,
		"inner/../x": block.KindNone, "x": block.KindNone, "stat": block.KindNone, "state.raw": block.KindNone, "free": block.KindNone,
		"loop": block.KindNone, "statement/x": block.KindNone, "statement/state/x": block.KindInvalid, "..x": block.KindNone,
	} {
		if err := v.reserved(filepath.Join(dir, target)); block.KindOf(err) != want {
			t.Errorf("%s: %v", target, err)
		}
	}
}

// TestRelativeTarget: the plan outlives the working directory.
func TestRelativeTarget(t *testing.T) {
	v := &Volume{}
	if err := v.StartCutover(CutoverOptions{Target: "disk.raw"}); block.KindOf(err) != block.KindInvalid {
		t.Error(err)
	}
}
