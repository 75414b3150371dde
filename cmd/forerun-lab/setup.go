package main

import (
	"fmt"
	"os"
	"os/exec"
	"strings"

	"github.com/spf13/cobra"
)

// packages are those of Debian that the lab and the tests use.
var packages = strings.Fields(`qemu-system-x86 qemu-utils nbdkit libnbd-bin python3-libnbd fio mmdebstrap
	e2fsprogs xfsprogs ntfs-3g zstd openssl iproute2 util-linux mount fdisk iperf3 extlinux syslinux-common fuse3 postgresql`)

func setupCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "setup",
		Short: "Install the Debian packages that are missing",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var missing []string
			for _, p := range packages {
				out, _ := exec.Command("dpkg-query", "-W", "-f", "${Status}", p).Output()
				if !strings.HasSuffix(string(out), " installed") {
					missing = append(missing, p)
				}
			}
			if len(missing) == 0 {
				fmt.Println("everything is installed")
				return nil
			}
			fmt.Println("installing", strings.Join(missing, " "))
			install := append([]string{"install", "-y", "--no-install-recommends"}, missing...)
			for _, args := range [][]string{{"update"}, install} {
				c := exec.CommandContext(cmd.Context(), "apt-get", args...)
				c.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
				c.Stdout, c.Stderr = os.Stdout, os.Stderr
				if err := c.Run(); err != nil {
					return fmt.Errorf("apt-get %s: %w", args[0], err)
				}
			}
			return nil
		},
	}
}
