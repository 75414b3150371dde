package writeback

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"forerun/block"
	"forerun/data/journal"
	"forerun/internal/chunk"
)

// Hold is the name of the hold on a journal behind which is what the source
// lacks. Without it everything that may differ is compared. A node that joins
// a primary gives its own up first: what it had is no longer the source's.
const Hold = "writeback"

// scanHold keeps the records that follow the beginning of a comparison.
const scanHold = "writeback-scan"

// Caller sends requests to the backend. One that cannot be reached is
// KindUnavailable.
type Caller interface {
	Call(ctx context.Context, typ uint8, parts ...[]byte) ([]byte, error)
}

// Log is a volume's journal; *journal.Journal is one.
type Log interface {
	Position() journal.Position
	Reader(from journal.Position) (*journal.Reader, error)
	Held(name string) (journal.Position, bool)
	Hold(name string, pos journal.Position) error
	Release(name string) error
	Appended() int64
}

// Volume is how the Shipper reaches a volume of its group.
type Volume interface {
	Name() string
	// Epoch is the one this node writes in; primary is false while another node
	// is, or may be.
	Epoch() (epoch uint64, primary bool)
	// Freeze runs fn while no write is under way nor begins.
	Freeze(ctx context.Context, fn func() error) error
	// Log is the local journal. Its device makes trimmed ranges zeros.
	Log() Log
	// MarkPeer asks the secondary for its journal's position, inside Freeze. ok is
	// false when there is no secondary in sync.
	MarkPeer(ctx context.Context) (pos string, ok bool)
	// HoldPeer moves the secondary's hold of that name there.
	HoldPeer(ctx context.Context, name, pos string) error

	Info() block.Info
	ReadAt(ctx context.Context, p []byte, off int64, f block.Flags) error
	// Extents tells states; with block.Local it does not cross the link.
	Extents(ctx context.Context, dst []block.Extent, off, n int64, f block.Flags) ([]block.Extent, error)
	// Flush makes everything written durable on every node that has to hold it.
	Flush(ctx context.Context, f block.Flags) error
}

// Prepare takes the hold of a volume whose journal is new, before its first
// write: from then on the journal names everything the source lacks. exact says
// that it does so still: the last stop was clean, or only the process died. A
// power cut may keep bytes on disk whose record is lost, so without exact the
// hold is given up, durably. A stack calls it each time it opens a journal that
// is to be written back, on either node, before anything is written.
func Prepare(l Log, exact bool) error {
	if err := l.Release(scanHold); err != nil {
		return err
	}
	_, held := l.Held(Hold)
	switch {
	case held && !exact:
		return l.Release(Hold)
	case !held && l.Position() == (journal.Position{}):
		return l.Hold(Hold, journal.Position{})
	}
	return nil
}

// ShipperOptions says what a Shipper ships. Group, Volumes and Backend are
// needed, zero elsewhere means the default.
type ShipperOptions struct {
	Group   string
	Volumes []Volume
	Backend Caller
	// Interval is the longest time between checkpoints while there are writes,
	// default 10 s; MaxBytes of writes make one earlier, default 64 MiB.
	Interval time.Duration
	MaxBytes int64
	// Pace, if set, is asked before n bytes are sent and returns when they may be.
	Pace  func(ctx context.Context, n int) error
	Codec chunk.Codec // default Zstd
	Log   *slog.Logger
}

// Result is a checkpoint that the source has.
type Result struct {
	ID    uint64    // of the checkpoint; that of the last one when nothing had changed
	Cut   time.Time // when the volumes stood still
	Bytes int64     // plain bytes sent
	Sent  int64     // bytes of pieces on the link
	Full  int       // volumes that were compared whole
}

// Shipper sends the changes of one consistency group to the backend.
type Shipper struct {
	o   ShipperOptions
	log *slog.Logger

	turn   chan struct{} // holds one token: one checkpoint at a time
	window int           // maxWindow, less in tests
	follow int64         // followLimit, less in tests

	// Owned by who has the turn.
	pending *cut // was committed, and the answer never came

	mu     sync.Mutex
	vols   []*shipped
	status Status
	kick   chan struct{} // Run looks
}

// shipped is what the Shipper knows of a volume. mu of the Shipper guards what
// is below it.
type shipped struct {
	Volume
	name string

	stored   journal.Position // of the last cut that is stored, as far as this process knows
	known    bool             // stored is set
	base     int64            // Log.Appended at that cut
	backlog  int64            // bytes that were there when this process began
	cutAt    int64            // Log.Appended at the last cut
	clean    time.Time        // when the journal was last seen where the cut was
	oldest   time.Time        // a moment before the oldest unwritten write
	released bool
	forced   bool // without us
}

