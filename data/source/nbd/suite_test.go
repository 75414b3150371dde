package nbd

import (
	"os"
	"path/filepath"
	"testing"

	"forerun/block"
	"forerun/block/blocktest"
)

func TestSuite(t *testing.T) {
	kit := []string{"nbdkit", "-f", "--exit-with-parent", "-U", "SOCKET"}
	for name, argv := range map[string][]string{
		"nbdkit memory": append(kit, "memory", "4M"),
		"nbdkit file":   append(kit, "file", "FILE"),
		"large blocks":  append(kit, "--filter=blocksize-policy", "memory", "4M", "blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=65536", "blocksize-error-policy=error"),
		"qemu-nbd":      {"qemu-nbd", "-f", "raw", "-t", "-e", "16", "-k", "SOCKET", "FILE"},
	} {
		t.Run(name, func(t *testing.T) {
			need(t, argv[0])
			blocktest.Test(t, func(t *testing.T) block.Device {
				file := filepath.Join(t.TempDir(), "disk")
				if err := os.WriteFile(file, make([]byte, 4<<20), 0o600); err != nil {
					t.Fatal(err)
				}
				args := append([]string(nil), argv...)
				for i, a := range args {
					if a == "FILE" {
						args[i] = file
					}
				}
				_, tg := serve(t, args...)
				c, err := Open(ctx, tg, Options{})
				if err != nil {
					t.Fatal(err)
				}
				return c
			}, blocktest.Options{Ops: 150})
		})
	}
}
