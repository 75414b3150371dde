package sched

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"forerun/block"
	"forerun/internal/chunk"
)

func TestParseRule(t *testing.T) {
	for s, want := range map[string]Rule{
		"20mbit":                        {RateBytes: 2_500_000},
		"1.5gbit":                       {RateBytes: 187_500_000},
		"8bit":                          {RateBytes: 1},
		"3kbps":                         {RateBytes: 3000},
		"10M":                           {RateBytes: 10 << 20},
		"10MiB/s":                       {RateBytes: 10 << 20},
		"12345":                         {RateBytes: 12345},
		"background=50mbit":             {Class: ClassBackground, RateBytes: 6_250_000},
		"writeback=none":                {Class: ClassWriteBack},
		"08:00-18:00=20mbit":            {Timed: true, From: 480, To: 1080, RateBytes: 2_500_000},
		"background@22:00-06:30=20mbit": {Class: ClassBackground, Timed: true, From: 1320, To: 390, RateBytes: 2_500_000},
		"all@00:00-24:00=1kbit":         {}, // refused: it begins when it ends
		"":                              {},
		"=5mbit":                        {},
		"demand=5mbit":                  {},
		"25:00-26:00=5mbit":             {},
		"08:00=5mbit":                   {},
		"08:0-09:00=5mbit":              {},
		"fast":                          {},
		"-5mbit":                        {},
		"NaN":                           {},
		"1e300gbit":                     {},
	} {
		got, err := ParseRule(s)
		refused := want == Rule{}
		if refused != (err != nil) {
			t.Errorf("%q: %+v, %v", s, got, err)
			continue
		}
		if got.text = ""; err == nil && got != want {
			t.Errorf("%q: %+v, want %+v", s, got, want)
		}
	}
}

func TestLimitsByTimeOfDay(t *testing.T) {
	berlin, err := time.LoadLocation("Europe/Berlin")
	if err != nil {
		t.Skip(err)
	}
	at := func(s string) time.Time {
		x, err := time.ParseInLocation("2006-01-02 15:04", s, berlin)
		if err != nil {
			t.Fatal(err)
		}
		return x
	}
	day := []string{"100mbit", "08:00-18:00=20mbit", "12:00-13:00=none", "12:30-14:00=40mbit"}
	night := []string{"22:00-02:30=8bit"}
	for _, c := range []struct {
		rules []string
		now   string
		rate  int64
		until string
	}{
		{nil, "2026-06-01 12:00", 0, ""},
		{[]string{"8bit", "16bit"}, "2026-06-01 12:00", 2, ""},
		{day, "2026-06-01 07:59", 12_500_000, "2026-06-01 08:00"},
		{day, "2026-06-01 08:00", 2_500_000, "2026-06-01 18:00"},
		{day, "2026-06-01 12:15", 2_500_000, "2026-06-01 18:00"}, // the lowest counts, and none is the highest
		{day, "2026-06-01 18:00", 12_500_000, "2026-06-02 08:00"},
		{night, "2026-06-01 23:00", 1, "2026-06-02 02:30"},
		{night, "2026-06-01 02:29", 1, "2026-06-01 02:30"},
		{night, "2026-06-01 02:30", 0, "2026-06-01 22:00"},
		// The clock goes from 02:00 to 03:00 in that night, and 02:30 is not on it.
		{night, "2026-03-29 01:59", 1, "2026-03-29 03:30"},
		// And from 03:00 back to 02:00 in that one.
		{night, "2026-10-25 01:00", 1, "2026-10-25 02:30"},
	} {
		l, err := ParseLimits(c.rules)
		if err != nil {
			t.Fatal(err)
		}
		rate, rule, until := l.At(ClassAll, at(c.now))
		if rate != c.rate || (rate > 0) != (rule != "") {
			t.Errorf("%v at %s: %d bytes/s by %q, want %d", c.rules, c.now, rate, rule, c.rate)
		}
		if c.until == "" && !until.IsZero() || c.until != "" && !until.Equal(at(c.until)) {
			t.Errorf("%v at %s: until %v, want %s", c.rules, c.now, until, c.until)
		}
	}
}

// TestOneLimitForAll: two volumes and write-back share one total, demand is not
// of it, and a change holds at once.
func TestOneLimitForAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 16 << 10
		limits, err := ParseLimits([]string{"1000000", "writeback=250000"})
		if err != nil {
			t.Fatal(err)
		}
		x := NewLimiter(limits)
		l := newLine(20*time.Millisecond, 100e6, size)
		var vols [2]*Scheduler
		ctx, cancel := context.WithCancel(context.Background())
		for k := range vols {
			vols[k] = New(l, func(int64, chunk.Packed) error { return nil }, Options{Limiter: x})
			defer vols[k].Close()
			go vols[k].Fetch(ctx, run(int64(k)<<32, 5000), block.Background)
		}
		var back atomic.Int64
		wctx, stop := context.WithCancel(ctx)
		go func() {
			for x.Wait(wctx, ClassWriteBack, 10_000) == nil {
				back.Add(10_000)
			}
		}()
		time.Sleep(5 * time.Second) // the first guess of a chunk's size is put right
		synctest.Wait()
		sent, wrote := l.total(), back.Load()
		time.Sleep(20 * time.Second)
		synctest.Wait()
		fill, home := float64(l.total()-sent)/20, float64(back.Load()-wrote)/20
		if home < 125e3 || home > 260e3 || fill+home < 900e3 || fill+home > 1.05e6 {
			t.Errorf("fill %.0f and write-back %.0f bytes/s of 1000000 together, 250000 for write-back", fill, home)
		}
		began := time.Now()
		if err := vols[0].Fetch(ctx, []int64{1 << 40}, block.Demand); err != nil || time.Since(began) > 25*time.Millisecond {
			t.Errorf("demand took %v: %v", time.Since(began), err)
		}
		stop()
		synctest.Wait()
		x.Set(nil)
		sent = l.total()
		time.Sleep(3 * time.Second)
		synctest.Wait()
		if n := l.total() - sent; n < 10e6 {
			t.Errorf("%d bytes in three seconds without a limit", n)
		}
		cancel()
	})
}