// Status is how the write-back of a group stands.
type Status struct {
	Group string
	// State is "idle", "cutting", "comparing", "sending", "applying", "waiting",
	// "secondary" or "fenced"; Reason says why it waits.
	State  string
	Reason string

	LastID      uint64
	LastCut     time.Time // of the last checkpoint the source has
	Checkpoints int64
	Compared    int64 // checkpoints for which a volume was compared whole
	Bytes, Sent int64 // plain bytes and bytes of pieces, of all of them

	Volumes map[string]Unwritten
}

// Oldest is a moment before the oldest write that the source lacks, zero when
// it lacks none: the recovery point now.
func (s Status) Oldest() time.Time {
	var t time.Time
	for _, v := range s.Volumes {
		if !v.Oldest.IsZero() && (t.IsZero() || v.Oldest.Before(t)) {
			t = v.Oldest
		}
	}
	return t
}

// NewShipper makes a Shipper. Nothing happens before Run or Checkpoint.
func NewShipper(o ShipperOptions) (*Shipper, error) {
	const op = "writeback.ship"
	if err := checkName(op, o.Group); err != nil {
		return nil, err
	}
	if len(o.Volumes) == 0 || len(o.Volumes) > maxVolumes || o.Backend == nil {
		return nil, invalid(op, o.Group, "%d volumes; 1 to %d are possible", len(o.Volumes), maxVolumes)
	}
	if o.Interval <= 0 {
		o.Interval = 10 * time.Second
	}
	if o.MaxBytes <= 0 {
		o.MaxBytes = 64 << 20
	}
	if o.Codec == chunk.Raw {
		o.Codec = chunk.Zstd
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s := &Shipper{o: o, log: o.Log.With("group", o.Group), turn: make(chan struct{}, 1), window: maxWindow, follow: followLimit, kick: make(chan struct{}, 1)}
	s.turn <- struct{}{}
	s.status = Status{Group: o.Group, State: "idle"}
	for _, v := range o.Volumes {
		if err := checkName(op, v.Name()); err != nil {
			return nil, err
		}
		s.vols = append(s.vols, &shipped{Volume: v, name: v.Name()})
	}
	slices.SortFunc(s.vols, func(a, b *shipped) int { return strings.Compare(a.name, b.name) })
	for i := 1; i < len(s.vols); i++ {
		if s.vols[i].name == s.vols[i-1].name {
			return nil, invalid(op, o.Group, "volume %s is named twice", s.vols[i].name)
		}
	}
	return s, nil
}

// live are the volumes that were not released.
func (s *Shipper) live() []*shipped {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*shipped
	for _, v := range s.vols {
		if !v.released {
			out = append(out, v)
		}
	}
	return out
}

// primary says whether this node may ship: it writes all volumes of the group.
func (s *Shipper) primary() bool {
	vols := s.live()
	for _, v := range vols {
		if _, ok := v.Epoch(); !ok {
			return false
		}
	}
	return len(vols) > 0
}

// Status returns a snapshot.
func (s *Shipper) Status() Status {
	s.look()
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.status
	st.Volumes = map[string]Unwritten{}
	for _, v := range s.vols {
		if !v.released {
			st.Volumes[v.name] = v.unwritten()
		}
	}
	return st
}

// unwritten is what v has and the source lacks. mu is held.
func (v *shipped) unwritten() Unwritten {
	if v.oldest.IsZero() {
		return Unwritten{}
	}
	return Unwritten{Bytes: v.Log().Appended() - v.base + v.backlog, Oldest: v.oldest}
}

// look notes since when there are writes that the source lacks.
func (s *Shipper) look() (changed bool, bytes int64) {
	now := time.Now()
	for _, v := range s.live() {
		pos := v.Log().Position()
		s.mu.Lock()
		if !v.known {
			// What the last process left: its age is not known, but it is at least
			// as old as this process.
			if p, ok := v.Log().Held(Hold); !ok || p != pos {
				if v.oldest.IsZero() {
					v.oldest = now
				}
			} else {
				v.stored, v.known, v.base, v.clean = pos, true, v.Log().Appended(), now
			}
		}
		switch {
		case v.known && pos == v.stored:
			v.clean, v.oldest = now, time.Time{}
		case v.known && v.oldest.IsZero():
			v.oldest = v.clean
		}
		changed = changed || !v.oldest.IsZero()
		bytes += v.Log().Appended() - v.cutAt
		s.mu.Unlock()
	}
	return changed, bytes
}

func (s *Shipper) say(state, reason string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if reason != "" && s.status.Reason == "" {
		s.log.Warn("write-back waits", "reason", reason)
	} else if reason == "" && s.status.Reason != "" && state != "idle" {
		s.log.Info("write-back goes on")
	}
	s.status.State, s.status.Reason = state, reason
}

const (
	lookEvery    = 200 * time.Millisecond
	reportPeriod = time.Second
	retryFirst   = 100 * time.Millisecond
	retryLast    = 5 * time.Second
)

// Run makes checkpoints when they are due and reports to the backend, until
// ctx ends. While another node is primary it does nothing.
func (s *Shipper) Run(ctx context.Context) error {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	var lastCut, retryAt, reported time.Time
	var told string
	away, wait := true, retryFirst
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-s.kick:
		}
		if !s.primary() {
			s.say("secondary", "")
			away = true
			continue
		}
		if away { // an earlier process, or the other node, shipped before
			s.recount(ctx)
			away = false
		}
		changed, bytes := s.look()
		now := time.Now()
		if now.Sub(reported) >= reportPeriod {
			if said := s.report(ctx, told); said != "" {
				told, reported = said, now
			}
		}
		due := changed && (now.Sub(lastCut) >= s.o.Interval || bytes >= s.o.MaxBytes)
		if !due || now.Before(retryAt) {
			continue
		}
		_, err := s.checkpoint(ctx, false)
		if err == nil {
			lastCut, wait = now, retryFirst
			continue
		}
		if ctx.Err() != nil {
			return nil
		}
		s.stuck(err)
		retryAt, wait = time.Now().Add(wait), min(2*wait, retryLast)
	}
	return nil
}

