package source

import (
	"bytes"
	"context"
	"encoding/binary"

	"forerun/block"
)

// probeLen is how much of the beginning and of the end is looked at.
const probeLen = 4096

// probe names the image format whose mark the device bears, or "".
func probe(d block.Device) (string, error) {
	size := d.Info().Size
	head := make([]byte, min(probeLen, size))
	tail := make([]byte, min(probeLen, size))
	ctx := context.Background()
	if err := d.ReadAt(ctx, head, 0, block.Demand); err != nil {
		return "", err
	}
	if err := d.ReadAt(ctx, tail, size-int64(len(tail)), block.Demand); err != nil {
		return "", err
	}
	return mark(head, tail), nil
}

// mark looks for the marks of image formats in the first and the last bytes of
// a file: qcow2 (docs/interop/qcow2.txt), VMDK (sparse, ESX sparse and
// descriptor, from the Virtual Disk Format 5.0 note), VHDX (MS-VHDX 2.2.1), VHD
// (its footer "conectix" is the last 511 or 512 bytes of a fixed image and
// copied to the front of a dynamic one), QED and VDI.
func mark(head, tail []byte) string {
	starts := func(s string) bool { return bytes.HasPrefix(head, []byte(s)) }
	switch {
	case starts("QFI\xfb"):
		return "qcow2"
	case starts("KDMV"), starts("COWD"), starts("# Disk DescriptorFile"):
		return "vmdk"
	case starts("vhdxfile"):
		return "vhdx"
	case starts("conectix"), fixedVHD(tail):
		return "vpc"
	case starts("QED\x00"):
		return "qed"
	case len(head) >= 68 && binary.LittleEndian.Uint32(head[64:]) == 0xbeda107f:
		return "vdi"
	}
	return ""
}

// fixedVHD finds the footer in the last sector, which the zeros that fill a
// sector may follow.
func fixedVHD(tail []byte) bool {
	return len(tail) >= 512 && bytes.HasPrefix(tail[len(tail)-512:], []byte("conectix"))
}
