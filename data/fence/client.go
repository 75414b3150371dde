package fence

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"forerun/block"
	"forerun/internal/msg"
)

// again is the pause between two tries of a blocking call.
const again = 150 * time.Millisecond

// tryTime is how long one try of a blocking call may take.
const tryTime = 3 * time.Second

// Caller sends a request to the arbiter: a msg.Client, or a twin.
type Caller = msg.Caller

// Client is a node's side for one volume. It keeps the newest record it has
// seen. All methods may be called from any goroutine.
//
// Calls that change something are made one at a time. An error of kind
// KindFenced, KindBusy, KindDenied or KindNotFound is the arbiter's decision
// (Decided tells); any other leaves open whether the call takes effect, now or
// later. Repeating the call with the same arguments is safe and tells; Settle
// tells too, and ends what may still be on its way. Until then both outcomes
// have to be reckoned with: after SetMembers a write needs the acknowledgement
// of every node of either set, after Handover nothing may be answered.
type Client struct {
	call   Caller
	volume string
	node   string
	now    func() time.Time
	lease  Lease
	turn   chan struct{} // one token: who has it may change something

	mu      sync.Mutex
	rec     Record
	have    bool // rec was seen at least once
	claimed bool // a claim was answered
	changed chan struct{}
	doubt   undecided
}

// refusal is a decision of the arbiter against a request.
type refusal struct {
	text string
	wait time.Duration
}

func (r *refusal) Error() string { return r.text }

// NewClient makes the client of a node for a volume. The node is the name in
// its certificate.
func NewClient(call Caller, volume, node string) *Client {
	c := &Client{call: call, volume: volume, node: node, now: time.Now, turn: make(chan struct{}, 1), changed: make(chan struct{})}
	c.turn <- struct{}{}
	return c
}

// SetClock replaces time.Now, for tests; before anything else.
func (c *Client) SetClock(now func() time.Time) { c.now = now }

// Decided says whether an error of a Client is the arbiter's decision: what was
// asked for has not happened.
func Decided(err error) bool {
	var r *refusal
	return errors.As(err, &r)
}

// Node returns the node's name.
func (c *Client) Node() string { return c.node }

// Volume returns the volume's name.
func (c *Client) Volume() string { return c.volume }

// Lease is the lease of the epoch in which this node is primary: Renew,
// Takeover and Claim feed it, answered heartbeats should. It is revoked when a
// newer epoch is seen.
func (c *Client) Lease() *Lease { return &c.lease }

// Record returns the newest record seen, false when there was none or nobody
// holds the volume.
func (c *Client) Record() (Record, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.rec.clone(), c.have && c.rec.Primary != ""
}

// Changed returns a channel that is closed when a newer record is seen.
func (c *Client) Changed() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.changed
}

// Doubt says whether the outcome of the last call that would have changed
// something is not known.
func (c *Client) Doubt() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.doubt.on
}

// MayRead says whether this node may answer reads that were asked for before
// now: it is primary, as far as it knows, and has a lease or needs none.
func (c *Client) MayRead(now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.have || c.rec.Primary != c.node || c.doubt.on && c.doubt.handover {
		return false
	}
	return c.rec.Alone(c.node) && !c.doubt.on || c.lease.Valid(now)
}

// MayAnswer says whether this node may answer a primary of that epoch, its
// writes and its heartbeats: it knows of no newer one, is not primary itself,
// and its process has claimed. Before that it cannot know in which epoch the
// process before it was, perhaps as primary.
func (c *Client) MayAnswer(epoch uint64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.claimed && c.rec.Epoch <= epoch && c.rec.Primary != c.node
}

// Saw tells the client of a record that came by another way: with a heartbeat,
// or from a peer.
func (c *Client) Saw(r Record) {
	if r.Volume == c.volume && r.check() == nil {
		c.observe(r)
	}
}

func (c *Client) observe(r Record) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if r.Epoch == 0 || c.have && !r.Newer(c.rec) {
		return
	}
	if r.Epoch > c.rec.Epoch && c.have {
		c.lease.Revoke(c.now())
	}
	c.rec, c.have = r.clone(), true
	if c.doubt.on && r.Newer(Record{Epoch: c.doubt.epoch, Version: c.doubt.version}) {
		c.doubt = undecided{}
	}
	close(c.changed)
	c.changed = make(chan struct{})
}

