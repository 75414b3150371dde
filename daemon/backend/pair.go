package backend

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"time"

	"forerun/api"
	"forerun/block"
	"forerun/daemon"
	"forerun/data/fence"
	"forerun/data/linktest"
	"forerun/data/writeback"
	"forerun/disk"
	"forerun/internal/msg"
)

// home is what a backend does beside sending chunks: it arbitrates which
// frontend may write a volume, and takes the changes back.
type home struct {
	arbiter  *fence.Arbiter
	receiver *writeback.Receiver
}

// openHome opens both in the state directory. Sources that were given back in
// an earlier life are known afterwards, and must not be opened.
func (b *Backend) openHome() (err error) {
	if b.home.arbiter, err = fence.Open(fence.Options{FS: disk.OS(), Dir: filepath.Join(b.cfg.StateDir, "arbiter"), Log: b.cfg.Log}); err != nil {
		return err
	}
	b.home.receiver, err = writeback.NewReceiver(writeback.ReceiverOptions{
		FS: disk.OS(), Dir: b.cfg.StateDir, Source: b.source, Close: b.release,
		Owner: func(volume string) (uint64, string, bool) {
			r, ok := b.home.arbiter.Record(volume)
			return r.Epoch, r.Primary, ok
		},
		Log: b.cfg.Log,
	})
	return err
}

func (b *Backend) closeHome() error {
	var errs []error
	if b.home.receiver != nil {
		errs = append(errs, b.home.receiver.Close())
	}
	if b.home.arbiter != nil {
		errs = append(errs, b.home.arbiter.Close())
	}
	return errors.Join(errs...)
}

// also are the protocols of the port beside that of the chunks.
func (b *Backend) also() map[string]func(ctx context.Context, nc net.Conn, role, name string) {
	return map[string]func(ctx context.Context, nc net.Conn, role, name string){
		msg.ProtoArbiter: b.home.arbiter.Attend,
		msg.ProtoWriteBack: func(ctx context.Context, nc net.Conn, role, name string) {
			c := msg.New(nc, msg.Options{Log: b.cfg.Log, Serve: func(ctx context.Context, typ uint8, p []byte) ([]byte, error) {
				if typ == daemon.MsgSources {
					return daemon.AnswerSources(p, b.sourceAway)
				}
				return b.home.receiver.Serve(ctx, role, name, typ, p)
			}})
			_ = c.Run(ctx) // how it ended is the frontend's to say
			c.Wait()
		},
		msg.ProtoLinkTest: linktest.NewServer(linktest.ServerOptions{Log: b.cfg.Log, Busy: b.busy}).Attend,
	}
}

// busy says what a test of the line would disturb.
func (b *Backend) busy() string {
	switch n := b.server.Stats().Sessions; n {
	case 0:
		return ""
	case 1:
		return "a frontend's session is open"
	default:
		return fmt.Sprintf("%d sessions of frontends are open", n)
	}
}

// sourceAway is why a volume's source does not answer, empty when it does.
func (b *Backend) sourceAway(volume string) string {
	if s := b.open[volume]; s != nil {
		if why := s.away.Load(); why != nil {
			return *why
		}
	}
	return ""
}

// source finds the open source of a volume.
func (b *Backend) source(volume string) (block.Device, error) {
	s := b.open[volume]
	if s == nil {
		return nil, b.unknown(volume)
	}
	if s.dev == nil {
		return nil, s.givenBack()
	}
	return s.dev, nil
}

// release closes and unlocks a source. Calls under way end first; later ones
// are refused.
func (b *Backend) release(_ context.Context, volume string) error {
	if s := b.open[volume]; s != nil {
		return s.close()
	}
	return nil
}

func (s *served) givenBack() error {
	return block.E("source", s.spec.Name, block.KindClosed,
		errors.New("the move of this volume was called off and its source was given back; `forerun discard` at the backend forgets that"))
}

