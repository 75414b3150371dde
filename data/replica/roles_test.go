package replica

import (
	"testing"
	"time"

	"forerun/data/fence"
)

// TestDecide is the protocol of roles as a table.
func TestDecide(t *testing.T) {
	t0 := time.Now()
	rec := func(epoch, version uint64, primary string, members ...string) fence.Record {
		return fence.Record{Volume: "v", Epoch: epoch, Version: version, Primary: primary, Members: members, Preferred: "a"}
	}
	ab := rec(3, 7, "a", "a", "b")
	for _, c := range []struct {
		what  string
		k     knowledge
		e     event
		after time.Duration // since k.heard
		want  action
		role  role
		epoch uint64
		heard bool // heard was moved to now
	}{
		{"start: this one is primary", knowledge{me: "a"}, event{kind: learned, rec: ab}, 0, rise, undecided, 3, false},
		{"start: the other one is", knowledge{me: "b"}, event{kind: learned, rec: ab}, 0, follow, secondary, 3, false},
		{"no answer", knowledge{me: "b"}, event{kind: learned}, 0, nothing, undecided, 0, false},
		{"a beat before the arbiter answered", knowledge{me: "b"}, event{kind: beat, rec: ab, from: "a"}, 0, follow, secondary, 3, true},
		{"a beat", knowledge{me: "b", role: secondary, rec: ab}, event{kind: beat, rec: ab, from: "a"}, 9, nothing, secondary, 3, true},
		{"a beat of one who is not primary", knowledge{me: "b", role: secondary, rec: ab}, event{kind: beat, rec: ab, from: "c"}, 9, nothing, secondary, 3, false},
		{"a beat of an old epoch", knowledge{me: "b", role: secondary, rec: rec(4, 9, "b", "b")}, event{kind: beat, rec: ab, from: "a"}, 9, rise, secondary, 4, false},
		{"a beat of an old epoch at the primary", knowledge{me: "b", role: primary, rec: rec(4, 9, "b", "b")}, event{kind: beat, rec: ab, from: "a"}, 9, nothing, primary, 4, false},
		{"an old record", knowledge{me: "b", role: secondary, rec: ab}, event{kind: learned, rec: rec(3, 6, "a", "a")}, 9, nothing, secondary, 3, false},
		{"members have changed", knowledge{me: "a", role: primary, rec: ab}, event{kind: learned, rec: rec(3, 8, "a", "a")}, 9, nothing, primary, 3, false},
		{"deposed", knowledge{me: "a", role: primary, rec: ab}, event{kind: learned, rec: rec(4, 8, "b", "b")}, 9, follow, secondary, 4, true},
		{"deposed and in office again", knowledge{me: "a", role: primary, rec: ab}, event{kind: learned, rec: rec(5, 9, "a", "a")}, 9, follow, secondary, 5, false},
		{"dropped", knowledge{me: "a", role: primary, rec: ab}, event{kind: learned, rec: fence.Record{Volume: "v", Epoch: 4, Version: 8}}, 9, follow, secondary, 4, true},
		{"granted", knowledge{me: "b", role: secondary, rec: ab}, event{kind: learned, rec: rec(4, 8, "b", "b")}, 9, rise, secondary, 4, false},
		{"time: to rise", knowledge{me: "b", role: secondary, rec: rec(4, 8, "b", "b")}, event{kind: tick}, 0, rise, secondary, 4, false},
		{"time: primary", knowledge{me: "a", role: primary, rec: ab}, event{kind: tick}, time.Hour, nothing, primary, 3, false},
		{"time: nothing known", knowledge{me: "a"}, event{kind: tick}, time.Hour, nothing, undecided, 0, false},
		{"time: it was heard", knowledge{me: "b", role: secondary, rec: ab, whole: true}, event{kind: tick}, askAfter - 1, nothing, secondary, 3, false},
		{"time: silence", knowledge{me: "b", role: secondary, rec: ab, whole: true}, event{kind: tick}, askAfter, takeOver, secondary, 3, false},
		{"time: silence, after a power cut", knowledge{me: "b", role: secondary, rec: ab}, event{kind: tick}, askAfter, look, secondary, 3, false},
		{"time: silence, no member", knowledge{me: "b", role: secondary, rec: rec(3, 8, "a", "a"), whole: true}, event{kind: tick}, askAfter, look, secondary, 3, false},
	} {
		c.k.heard = t0
		k, got := decide(c.k, c.e, t0.Add(c.after))
		if got != c.want || k.role != c.role || k.rec.Epoch != c.epoch {
			t.Errorf("%s: action %d, role %v, epoch %d; should be %d, %v, %d", c.what, got, k.role, k.rec.Epoch, c.want, c.role, c.epoch)
		}
		if c.after > 0 && c.heard != k.heard.Equal(t0.Add(c.after)) {
			t.Errorf("%s: heard moved: %v", c.what, !c.heard)
		}
		if k.rec.Epoch == c.k.rec.Epoch && k.rec.Version < c.k.rec.Version || k.rec.Epoch < c.k.rec.Epoch {
			t.Errorf("%s: knowledge went back", c.what)
		}
	}
}
