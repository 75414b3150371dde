package fence

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"forerun/block"
)

var t0 = time.Now()

func rec(epoch, version uint64, primary string, members ...string) Record {
	return Record{Volume: "v", Epoch: epoch, Version: version, Primary: primary, Members: members, Preferred: "a", Cause: CauseClaim}
}

// TestStep goes through every decision, each on a record and a time since the
// primary was heard of.
func TestStep(t *testing.T) {
	none := Record{Volume: "v"}
	dropped := Record{Volume: "v", Epoch: 4, Version: 9}
	both, alone := rec(3, 7, "a", "a", "b"), rec(3, 7, "a", "a")
	changed := func(r Record, f func(*Record)) Record {
		r = r.clone()
		f(&r)
		return r
	}
	set := func(node string, epoch, version uint64, members ...string) request {
		return request{op: opSetMembers, node: node, epoch: epoch, version: version, members: members}
	}
	take := func(node string, epoch, version uint64, force bool) request {
		return request{op: opTakeover, node: node, epoch: epoch, version: version, flag: force}
	}
	give := func(node string, epoch, version uint64, to string, prefer bool) request {
		return request{op: opHandover, node: node, epoch: epoch, version: version, members: []string{to}, flag: prefer}
	}
	do := func(o op, node string, epoch, version uint64) request {
		return request{op: o, node: node, epoch: epoch, version: version}
	}
	byB := func(cause Cause, members ...string) Record {
		return changed(both, func(r *Record) { r.Epoch, r.Version, r.Primary, r.Members, r.Cause = 4, 8, "b", members, cause })
	}
	const soon, late = Grace - 1, Grace
	for _, c := range []struct {
		what string
		rec  Record
		ago  time.Duration
		q    request
		kind block.Kind
		want Record
		hear bool // counts as the primary's sign of life
	}{
		{"get nothing", none, 0, do(opGet, "a", 0, 0), block.KindNotFound, none, false},
		{"get", both, 0, do(opGet, "z", 0, 0), block.KindNone, both, false},
		{"get what was dropped", dropped, 0, do(opGet, "a", 4, 0), block.KindNotFound, dropped, false},

		{"first claim", none, 0, do(opClaim, "a", 0, 0), block.KindNone, rec(1, 1, "a", "a"), true},
		{"claim what is held", both, late, do(opClaim, "b", 0, 0), block.KindNone, changed(both, func(r *Record) { r.Version = 8 }), false},
		{"claim by a stranger", both, late, do(opClaim, "z", 0, 0), block.KindNone, changed(both, func(r *Record) { r.Version = 8 }), false},
		{"claim what was dropped", dropped, 0, do(opClaim, "a", 0, 9), block.KindNone, rec(5, 10, "a", "a"), true},
		{"claim from before the drop", dropped, 0, do(opClaim, "a", 0, 0), block.KindBusy, dropped, false},

		{"renew", both, soon, do(opRenew, "a", 3, 0), block.KindNone, both, true},
		{"renew by the other", both, soon, do(opRenew, "b", 3, 0), block.KindFenced, both, false},
		{"renew of an old epoch", both, soon, do(opRenew, "a", 2, 0), block.KindFenced, both, false},
		{"renew of an epoch to come", both, soon, do(opRenew, "a", 4, 0), block.KindFenced, both, false},
		{"renew of nothing", none, soon, do(opRenew, "a", 1, 0), block.KindNotFound, none, false},

		{"member in", alone, soon, set("a", 3, 7, "a", "b"), block.KindNone, changed(both, func(r *Record) { r.Version = 8 }), false},
		{"member out", both, soon, set("a", 3, 7, "a"), block.KindNone, changed(alone, func(r *Record) { r.Version = 8 }), false},
		{"members again", changed(alone, func(r *Record) { r.Version = 8 }), soon, set("a", 3, 7, "a"), block.KindNone, changed(alone, func(r *Record) { r.Version = 8 }), false},
		{"members, old version", both, soon, set("a", 3, 6, "a"), block.KindBusy, both, false},
		{"members, old version, the same set", both, soon, set("a", 3, 5, "a", "b"), block.KindBusy, both, false},
		{"members, old epoch", both, soon, set("a", 2, 7, "a"), block.KindFenced, both, false},
		{"members by the other", both, soon, set("b", 3, 7, "b"), block.KindFenced, both, false},

		{"takeover", both, late, take("b", 3, 7, false), block.KindNone, byB(CauseTakeover, "b"), true},
		{"takeover too early", both, soon, take("b", 3, 7, false), block.KindBusy, both, false},
		{"takeover, old version", both, late, take("b", 3, 6, false), block.KindBusy, both, false},
		{"takeover, old epoch", both, late, take("b", 2, 7, false), block.KindFenced, both, false},
		{"takeover by a stranger", both, late, take("z", 3, 7, false), block.KindDenied, both, false},
		{"takeover by one out of sync", alone, late, take("b", 3, 7, false), block.KindDenied, alone, false},
		{"takeover by force", alone, late, take("b", 3, 7, true), block.KindNone, byB(CauseForce, "b"), true},
		{"force of a member", both, late, take("b", 3, 7, true), block.KindNone, byB(CauseTakeover, "b"), true},
		{"force too early", alone, soon, take("b", 3, 7, true), block.KindBusy, alone, false},
		{"takeover by the primary", both, soon, take("a", 3, 7, false), block.KindNone, both, true},
		{"takeover again", byB(CauseTakeover, "b"), soon, take("b", 3, 7, false), block.KindNone, byB(CauseTakeover, "b"), true},
		{"takeover when it was handed over", byB(CauseHandover, "a", "b"), soon, take("b", 3, 7, false), block.KindNone, byB(CauseHandover, "a", "b"), true},
		{"takeover by the old one", byB(CauseTakeover, "b"), late, take("a", 3, 7, false), block.KindFenced, byB(CauseTakeover, "b"), false},
		{"takeover of nothing", none, late, take("b", 0, 0, true), block.KindNotFound, none, false},

		{"handover", both, soon, give("a", 3, 7, "b", false), block.KindNone, byB(CauseHandover, "a", "b"), true},
		{"handover for good", both, soon, give("a", 3, 7, "b", true), block.KindNone,
			changed(byB(CauseHandover, "a", "b"), func(r *Record) { r.Preferred = "b" }), true},
		{"handover to one out of sync", alone, late, give("a", 3, 7, "b", false), block.KindDenied, alone, false},
		{"handover to oneself", both, late, give("a", 3, 7, "a", false), block.KindNone, both, false},
		{"handover by the other", both, late, give("b", 3, 7, "a", false), block.KindFenced, both, false},
		{"handover, old version", both, late, give("a", 3, 6, "b", false), block.KindBusy, both, false},
		{"handover again", byB(CauseHandover, "a", "b"), soon, give("a", 3, 7, "b", false), block.KindNone, byB(CauseHandover, "a", "b"), false},

		{"drop", both, soon, do(opDrop, "a", 3, 7), block.KindNone, Record{Volume: "v", Epoch: 4, Version: 8}, false},
		{"drop again", dropped, soon, do(opDrop, "a", 3, 8), block.KindNone, dropped, false},
		{"drop by the other", both, late, do(opDrop, "b", 3, 7), block.KindFenced, both, false},
		{"drop, old version", both, late, do(opDrop, "a", 3, 6), block.KindBusy, both, false},
		{"unknown", both, late, do(99, "a", 3, 7), block.KindUnsupported, both, false},
	} {
		c.q.volume = "v"
		before := c.rec.clone()
		now := t0.Add(time.Hour)
		s, a := step(state{c.rec, now.Add(-c.ago)}, c.q, now)
		if a.kind != c.kind || !s.rec.equal(c.want) {
			t.Errorf("%s: %v, %v; should be %v, %v", c.what, a.kind, s.rec, c.kind, c.want)
		}
		if c.ago > 0 && s.renewed.Equal(now) != c.hear {
			t.Errorf("%s: heard of %v ago", c.what, now.Sub(s.renewed))
		}
		if (a.kind == block.KindNone) != (a.text == "") {
			t.Errorf("%s: %v with text %q", c.what, a.kind, a.text)
		}
		if a.wait > 0 && a.kind != block.KindBusy {
			t.Errorf("%s: wait %v", c.what, a.wait)
		}
		if !before.equal(c.rec) {
			t.Errorf("%s: the old record was changed", c.what)
		}
		if s.rec.Epoch > 0 {
			if err := s.rec.check(); err != nil {
				t.Errorf("%s: %v", c.what, err)
			}
		}
	}
}

