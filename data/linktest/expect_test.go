package linktest

import (
	"math"
	"strings"
	"testing"
)

// measured is a line of 100 Mbit/s and 40 ms.
func measured() Result {
	const full = 12.5e6
	down := func(k int, rate, rtt float64) Phase {
		return Phase{Direction: Download, Connections: k, Rate: rate, RTT: RTT{Samples: 9, MedianMS: rtt}, BloatMS: rtt - 40, Grade: Grade(rtt - 40),
			Loss: &Loss{Segments: 10000, Again: 0}, Congestion: "cubic"}
	}
	return Result{Idle: RTT{MedianMS: 40}, Downloads: []Phase{down(1, full, 45), down(4, full, 50)},
		Uploads: []Phase{{Direction: Upload, Connections: 1, Rate: 2e6}}}
}

func near(t *testing.T, what string, got, want float64) {
	t.Helper()
	if math.Abs(got-want) > want/1000 {
		t.Errorf("%s: %v, want %v", what, got, want)
	}
}

func TestExpect(t *testing.T) {
	r := measured()
	e := r.Expect(Plan{SizeBytes: 10 << 30, Ratio: 2})
	near(t, "fill", e.FillS, float64(10<<30)/2/(0.95*12.5e6))
	near(t, "read", e.ReadIdleMS, 40+32768/12.5e3)
	near(t, "read behind a queue", e.ReadFullMS, 50+32768/12.5e3)
	near(t, "boot", e.BootLowS, 60/12.5+300*.04)
	near(t, "boot", e.BootHighS, 90/12.5+900*.04)
	near(t, "write-back", e.WriteBack, .95*2*2e6)
	if e.Connections != 1 || e.More || e.QoS || e.BBR || len(e.Lines) != 7 {
		t.Errorf("%+v", e)
	}

	// Loss halves what one connection gets, and the queue is deep.
	for i, rate := range []float64{3e6, 12e6} {
		r.Downloads[i].Rate, *r.Downloads[i].Loss = rate, Loss{10000, 100, 0.01}
		r.Downloads[i].RTT.MedianMS, r.Downloads[i].BloatMS = 440, 400
	}
	e = r.Expect(Plan{SizeBytes: 1 << 30, Ratio: 1})
	if !e.BBR || !e.QoS || e.Connections != 4 || !e.More {
		t.Errorf("%+v", e)
	}
	text := strings.Join(e.Lines, "\n")
	for _, want := range []string{"tcp_congestion_control=bbr", "4 or more", "demand ahead", "1 % of 20000 segments"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in\n%s", want, text)
		}
	}
	r.Downloads[0].Congestion = "bbr"
	if e := r.Expect(Plan{SizeBytes: 1, Ratio: 1}); e.BBR {
		t.Error("BBR is advised to who has it")
	}
	// What the queue could not hold is no fault of the line.
	r.Downloads[0].Congestion, r.Downloads[0].Loss = "cubic", &Loss{Segments: 10000}
	if e := r.Expect(Plan{SizeBytes: 1, Ratio: 1}); e.BBR || !strings.Contains(strings.Join(e.Lines, "\n"), "the line itself loses next to nothing") {
		t.Errorf("%+v", e)
	}
	r.Downloads[1].BloatMS, r.Downloads[0].BloatMS = 2, 1
	r.Downloads[1].RTT.MedianMS = 442
	if e := r.Expect(Plan{SizeBytes: 1, Ratio: 1}); e.QoS || !strings.Contains(strings.Join(e.Lines, "\n"), "its queue was not seen") {
		t.Errorf("%+v", e)
	}
	r.Downloads[1].Loss = nil
	if e := r.Expect(Plan{SizeBytes: 1, Ratio: 1}); e.BBR || !strings.Contains(strings.Join(e.Lines, "\n"), "loss: unknown") {
		t.Errorf("%+v", e)
	}

	// Two of four are enough.
	r = measured()
	two := r.Downloads[0]
	two.Connections, two.Rate = 2, 12e6
	r.Downloads[0].Rate = 8e6
	r.Downloads = []Phase{r.Downloads[0], two, r.Downloads[1]}
	if e := r.Expect(Plan{SizeBytes: 1, Ratio: 1}); e.Connections != 2 || e.More {
		t.Errorf("%+v", e)
	}
	if e := (Result{}).Expect(Plan{SizeBytes: 1, Ratio: 1}); len(e.Lines) != 0 {
		t.Errorf("nothing was measured: %q", e.Lines)
	}
}

func TestFigures(t *testing.T) {
	for _, c := range [][2]string{
		{figure(1040.4), "1040"}, {figure(99.96), "100"}, {figure(9.996), "10.0"}, {figure(0.123), "0.12"}, {figure(0.001), "0"},
		{Mbit(12.5e6), "100 Mbit/s"}, {Mbit(1e4), "80.0 kbit/s"}, {Mbit(1.25e9), "10.0 Gbit/s"}, {perSecond(3 << 20), "3.00 MiB/s"},
		{span(451), "7m31s"}, {span(3), "3.0 s"}, {span(1e6), "11.6 days"}, {span(math.Inf(1)), "for ever"},
		{Grade(4), "none"}, {Grade(29), "slight"}, {Grade(99), "noticeable"}, {Grade(399), "heavy"}, {Grade(400), "severe"},
	} {
		if c[0] != c[1] {
			t.Errorf("%s, want %s", c[0], c[1])
		}
	}
}
