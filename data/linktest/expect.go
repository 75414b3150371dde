package linktest

import (
	"fmt"
	"math"
	"strconv"
	"time"
)

// Plan is what is to be moved over the line.
type Plan struct {
	// SizeBytes is the data of the disks, without holes.
	SizeBytes int64
	// Ratio is how well it compresses: plain bytes over bytes on the line.
	Ratio float64
}

// What the figures assume beside what was measured.
const (
	// use is the share of the line that the background transfer gets to use.
	use = 0.95
	// A Debian server guest fetches so much before it is ready, in compressed
	// bytes, and so many of its reads wait for the one before.
	bootLowBytes, bootHighBytes = 60e6, 90e6
	bootLowTrips, bootHighTrips = 300, 900
	// chunkBytes is the default chunk.
	chunkBytes = 64 << 10
	// ownQueueMS is the queue that the background transfer allows itself.
	ownQueueMS = 25
	// Loss above lossy, and one connection below far of the best, is what a
	// congestion control that takes loss for congestion looks like.
	lossy, far = 0.001, 0.7
	// growing: so near to proportional, more connections would bring more still.
	growing = 0.75
)

// Expectation is what a migration over a measured line will be like.
type Expectation struct {
	SizeBytes int64   `json:"size_bytes"`
	Ratio     float64 `json:"ratio"`
	// FillRate is bytes a second on the line, FillS the time of the whole transfer in seconds.
	FillRate float64 `json:"fill_rate_bytes_s"`
	FillS    float64 `json:"fill_s"`
	// Connections is the fewest measured that come to 95 % of the best rate. More
	// says that the rate was still growing with them.
	Connections int  `json:"background_connections"`
	More        bool `json:"more_connections_may_help"`
	// ReadIdleMS is a demand read of a 64 KiB chunk on the idle line, ReadFullMS the
	// same behind a full queue.
	ReadIdleMS float64 `json:"read_idle_ms"`
	ReadFullMS float64 `json:"read_full_ms"`
	// BootLowS and BootHighS bound what the line adds to a boot, in seconds.
	BootLowS  float64 `json:"boot_low_s"`
	BootHighS float64 `json:"boot_high_s"`
	// WriteBack is plain bytes a second that can go back for good.
	WriteBack float64 `json:"write_back_bytes_s"`
	// QoS says that the network should put demand ahead if others fill the line.
	QoS bool `json:"qos_advised"`
	// BBR says that another congestion control at the sender would help.
	BBR bool `json:"bbr_advised"`
	// Lines explain each of them.
	Lines []string `json:"lines"`
}

// best is the phase with the highest rate.
func best(all []Phase) (b Phase) {
	for _, p := range all {
		if p.Rate > b.Rate {
			b = p
		}
	}
	return b
}

// Expect computes what to expect. The plan's size is not negative and its
// ratio positive; a result without downloads or uploads gives nothing but zeros.
func (r Result) Expect(p Plan) Expectation {
	e := Expectation{SizeBytes: p.SizeBytes, Ratio: p.Ratio}
	if len(r.Downloads) == 0 || len(r.Uploads) == 0 {
		return e
	}
	one, top, up := r.Downloads[0], best(r.Downloads), best(r.Uploads)
	say := func(format string, args ...any) { e.Lines = append(e.Lines, fmt.Sprintf(format, args...)) }

	e.FillRate = use * top.Rate
	e.FillS = float64(p.SizeBytes) / p.Ratio / e.FillRate
	say("fill: %s for %.4g GiB of data, compressed %.3g : 1, at 95 %% of %s; holes and zeros are not sent and make it shorter",
		span(e.FillS), float64(p.SizeBytes)/(1<<30), p.Ratio, Mbit(top.Rate))

	for _, q := range r.Downloads {
		if q.Rate >= nearBest*top.Rate {
			e.Connections = q.Connections
			break
		}
	}
	e.connections(r.Downloads, say)

	// Demand has one connection of its own.
	chunk := chunkBytes / p.Ratio / one.Rate * 1000
	full := one
	for _, q := range r.Downloads {
		if q.RTT.MedianMS > full.RTT.MedianMS {
			full = q
		}
	}
	e.ReadIdleMS = r.Idle.MedianMS + chunk
	e.ReadFullMS = max(full.RTT.MedianMS, r.Idle.MedianMS) + chunk
	say("demand read of a 64 KiB chunk: %s ms on the idle line (a round trip and %s ms of data), %s ms behind a queue that others keep full",
		figure(e.ReadIdleMS), figure(chunk), figure(e.ReadFullMS))

	e.BootLowS = bootLowBytes/one.Rate + bootLowTrips*r.Idle.MedianMS/1000
	e.BootHighS = bootHighBytes/one.Rate + bootHighTrips*r.Idle.MedianMS/1000
	say("boot: %s to %s more than from a local disk, for a Debian server (assumed: 60 to 90 MB compressed, 300 to 900 reads one after another)",
		span(e.BootLowS), span(e.BootHighS))

	e.WriteBack = use * p.Ratio * up.Rate
	say("write-back: up to %s of changes (%s on the line, compressed %.3g : 1); a workload that writes more for long makes the recovery point older",
		perSecond(e.WriteBack), Mbit(up.Rate), p.Ratio)

	e.QoS = full.BloatMS >= 30
	switch {
	case e.QoS:
		under := ""
		if full.Congestion != "" {
			under = " under " + full.Congestion
		}
		say("priorities in the network: a full line%s makes a read wait %s ms longer (%s). Forerun keeps its own queue near %d ms, so none are needed "+
			"while it is the main load; if others fill the line, put demand ahead there or shorten the line's queue", under, figure(full.BloatMS), full.Grade, ownQueueMS)
	case e.More:
		say("priorities in the network: unknown, what was tried did not fill the line, so its queue was not seen")
	default:
		say("priorities in the network: not needed, a full line makes a read wait %s ms longer (%s)", figure(full.BloatMS), full.Grade)
	}
	e.congestion(r.Downloads, one, top, say)
	return e
}