// recount finds out what the journals have behind their holds, which another
// process or node may have moved.
func (s *Shipper) recount(ctx context.Context) {
	if s.lock(ctx) != nil {
		return
	}
	defer s.unlock()
	for _, v := range s.live() {
		to, base := v.Log().Position(), v.Log().Appended()
		n, err := backlog(ctx, v.Log(), to)
		if err != nil { // then everything is compared, and its size is not known
			s.log.Info("it is not known how much the source lacks", "volume", v.name, "err", err)
		}
		s.mu.Lock()
		v.known, v.oldest, v.backlog, v.base = false, time.Time{}, n, base
		s.mu.Unlock()
	}
}

// backlog is how many bytes of writes the journal has between the hold and to.
func backlog(ctx context.Context, log Log, to journal.Position) (n int64, err error) {
	from, ok := log.Held(Hold)
	if !ok || from == to {
		return 0, nil
	}
	r, err := log.Reader(from)
	if err != nil {
		return 0, err
	}
	defer r.Close()
	for r.Position().Sequence < to.Sequence {
		rec, err := r.Skim(ctx)
		if err != nil {
			return n, err
		}
		if rec.Type == journal.TypeWrite {
			n += rec.Len
		}
	}
	return n, nil
}

// stuck says why there is no checkpoint.
func (s *Shipper) stuck(err error) {
	state := "waiting"
	if block.KindOf(err) == block.KindFenced {
		state = "fenced"
	}
	s.say(state, err.Error())
}

// report tells the backend what the source lacks, if that changed.
func (s *Shipper) report(ctx context.Context, told string) string {
	q := reportRequest{Group: s.o.Group}
	for _, v := range s.live() {
		e, _ := v.Epoch()
		s.mu.Lock()
		q.Volumes = append(q.Volumes, reportVolume{v.name, e, v.unwritten()})
		s.mu.Unlock()
	}
	b := string(encode(q))
	if b == told {
		return told
	}
	ctx, cancel := context.WithTimeout(ctx, reportPeriod)
	defer cancel()
	if _, err := s.o.Backend.Call(ctx, typReport, []byte(b)); err != nil {
		return "" // a report that is lost is followed by another
	}
	return b
}

// lock takes the turn; nil is followed by unlock.
func (s *Shipper) lock(ctx context.Context) error {
	select {
	case <-s.turn:
		return nil
	case <-ctx.Done():
		return block.E("writeback.checkpoint", s.o.Group, block.KindCanceled, ctx.Err())
	}
}

func (s *Shipper) unlock() { s.turn <- struct{}{} }

// Checkpoint makes a cut now and returns when the source has it. While the
// backend cannot be reached, or has no space, it waits; KindFenced,
// KindReadOnly and others that waiting does not mend are returned.
func (s *Shipper) Checkpoint(ctx context.Context) (Result, error) { return s.checkpoint(ctx, true) }