// twin is the arbiter once more, written down in another order.
type twin struct {
	epoch, version int
	primary        string
	members        string // "a b"
	preferred      string
	heard          time.Duration
}

func (w *twin) decide(q request, now time.Duration) block.Kind {
	to := strings.Join(q.members, " ")
	held := w.primary != ""
	current := int(q.epoch) == w.epoch
	change := func() block.Kind { w.version++; return 0 }
	become := func(p, members string) block.Kind {
		w.epoch++
		w.primary, w.members, w.heard = p, members, now
		return change()
	}
	if q.op == opClaim {
		if held {
			w.version++
			return 0
		}
		if int(q.version) != w.version {
			return block.KindBusy
		}
		w.preferred = q.node
		return become(q.node, q.node)
	}
	if !held {
		if q.op == opDrop {
			return 0
		}
		return block.KindNotFound
	}
	in := slices.Contains(strings.Fields(w.members), q.node)
	switch q.op {
	case opGet:
		return 0
	case opRenew:
		if !current || w.primary != q.node {
			return block.KindFenced
		}
		w.heard = now
		return 0
	case opSetMembers:
		// It is as wanted, and one version on: whoever brought that about.
		if current && w.primary == q.node && int(q.version)+1 == w.version && w.members == to {
			return 0
		}
	case opTakeover, opHandover:
		if q.op == opTakeover {
			to = q.node
		}
		// The next epoch is one with the wanted primary: then it is done, whoever asked.
		if int(q.epoch)+1 == w.epoch && w.primary == to && q.epoch > 0 {
			if q.op == opTakeover {
				w.heard = now
			}
			return 0
		}
	}
	if !current || q.op != opTakeover && w.primary != q.node {
		return block.KindFenced
	}
	if q.op == opTakeover {
		switch {
		case w.primary == q.node:
			w.heard = now
			return 0
		case !in && !q.flag:
			return block.KindDenied
		case now-w.heard < Grace:
			return block.KindBusy
		}
	}
	if int(q.version) != w.version {
		return block.KindBusy
	}
	switch q.op {
	case opSetMembers:
		w.members = to
		return change()
	case opTakeover:
		return become(q.node, q.node)
	case opHandover:
		if to == q.node {
			return 0
		}
		if !slices.Contains(strings.Fields(w.members), to) {
			return block.KindDenied
		}
		if q.flag {
			w.preferred = to
		}
		return become(to, w.members)
	case opDrop:
		w.epoch++
		w.version++
		w.primary, w.members, w.preferred = "", "", ""
		return 0
	}
	panic(q.op)
}

