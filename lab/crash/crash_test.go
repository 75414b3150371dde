package crash

import (
	"os"
	"testing"

	"forerun/lab/rig"
)

// TestCampaigns runs a few kills of each kind against the real binary.
func TestCampaigns(t *testing.T) {
	if os.Getenv("FORERUN_LAB_CRASH") == "" {
		t.Skip("kills daemons for a minute; set FORERUN_LAB_CRASH=1")
	}
	bin, err := rig.Binary(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, target := range []string{Frontend, Backend, Cutover} {
		t.Run(target, func(t *testing.T) {
			r, err := Run(t.Context(), Config{Target: target, N: 4, Seed: 1, Bin: bin, Dir: t.TempDir(), Say: t.Logf})
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%+v", r)
		})
	}
}