// errAgain says that what was sent is not there any more, or that records
// went: another cut begins.
var errAgain = errors.New("the checkpoint begins anew")

func (s *Shipper) checkpoint(ctx context.Context, asked bool) (Result, error) {
	if err := s.lock(ctx); err != nil {
		return Result{}, err
	}
	defer s.unlock()
	return s.persist(ctx, asked)
}

// persist tries until it succeeds or there is no use. The caller has the turn.
func (s *Shipper) persist(ctx context.Context, asked bool) (Result, error) {
	for wait := retryFirst; ; wait = min(2*wait, retryLast) {
		res, err := s.attempt(ctx)
		if err == nil {
			s.say("idle", "")
			return res, nil
		}
		if ctx.Err() != nil {
			return res, block.E("writeback.checkpoint", s.o.Group, block.KindCanceled, errors.Join(context.Cause(ctx), err))
		}
		switch {
		case errors.Is(err, errAgain):
			s.log.Info("a checkpoint begins anew", "err", err)
		case !asked: // Run has its own pace
			return res, err
		case !passing(err):
			s.stuck(err)
			return res, err
		default:
			s.say("waiting", err.Error())
		}
		if err := s.sleep(ctx, wait); err != nil {
			return res, err
		}
	}
}

// passing says whether an error may pass by itself.
func passing(err error) bool {
	switch block.KindOf(err) {
	case block.KindUnavailable, block.KindNoSpace, block.KindBusy, block.KindIO:
		return true
	}
	return false
}

func (s *Shipper) sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return block.E("writeback.checkpoint", s.o.Group, block.KindCanceled, context.Cause(ctx))
	}
}

// Release gives a volume's source back: a last checkpoint of the group, and
// then the backend flushes, closes and unlocks the source. The caller has
// ended the clients of the volume; while there are writes still, Release
// makes checkpoint after checkpoint. It may be called again.
func (s *Shipper) Release(ctx context.Context, volume string) error {
	const op = "writeback.release"
	i := slices.IndexFunc(s.vols, func(v *shipped) bool { return v.name == volume })
	if i < 0 {
		return block.E(op, volume, block.KindNotFound, fmt.Errorf("it is no volume of group %s", s.o.Group))
	}
	v := s.vols[i]
	if err := s.lock(ctx); err != nil {
		return err
	}
	defer s.unlock()
	for wait := retryFirst; ; wait = min(2*wait, retryLast) {
		done, err := s.releaseOnce(ctx, v)
		if done {
			return nil
		}
		if err != nil && (ctx.Err() != nil || !passing(err) && !errors.Is(err, errAgain)) {
			return err
		}
		if err != nil {
			s.say("waiting", err.Error())
			if err := s.sleep(ctx, wait); err != nil {
				return err
			}
		}
	}
}

func (s *Shipper) releaseOnce(ctx context.Context, v *shipped) (done bool, err error) {
	s.mu.Lock()
	done, forced := v.released, v.forced
	s.mu.Unlock()
	var h helloVolume
	var last uint64
	if !done {
		var a helloAnswer
		if err := s.hello(ctx, &a); err != nil {
			return false, err
		}
		last, h = a.Last.ID, a.Volumes[v.name]
		forced = h.Forced
	}
	if forced {
		s.mu.Lock()
		v.released, v.forced = true, true
		s.mu.Unlock()
		return false, block.E("writeback.release", v.name, block.KindFenced, errors.New(
			"the source was given back by force at the backend already; what was written since its last checkpoint is not in it"))
	}
	if done {
		return true, nil
	}
	epoch, _ := v.Epoch()
	if !h.Released { // else the answer to an earlier call was lost
		res, err := s.persist(ctx, true)
		if err != nil {
			return false, err
		}
		last = res.ID
	}
	err = v.Freeze(ctx, func() error {
		s.mu.Lock()
		moved := v.Log().Position() != v.stored
		s.mu.Unlock()
		if moved && !h.Released {
			return errAgain
		}
		_, err := s.o.Backend.Call(ctx, typRelease, encode(releaseRequest{s.o.Group, v.name, epoch, last}))
		return err
	})
	if err != nil {
		if block.KindOf(err) == block.KindNotFound {
			err = fmt.Errorf("%w: %w", errAgain, err)
		}
		return false, err
	}
	s.mu.Lock()
	v.released = true
	s.mu.Unlock()
	s.log.Info("the source of a volume was given back", "volume", v.name)
	return true, v.Log().Release(Hold)
}
