// Package version says which build this is.
package version

import "runtime/debug"

// Version is the release, set by the linker (-X forerun/internal/version.Version=…).
var Version = "dev"

// String is the release and, where the toolchain recorded one, the revision.
func String() string {
	if bi, ok := debug.ReadBuildInfo(); ok {
		for _, s := range bi.Settings {
			if s.Key == "vcs.revision" && len(s.Value) >= 12 {
				return Version + "+" + s.Value[:12]
			}
		}
	}
	return Version
}