// randomRequest asks for something that is often, though not always, in place.
func randomRequest(r *rand.Rand, now Record) request {
	nodes := []string{"a", "b", "c"}
	q := request{op: op(1 + r.IntN(7)), volume: "v", node: nodes[r.IntN(3)], epoch: now.Epoch, version: now.Version}
	if r.IntN(3) > 0 && now.Primary != "" && q.op != opTakeover && q.op != opClaim {
		q.node = now.Primary
	}
	if r.IntN(4) == 0 {
		q.epoch -= min(q.epoch, uint64(r.IntN(3)))
	}
	if r.IntN(4) == 0 {
		q.version -= min(q.version, uint64(r.IntN(3)))
	}
	switch q.op {
	case opSetMembers:
		q.members = []string{q.node}
		for _, n := range nodes {
			if n != q.node && r.IntN(2) == 0 {
				q.members = append(q.members, n)
			}
		}
		slices.Sort(q.members)
	case opHandover:
		q.members = []string{nodes[r.IntN(3)]}
		q.flag = r.IntN(4) == 0
	case opTakeover:
		q.flag = r.IntN(4) == 0
	case opDrop:
		if r.IntN(5) > 0 {
			q.op = opRenew
		}
	}
	return q
}

func TestStepAgainstATwin(t *testing.T) {
	kinds := map[string]int{}
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 3))
		s, w := state{rec: Record{Volume: "v"}, renewed: t0}, &twin{}
		var asked []request
		var now time.Duration
		for i := range 300 {
			now += time.Duration(r.IntN(600)) * time.Millisecond
			q := randomRequest(r, s.rec)
			if len(asked) > 0 && r.IntN(4) == 0 { // an old one comes again
				q = asked[len(asked)-1-r.IntN(min(len(asked), 8))]
			}
			asked = append(asked, q)
			before := s.rec
			n, a := step(s, q, t0.Add(now))
			k := w.decide(q, now)
			kinds[fmt.Sprint(q.op, " ", a.kind)]++
			g := n.rec
			if a.kind != k || int(g.Epoch) != w.epoch || int(g.Version) != w.version || g.Primary != w.primary ||
				strings.Join(g.Members, " ") != w.members || g.Preferred != w.preferred || g.Primary != "" && n.renewed.Sub(t0) != w.heard {
				t.Fatalf("seed %d, request %d, %v version %d on %v: %v, %v; the twin says %v, %+v", seed, i, q, q.version, before, a.kind, g, k, w)
			}
			if before.Newer(g) || !g.equal(before) && !g.Newer(before) {
				t.Fatalf("seed %d, %v: %v came after %v", seed, q, g, before)
			}
			s = n
		}
	}
	for _, k := range []string{"claim busy", "renew ok", "renew fenced", "set-members ok", "set-members busy", "takeover ok", "takeover busy",
		"takeover denied", "takeover fenced", "handover ok", "handover denied", "drop ok", "get not found"} {
		if kinds[k] == 0 {
			t.Errorf("%s never came up: %v", k, kinds)
		}
	}
}