func (e *Expectation) connections(all []Phase, say func(string, ...any)) {
	one, last := all[0], all[len(all)-1]
	if n := len(all); n > 1 && e.Connections == last.Connections {
		before := all[n-2]
		e.More = last.Rate/before.Rate >= growing*float64(last.Connections)/float64(before.Connections)
	}
	switch {
	case e.More:
		say("background connections: %d or more, the rate still grew with them (one came to %.0f %%); measure with a larger --connections",
			e.Connections, 100*one.Rate/best(all).Rate)
	case e.Connections == 1 && len(all) > 1:
		say("background connections: 1 is enough, it fills the line; the default of 2 does no harm")
	case e.Connections == 1:
		say("background connections: 1 was measured; more may or may not be faster")
	default:
		say("background connections: %d, the fewest that come to 95 %% of the best (one came to %.0f %%); frontend --background-connections %d",
			e.Connections, 100*one.Rate/best(all).Rate, e.Connections)
	}
}

// congestion is about loss and what the sender makes of it.
func (e *Expectation) congestion(all []Phase, one, top Phase, say func(string, ...any)) {
	var sum Loss
	least := 1.0 // more than that is overflow of the queue by many connections
	for _, p := range all {
		if p.Loss == nil {
			say("loss: unknown, the backend's system does not tell")
			return
		}
		sum.Segments += p.Loss.Segments
		sum.Again += p.Loss.Again
		least = min(least, p.Loss.Share)
	}
	if sum.Segments > 0 {
		sum.Share = float64(sum.Again) / float64(sum.Segments)
	}
	text := fmt.Sprintf("loss: %.2g %% of %d segments were sent again", 100*sum.Share, sum.Segments)
	if sum.Again == 0 {
		text = fmt.Sprintf("loss: none in %d segments", sum.Segments)
	}
	e.BBR = least > lossy && one.Rate < far*top.Rate && one.Congestion != "bbr"
	switch {
	case e.BBR:
		text += fmt.Sprintf(", and one connection under %s comes to %.0f %% of %d; use BBR at the backend (sysctl net.ipv4.tcp_congestion_control=bbr)",
			one.Congestion, 100*one.Rate/top.Rate, top.Connections)
	case sum.Share > lossy && least <= lossy:
		text += "; nearly all by more connections than the line's queue could hold, the line itself loses next to nothing"
	case sum.Share > lossy:
		text += fmt.Sprintf("; %s copes, one connection comes to %.0f %% of the best", one.Congestion, 100*one.Rate/top.Rate)
	}
	say("%s", text)
}

// span shows seconds as an operator says them.
func span(s float64) string {
	switch {
	case math.IsInf(s, 0) || math.IsNaN(s) || s > 1e9:
		return "for ever"
	case s < 10:
		return fmt.Sprintf("%.1f s", s)
	case s < 120:
		return fmt.Sprintf("%.0f s", s)
	case s < 48*3600:
		return (time.Duration(s) * time.Second).String()
	}
	return fmt.Sprintf("%.1f days", s/86400)
}

// perSecond shows plain bytes a second.
func perSecond(n float64) string {
	switch {
	case n < 1<<20:
		return figure(n/(1<<10)) + " KiB/s"
	case n < 1<<30:
		return figure(n/(1<<20)) + " MiB/s"
	}
	return figure(n/(1<<30)) + " GiB/s"
}

// Mbit shows a rate in bytes a second as a line's is said: in bits.
func Mbit(bytesPerSecond float64) string {
	b := 8 * bytesPerSecond
	switch {
	case b < 1e6:
		return figure(b/1e3) + " kbit/s"
	case b < 1e9:
		return figure(b/1e6) + " Mbit/s"
	}
	return figure(b/1e9) + " Gbit/s"
}

// figure shows a number with three digits, or all those before the point.
func figure(x float64) string {
	switch {
	case x >= 99.95:
		return strconv.FormatFloat(x, 'f', 0, 64)
	case x >= 9.995:
		return strconv.FormatFloat(x, 'f', 1, 64)
	case x < 0.005:
		return "0"
	}
	return strconv.FormatFloat(x, 'f', 2, 64)
}