// Abort is serve.PairController: the target site is gone, or its operator.
func (b *Backend) Abort(ctx context.Context, volume string, req api.AbortRequest) error {
	s := b.open[volume]
	if s == nil {
		return b.unknown(volume)
	}
	if b.home.receiver.Released(volume) {
		return nil
	}
	if !req.Force {
		return block.E("abort", volume, block.KindInvalid,
			errors.New("ask the frontend to abort, so that its last changes come back; if it is lost for good, --force gives the source back as of its last checkpoint"))
	}
	if err := b.home.arbiter.Drop(ctx, volume); err != nil {
		return err
	}
	loss, err := b.home.receiver.Release(ctx, volume, true)
	if err != nil {
		return err
	}
	b.cfg.Log.Warn("the move was called off by force", "volume", volume, "loss", loss.Text)
	b.mu.Lock()
	s.loss = &loss
	b.mu.Unlock()
	return nil
}

// Discard is serve.PairController: it forgets that a source was given back, so
// that the next start of the backend offers it again.
func (b *Backend) Discard(ctx context.Context, volume string, _ api.DiscardRequest) error {
	if b.open[volume] == nil {
		return b.unknown(volume)
	}
	if !b.home.receiver.Released(volume) {
		return block.E("discard", volume, block.KindBusy, errors.New("the volume is being moved; abort that first"))
	}
	if err := b.home.arbiter.Drop(ctx, volume); err != nil {
		return err
	}
	return b.home.receiver.Forget(ctx, volume)
}

// pairStatus adds what the home knows of a volume.
func (b *Backend) pairStatus(s *served, v *api.Volume) {
	if r, ok := b.home.arbiter.Record(s.spec.Name); ok {
		v.Replica = &api.Replica{Role: "arbiter", Peer: r.Primary, Epoch: r.Epoch, InSync: len(r.Members) > 1}
	}
	st, err := b.home.receiver.Status(s.spec.Name)
	if err == nil {
		w := &api.Writeback{Policy: api.PolicyWriteBack, UnwrittenBytes: st.Unwritten.Bytes, LastID: st.LastID, State: "idle", Reason: st.Reason}
		if !st.LastCut.IsZero() {
			w.LastCheckpoint = st.LastCut.UTC().Format(time.RFC3339Nano)
		}
		if o := st.Unwritten.Oldest; !o.IsZero() {
			w.OldestS = time.Since(o).Seconds()
			w.RPOS = w.OldestS
		}
		switch {
		case st.StoredID != 0:
			w.State = "applying"
		case st.Arriving > 0:
			w.State = "receiving"
		}
		v.Writeback = w
		if st.Damaged {
			v.Warnings = append(v.Warnings, "the source is no checkpoint's content: a stored checkpoint was damaged; the frontend compares everything")
		}
	}
	if len(st.Clones) > 0 {
		v.Clones = slices.Clone(st.Clones)
	}
	if !st.Released {
		return
	}
	v.Phase = api.PhaseAborted
	v.Abort = &api.Abort{State: api.AbortDone, LastID: st.LastID}
	if !st.LastCut.IsZero() {
		v.Abort.LastCheckpoint = st.LastCut.UTC().Format(time.RFC3339Nano)
	}
	b.mu.Lock()
	loss := s.loss
	b.mu.Unlock()
	if loss == nil {
		return
	}
	v.Abort.Forced, v.Abort.Loss = true, loss.Text
	v.Abort.LostBytes, v.Abort.LostS = loss.Unwritten.Bytes, 0
	switch {
	case loss.ReportAt.IsZero():
		v.Abort.LostBytes, v.Abort.LostS = -1, -1
	case !loss.Unwritten.Oldest.IsZero():
		v.Abort.LostS = loss.ReportAt.Sub(loss.Unwritten.Oldest).Seconds()
	}
}

// clone finds NAME@CLONE: the volume as it was when the clone began.
func (b *Backend) clone(volume, name string) (block.Device, error) {
	s := b.open[volume]
	if s == nil {
		return nil, b.unknown(volume)
	}
	dev, err := b.home.receiver.OpenClone(context.Background(), volume, name)
	if err != nil {
		return nil, err
	}
	return block.NewChecked(fmt.Sprintf("clone %s@%s", volume, name), dev), nil
}
