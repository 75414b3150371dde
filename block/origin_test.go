package block_test

import (
	"context"
	"testing"

	"forerun/block"
)

func TestOrigin(t *testing.T) {
	if block.OriginGone(context.Background()) {
		t.Error("nobody has gone")
	}
	gone := false
	ctx := block.WithOrigin(context.Background(), func() bool { return gone })
	below, cancel := context.WithCancel(ctx)
	defer cancel()
	if block.OriginGone(below) {
		t.Error("it is there")
	}
	if gone = true; !block.OriginGone(below) {
		t.Error("it has gone")
	}
}
