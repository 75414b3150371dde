package sched

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Class is what a limit is about.
type Class uint8

// The classes that can be limited. Demand is none of them: nobody limits what
// a workload waits for.
const (
	ClassAll        Class = iota // background and write-back together
	ClassBackground              // fill and read-ahead
	ClassWriteBack               // changes on their way to the source
	limitClasses
)

var classNames = [limitClasses]string{"all", "background", "writeback"}

// String is the class's name in a rule.
func (c Class) String() string { return classNames[c] }

// Rule limits a class, always or in a part of the day.
type Rule struct {
	Class     Class
	Timed     bool
	From, To  int   // minutes of the local day; To before From goes past midnight
	RateBytes int64 // a second, 0 for no limit
	text      string
}

// String is the rule as it was written.
func (r Rule) String() string { return r.text }

// ParseRule reads [CLASS][@HH:MM-HH:MM]=RATE, HH:MM-HH:MM=RATE or RATE. CLASS
// is background, writeback, or all, which is also meant when there is none:
// both together. RATE is as ParseRate reads it.
func ParseRule(s string) (Rule, error) {
	bad := func(why string) (Rule, error) {
		return Rule{}, fmt.Errorf("limit %q: %s; examples: 20mbit, background=50mbit, 08:00-18:00=20mbit, writeback@22:00-06:00=none", s, why)
	}
	r := Rule{text: strings.TrimSpace(s)}
	what, rate, ok := strings.Cut(r.text, "=")
	if !ok {
		what, rate = "", r.text
	}
	var err error
	if r.RateBytes, err = ParseRate(rate); err != nil {
		return bad(err.Error())
	}
	class, span, timed := strings.Cut(what, "@")
	if !timed && strings.Contains(what, ":") {
		class, span, timed = "", what, true
	}
	if ok && what == "" {
		return bad("nothing stands before =")
	}
	switch class {
	case "", "all":
	case "background":
		r.Class = ClassBackground
	case "writeback", "write-back":
		r.Class = ClassWriteBack
	default:
		return bad(fmt.Sprintf("%q is not background, writeback or all", class))
	}
	if !timed {
		return r, nil
	}
	r.Timed = true
	from, to, ok := strings.Cut(span, "-")
	if !ok {
		return bad("a time of day is HH:MM-HH:MM")
	}
	if r.From, err = minutes(from); err == nil {
		r.To, err = minutes(to)
	}
	switch {
	case err != nil:
		return bad(err.Error())
	case r.From%(24*60) == r.To%(24*60):
		return bad("it begins when it ends")
	}
	return r, nil
}

// minutes reads HH:MM, up to 24:00.
func minutes(s string) (int, error) {
	h, m, ok := strings.Cut(s, ":")
	hh, err1 := strconv.ParseUint(h, 10, 8)
	mm, err2 := strconv.ParseUint(m, 10, 8)
	if !ok || err1 != nil || err2 != nil || len(m) != 2 || mm > 59 || hh*60+mm > 24*60 {
		return 0, fmt.Errorf("%q is not a time of day from 00:00 to 24:00", s)
	}
	return int(hh*60 + mm), nil
}

// ParseRate reads a rate and returns bytes a second: bits with bit, kbit, mbit
// or gbit, bytes with bps, kbps, mbps or gbps, as tc has them (by thousands);
// bytes with K, M or G for powers of 1024; plain bytes; none for no limit, which is 0.
func ParseRate(s string) (int64, error) {
	n := strings.TrimSuffix(strings.ToLower(strings.TrimSpace(s)), "/s")
	if n == "none" {
		return 0, nil
	}
	unit := 1.0
	for _, u := range []struct {
		name  string
		bytes float64
	}{{"gbit", 125e6}, {"mbit", 125e3}, {"kbit", 125}, {"bit", 1. / 8}, {"gbps", 1e9}, {"mbps", 1e6}, {"kbps", 1e3}, {"bps", 1},
		{"gib", 1 << 30}, {"mib", 1 << 20}, {"kib", 1 << 10}, {"g", 1 << 30}, {"m", 1 << 20}, {"k", 1 << 10}} {
		if rest, ok := strings.CutSuffix(n, u.name); ok {
			n, unit = rest, u.bytes
			break
		}
	}
	v, err := strconv.ParseFloat(strings.TrimSpace(n), 64)
	if err != nil || !(v >= 0 && v*unit < 1e15) {
		return 0, fmt.Errorf("%q is not a rate: write 20mbit, 500kbit, 10M (bytes) or none", s)
	}
	if v > 0 {
		return int64(math.Ceil(v * unit)), nil
	}
	return 0, nil
}

// Limits are the rules of a site. A rule for a time of day goes before one for
// always; of several that hold at a time the lowest counts, and of several for
// always the last. Pure: the time, with its zone, is an argument.
type Limits []Rule

