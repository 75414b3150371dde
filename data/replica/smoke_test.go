package replica

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"forerun/block"
	"forerun/block/blocktest"
	"forerun/data/fence"
	"forerun/data/journal"
	"forerun/disk/disktest"
)

type direct struct {
	to   **Mux
	from string
	rtt  time.Duration
}

func (d direct) Call(ctx context.Context, typ uint8, parts ...[]byte) ([]byte, error) {
	var p []byte
	for _, q := range parts {
		p = append(p, q...)
	}
	time.Sleep(d.rtt / 2)
	if *d.to == nil {
		return nil, block.E("x", "", block.KindUnavailable, nil)
	}
	out, err := (*d.to).Serve(ctx, d.from, typ, p)
	time.Sleep(d.rtt / 2)
	return out, err
}

type toArb struct {
	a    *fence.Arbiter
	from string
}

func (d toArb) Call(ctx context.Context, typ uint8, parts ...[]byte) ([]byte, error) {
	var p []byte
	for _, q := range parts {
		p = append(p, q...)
	}
	time.Sleep(time.Millisecond)
	return d.a.Serve(ctx, "frontend", d.from, typ, p)
}

func TestSmoke(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		arb, err := fence.Open(fence.Options{FS: disktest.New(1), Dir: "arb"})
		if err != nil {
			t.Fatal(err)
		}
		defer arb.Close()
		var muxes [2]*Mux
		var vols [2]*Volume
		var twins [2]*blocktest.Twin
		names := []string{"a", "b"}
		for i := range 2 {
			twins[i] = blocktest.NewTwin(1<<20, 512)
			j, err := journal.Open(disktest.New(uint64(i)), "j", twins[i], journal.Options{SegmentBytes: 256 << 10})
			if err != nil {
				t.Fatal(err)
			}
			vols[i], err = Open(Config{Volume: "v", Node: names[i], Local: j, Log: j, CleanStart: true,
				Fence: fence.NewClient(toArb{arb, names[i]}, "v", names[i]),
				Peer:  direct{&muxes[1-i], names[i], time.Millisecond}})
			if err != nil {
				t.Fatal(err)
			}
			muxes[i] = &Mux{}
			muxes[i].Add(vols[i])
			go vols[i].Run(context.Background())
			time.Sleep(10 * time.Millisecond)
		}
		ctx := context.Background()
		p := make([]byte, 4096)
		for i := range 10 {
			p[0] = byte(i + 1)
			if err := vols[i%2].WriteAt(ctx, p, int64(i)*4096, 0); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(3 * time.Second)
		t.Logf("%+v\n%+v", vols[0].Status(), vols[1].Status())
		if string(twins[0].Bytes()) != string(twins[1].Bytes()) {
			t.Fatal("differ")
		}
		start := time.Now()
		if err := vols[0].Handover(ctx); err != nil {
			t.Fatal(err)
		}
		t.Log("handover", time.Since(start))
		if err := vols[0].WriteAt(ctx, p, 0, block.FUA); err != nil {
			t.Fatal(err)
		}
		t.Log("write", time.Since(start))
		time.Sleep(3 * time.Second)
		t.Logf("%+v\n%+v", vols[0].Status(), vols[1].Status())
		// b dies
		start = time.Now()
		muxes[1] = nil
		vols[1].Close()
		if err := vols[0].WriteAt(ctx, p, 0, 0); err != nil {
			t.Fatal(err)
		}
		t.Log("write after death", time.Since(start))
		t.Logf("%+v", vols[0].Status())
		vols[0].Close()
	})
}
