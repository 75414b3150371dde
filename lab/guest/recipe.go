package guest

import (
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"fmt"
	"io/fs"
	"slices"
)

//go:embed files
var files embed.FS

// Recipe is all that decides what an image holds.
type Recipe struct {
	// Name is part of the file's name: letters and dashes.
	Name string
	// Size of the disk in bytes, a multiple of 1 MiB.
	Size int64
	// Suite of Debian, as "bookworm".
	Suite string
	// Packages beside the essential ones; they bring what they depend on.
	Packages []string
	// UUID of the root file system.
	UUID string
}

var base = []string{
	"linux-image-cloud-amd64", "initramfs-tools", "zstd", "systemd", "systemd-sysv", "udev", "dbus", "kmod",
	"e2fsprogs", "iproute2", "procps", "less", "openssh-server", "cron", "rsyslog", "logrotate", "locales",
	"python3", "perl", "git", "vim", "gcc", "g++", "make", "man-db", "manpages", "bash-completion", "curl", "file",
}

// Small is a server of about 700 MB.
func Small() Recipe {
	return Recipe{Name: "small", Size: 4 << 30, Suite: "bookworm", Packages: slices.Clone(base),
		UUID: "5f6f7265-7275-4e00-8000-000000000001"}
}

// Large is a developer's machine of about 2.5 GB.
func Large() Recipe {
	more := []string{"locales-all", "linux-source-6.1", "fonts-noto-cjk", "openjdk-17-jre-headless", "llvm-14-dev",
		"mariadb-server-core", "cmake", "valgrind", "libreoffice-core-nogui", "perl-doc", "git-doc"}
	return Recipe{Name: "large", Size: 8 << 30, Suite: "bookworm", Packages: append(slices.Clone(base), more...),
		UUID: "5f6f7265-7275-4e00-8000-000000000002"}
}

// ByName returns Small or Large.
func ByName(name string) (Recipe, error) {
	for _, r := range []Recipe{Small(), Large()} {
		if r.Name == name {
			return r, nil
		}
	}
	return Recipe{}, fmt.Errorf("there is no image %q; there are small and large", name)
}

// Key names the recipe's image: the name and a hash over everything in it and
// over the files that are put into the guest.
func (r Recipe) Key() string {
	h := sha256.New()
	fmt.Fprintf(h, "%q %d %q %q %q\n", r.Name, r.Size, r.Suite, r.Packages, r.UUID)
	// The embedded tree cannot fail to be read, and is walked in order.
	fs.WalkDir(files, ".", func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			b, _ := files.ReadFile(path)
			fmt.Fprintf(h, "%s %d\n", path, len(b))
			h.Write(b)
		}
		return err
	})
	return r.Name + "-" + hex.EncodeToString(h.Sum(nil)[:6])
}
