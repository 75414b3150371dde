package pair

import (
	"context"
	"path/filepath"

	"forerun/lab/rig"
)

// peerServer starts a server of somebody else's, until the run ends.
func (k *run) peerServer(name string, args ...string) (*rig.Proc, error) {
	return k.peerAt(nil, name, args...)
}

func (k *run) peerAt(at rig.Command, name string, args ...string) (*rig.Proc, error) {
	if at == nil {
		at = rig.Local
	}
	p, err := rig.Launch(at(context.WithoutCancel(k.ctx), name, args...), filepath.Base(name), k.path(filepath.Base(name)+".log"))
	if err != nil {
		return nil, err
	}
	k.atEnd(func() error {
		p.Kill()
		return nil
	})
	return p, nil
}