// ask sends one request and takes in the record that comes with the answer.
func (c *Client) ask(ctx context.Context, q request) (Record, error) {
	q.volume, q.node = c.volume, c.node
	var room [64]byte
	p, err := c.call.Call(ctx, uint8(q.op), appendRequest(room[:0], q))
	if err != nil {
		return Record{}, block.E("fence."+q.op.String(), c.volume, 0, err)
	}
	a, r, err := parseAnswer(c.volume, p)
	if err != nil {
		return Record{}, block.E("fence."+q.op.String(), c.volume, block.KindIO, err)
	}
	c.observe(r)
	if a.kind != block.KindNone {
		return r, block.E("fence."+q.op.String(), c.volume, a.kind, &refusal{a.text, a.wait})
	}
	return r, nil
}

// alter is ask for requests that change something.
func (c *Client) alter(ctx context.Context, q request) (Record, error) {
	select {
	case <-c.turn:
	case <-ctx.Done():
		return Record{}, &block.Error{Op: "fence." + q.op.String(), Object: c.volume, Kind: block.KindCanceled, Err: ctx.Err()}
	}
	defer func() { c.turn <- struct{}{} }()
	if q.op == opHandover {
		c.lease.Revoke(c.now())
	}
	for {
		known, was := c.open(q)
		q.version = 0
		if known.Epoch == q.epoch || q.op == opClaim {
			q.version = known.Version
		}
		sent := c.now()
		r, err := c.ask(ctx, q)
		if err != nil && !Decided(err) {
			return r, err
		}
		c.shut(was)
		if err == nil && q.op == opClaim {
			c.mu.Lock()
			c.claimed = true
			c.mu.Unlock()
		}
		if err == nil && q.op == opTakeover {
			c.begin(r, sent)
		}
		// Somebody has only looked at the record in between: the same again, for
		// the new version.
		if block.KindOf(err) == block.KindBusy && r.Version != q.version && (r.Epoch == q.epoch || q.op == opClaim) &&
			(q.op != opSetMembers || known.Epoch == q.epoch && slices.Equal(r.Members, known.Members)) {
			continue
		}
		if err != nil && c.Doubt() {
			// This one was refused, and one before it may still be on its way.
			if _, serr := c.Settle(ctx); serr != nil {
				return r, err
			}
		}
		return r, err
	}
}

// begin starts the lease of the epoch that was granted, unless that is over.
func (c *Client) begin(r Record, sent time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.rec.Epoch == r.Epoch && r.Primary == c.node {
		c.lease.begin(sent)
	}
}

// undecided is a request whose outcome is not known: it takes effect on this
// record or never.
type undecided struct {
	on             bool
	epoch, version uint64
	handover       bool
}

// open notes that a request for the known record is under way.
func (c *Client) open(q request) (known Record, was undecided) {
	c.mu.Lock()
	defer c.mu.Unlock()
	was = c.doubt
	c.doubt = undecided{true, c.rec.Epoch, c.rec.Version, q.op == opHandover || was.on && was.handover}
	return c.rec.clone(), was
}

// shut notes that it was decided. What was open before is still, unless a
// newer record has settled it.
func (c *Client) shut(was undecided) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.doubt = was; was.on && c.rec.Newer(Record{Epoch: was.epoch, Version: was.version}) {
		c.doubt = undecided{}
	}
}

// Get asks for the record.
func (c *Client) Get(ctx context.Context) (Record, error) { return c.ask(ctx, request{op: opGet}) }

// Claim makes this node the primary of a volume that nobody holds, and returns
// the record, whoever is primary. It is a process's first call: nothing that a
// process of this node asked for earlier takes effect after it, and before it
// this node answers no primary (see MayAnswer).
func (c *Client) Claim(ctx context.Context) (Record, error) {
	return c.alter(ctx, request{op: opClaim})
}

// Renew is the primary's sign of life, due every 250 ms or so (see Keep). It
// feeds the lease, unless it is by its answer that the epoch is first heard of.
func (c *Client) Renew(ctx context.Context, epoch uint64) (Record, error) {
	sent := c.now()
	r, err := c.ask(ctx, request{op: opRenew, epoch: epoch})
	if err == nil {
		c.lease.Renewed(sent)
	}
	return r, err
}

// Keep renews until ctx ends or the arbiter decides that this node is not the
// primary of that epoch, and returns why.
func (c *Client) Keep(ctx context.Context, epoch uint64) error {
	t := time.NewTicker(LeaseTime / 4)
	defer t.Stop()
	for {
		one, cancel := context.WithTimeout(ctx, LeaseTime/2)
		_, err := c.Renew(one, epoch)
		cancel()
		if Decided(err) {
			return err
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return &block.Error{Op: "fence.keep", Object: c.volume, Kind: block.KindCanceled, Err: ctx.Err()}
		}
	}
}

// SetMembers says which nodes are in sync, this one among them. It is refused
// with KindBusy when the members are not those in Record.
func (c *Client) SetMembers(ctx context.Context, epoch uint64, members ...string) (Record, error) {
	m := slices.Clone(members)
	slices.Sort(m)
	return c.alter(ctx, request{op: opSetMembers, epoch: epoch, members: slices.Compact(m)})
}