// ParseLimits reads rules; see ParseRule.
func ParseLimits(rules []string) (Limits, error) {
	l := make(Limits, 0, len(rules))
	for _, s := range rules {
		r, err := ParseRule(s)
		if err != nil {
			return nil, err
		}
		l = append(l, r)
	}
	return l, nil
}

// at finds the rule of a class that holds at t, if one does.
func (l Limits) at(c Class, t time.Time) (in Rule, ok bool) {
	now := t.Hour()*60 + t.Minute()
	for _, r := range l {
		switch {
		case r.Class != c:
		case !r.Timed:
			if !ok || !in.Timed {
				in, ok = r, true
			}
		case r.From < r.To && (now < r.From || now >= r.To), r.From > r.To && now < r.From && now >= r.To:
		case !ok || !in.Timed || cmp.Compare(uint64(r.RateBytes-1), uint64(in.RateBytes-1)) < 0: // no limit is the highest
			in, ok = r, true
		}
	}
	return in, ok
}

// At says what limits a class at t: bytes a second, 0 for nothing, the rule that
// says so, and until when; the zero time for ever.
func (l Limits) At(c Class, t time.Time) (rateBytes int64, rule string, until time.Time) {
	in, _ := l.at(c, t)
	// Boundaries are times on the clock on the wall: time.Date finds them also
	// on the days on which it is changed.
	for _, r := range l {
		if r.Class != c || !r.Timed {
			continue
		}
		for day := 0; day <= 2; day++ {
			for _, m := range [2]int{r.From, r.To} {
				b := time.Date(t.Year(), t.Month(), t.Day()+day, 0, m, 0, 0, t.Location())
				if b.After(t) && (until.IsZero() || b.Before(until)) {
					if next, _ := l.at(c, b); next != in {
						until = b
					}
				}
			}
		}
	}
	return in.RateBytes, in.text, until
}

// InForce is what limits a class now.
type InForce struct {
	Class     Class
	RateBytes int64  // a second, 0 for none
	Rule      string // that says so, empty when none does
	Until     time.Time
}

// Limiter holds the background and write-back of all volumes of a node to one
// total. It may be used from any goroutine.
type Limiter struct {
	mu      sync.Mutex
	limits  Limits
	buckets [limitClasses]bucket
	check   time.Time // when the rules are looked at again
}

// NewLimiter returns a limiter with these rules.
func NewLimiter(l Limits) *Limiter { return &Limiter{limits: l} }

// Set changes the rules; they hold at once.
func (x *Limiter) Set(l Limits) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.limits, x.check = l, time.Time{}
}

// Rules are the rules as they were written.
func (x *Limiter) Rules() []string {
	x.mu.Lock()
	defer x.mu.Unlock()
	out := make([]string, 0, len(x.limits))
	for _, r := range x.limits {
		out = append(out, r.text)
	}
	return out
}

// InForce says what holds at now, class by class.
func (x *Limiter) InForce(now time.Time) []InForce {
	x.mu.Lock()
	defer x.mu.Unlock()
	var out []InForce
	for c := range limitClasses {
		f := InForce{Class: c}
		f.RateBytes, f.Rule, f.Until = x.limits.At(c, now)
		out = append(out, f)
	}
	return out
}

// recheck is how often the rules are looked at: a clock that is set is
// followed that soon.
const recheck = time.Second

// update applies the rules that hold now. x.mu is held.
func (x *Limiter) update(now time.Time) {
	if now.Before(x.check) && x.check.Sub(now) <= recheck {
		return
	}
	x.check = now.Add(recheck)
	for c := range limitClasses {
		if in, _ := x.limits.at(c, now); float64(in.RateBytes) != x.buckets[c].rate {
			x.buckets[c].setRate(now, in.RateBytes)
		}
	}
}

// wait says how long c may ask for nothing, 0 for not at all; at most a second,
// after which it is to be asked again. A nil Limiter never waits.
func (x *Limiter) wait(c Class, now time.Time) time.Duration {
	if x == nil {
		return 0
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.update(now)
	return min(max(x.buckets[c].wait(now), x.buckets[ClassAll].wait(now)), recheck)
}

// take charges n bytes of c; a negative n gives back.
func (x *Limiter) take(c Class, now time.Time, n int64) {
	if x == nil {
		return
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.update(now)
	x.buckets[c].take(now, n)
	x.buckets[ClassAll].take(now, n)
}

// Wait returns when n bytes of c may be sent, and charges them. It fails when
// ctx ends.
func (x *Limiter) Wait(ctx context.Context, c Class, n int) error {
	for {
		d := x.wait(c, time.Now())
		if d == 0 {
			x.take(c, time.Now(), int64(n))
			return nil
		}
		t := time.NewTimer(d)
		select {
		case <-ctx.Done():
			t.Stop()
			return context.Cause(ctx)
		case <-t.C:
		}
	}
}