// Takeover asks to be primary in place of the one of that epoch. KindBusy: that
// one may still be there. KindDenied: this node is not in sync; with force it
// need not be, and what it lacks is lost. Force says that the other node is
// gone: one that is alone and cut off goes on otherwise. Nothing may be served
// before Witness.Clear.
//
// Whoever stops asking and goes back to being a secondary should Settle: a
// request that is still on its way could be granted later.
func (c *Client) Takeover(ctx context.Context, epoch uint64, force bool) (Record, error) {
	return c.alter(ctx, request{op: opTakeover, epoch: epoch, flag: force})
}

// Handover makes a member primary in this node's place; prefer makes it the
// preferred one too, so that the volume stays there. It ends the lease first.
// From then on nothing may be answered until the outcome is known: the other
// node serves from the moment of the decision.
func (c *Client) Handover(ctx context.Context, epoch uint64, to string, prefer bool) (Record, error) {
	return c.alter(ctx, request{op: opHandover, epoch: epoch, members: []string{to}, flag: prefer})
}

// Drop makes the volume nobody's: after an abort or a discard.
func (c *Client) Drop(ctx context.Context, epoch uint64) error {
	_, err := c.alter(ctx, request{op: opDrop, epoch: epoch})
	return err
}

// Settle ends what this node has asked for and does not know the outcome of: it
// repeats until the arbiter answers, and the record it returns is what was
// decided. KindNotFound: nobody holds the volume.
func (c *Client) Settle(ctx context.Context) (Record, error) {
	r, err := c.retry(ctx, false, func(ctx context.Context) (Record, error) {
		// As a claim of a version that never is, so that it claims nothing.
		return c.ask(ctx, request{op: opClaim, version: 1<<64 - 1})
	})
	if block.KindOf(err) == block.KindBusy {
		err = &block.Error{Op: "fence.settle", Object: c.volume, Kind: block.KindNotFound, Err: errors.New("nobody holds the volume")}
	}
	return r, err
}

// ClaimWait is Claim, repeated until the arbiter decides.
func (c *Client) ClaimWait(ctx context.Context) (Record, error) { return c.retry(ctx, false, c.Claim) }

// SetMembersWait is SetMembers, repeated until the arbiter decides.
func (c *Client) SetMembersWait(ctx context.Context, epoch uint64, members ...string) (Record, error) {
	return c.retry(ctx, false, func(ctx context.Context) (Record, error) { return c.SetMembers(ctx, epoch, members...) })
}

// TakeoverWait is Takeover, repeated until it is granted or refused for another
// reason than that it is too early.
func (c *Client) TakeoverWait(ctx context.Context, epoch uint64, force bool) (Record, error) {
	return c.retry(ctx, true, func(ctx context.Context) (Record, error) { return c.Takeover(ctx, epoch, force) })
}

// HandoverWait is Handover, repeated until the arbiter decides.
func (c *Client) HandoverWait(ctx context.Context, epoch uint64, to string, prefer bool) (Record, error) {
	return c.retry(ctx, false, func(ctx context.Context) (Record, error) { return c.Handover(ctx, epoch, to, prefer) })
}

// DropWait is Drop, repeated until the arbiter decides.
func (c *Client) DropWait(ctx context.Context, epoch uint64) error {
	_, err := c.retry(ctx, false, func(ctx context.Context) (Record, error) { return Record{}, c.Drop(ctx, epoch) })
	return err
}

// lasting are errors that waiting does not help against.
var lasting = []block.Kind{block.KindDenied, block.KindInvalid, block.KindUnsupported, block.KindCorrupt}

// retry repeats a call until it is decided, and with busy until that is not
// the decision, or ctx ends. Each try has a few seconds: an answer may be lost.
func (c *Client) retry(ctx context.Context, busy bool, call func(context.Context) (Record, error)) (Record, error) {
	for {
		one, cancel := context.WithTimeout(ctx, tryTime)
		r, err := call(one)
		cancel()
		pause := again
		var no *refusal
		switch {
		case err == nil:
			return r, nil
		case errors.As(err, &no):
			if !busy || block.KindOf(err) != block.KindBusy {
				return r, err
			}
			if no.wait > 0 {
				pause = min(no.wait+time.Millisecond, pause)
			}
		case slices.Contains(lasting, block.KindOf(err)):
			return r, err // nor will it be another time
		}
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return r, &block.Error{Op: "fence.wait", Object: c.volume, Kind: block.KindCanceled, Err: errors.Join(ctx.Err(), err)}
		}
	}
}
