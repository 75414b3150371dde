package replica

import (
	"context"

	"forerun/block"
)

// ReadAt reads at the primary.
func (v *Volume) ReadAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	if v.solo {
		return v.cfg.Local.ReadAt(ctx, p, off, f)
	}
	if err := v.enter("read"); err != nil {
		return err
	}
	defer v.life.RUnlock()
	if err := v.within("read", off, int64(len(p))); err != nil {
		return err
	}
	return v.tell("read", v.ask1(ctx, func(st *standing) (bool, error) {
		if st.role == secondary {
			return v.forwardRead(ctx, st, p, off, f)
		}
		return false, v.cfg.Local.ReadAt(ctx, p, off, f)
	}))
}

// ask1 routes a call that changes nothing: fn forwards it, or answers it from
// Local, and then it counts only if nobody else can have served before it ended.
func (v *Volume) ask1(ctx context.Context, fn func(st *standing) (again bool, err error)) error {
	for {
		st := v.now.Load()
		if st.role == undecided || st.role == primary && !st.open {
			if err := v.pause(ctx, st, 0); err != nil {
				return err
			}
			continue
		}
		again, err := fn(st)
		if err != nil {
			if st.role == primary && v.resign(ctx, st.reign, err) {
				continue
			}
			return err
		}
		if st.role == primary {
			if err, again = v.leased(ctx, st.reign); err != nil {
				return err
			}
		}
		if !again {
			return nil
		}
	}
}

// Extents asks the primary.
func (v *Volume) Extents(ctx context.Context, dst []block.Extent, off, n int64, f block.Flags) ([]block.Extent, error) {
	if v.solo {
		return v.cfg.Local.Extents(ctx, dst, off, n, f)
	}
	if err := v.enter("extents"); err != nil {
		return dst, err
	}
	defer v.life.RUnlock()
	if err := v.within("extents", off, n); err != nil {
		return dst, err
	}
	out := dst
	err := v.ask1(ctx, func(st *standing) (again bool, err error) {
		if st.role == secondary {
			out, again, err = v.forwardExtents(ctx, st, dst, off, n, f)
			return again, err
		}
		out, err = v.cfg.Local.Extents(ctx, dst, off, n, f)
		return false, err
	})
	if err != nil {
		return dst, v.tell("extents", err)
	}
	return out, nil
}

// Prefetch brings a range near at the primary.
func (v *Volume) Prefetch(ctx context.Context, off, n int64, f block.Flags) error {
	if v.solo {
		return v.cfg.Local.Prefetch(ctx, off, n, f)
	}
	if err := v.enter("prefetch"); err != nil {
		return err
	}
	defer v.life.RUnlock()
	if err := v.within("prefetch", off, n); err != nil {
		return err
	}
	return v.tell("prefetch", v.ask1(ctx, func(st *standing) (bool, error) {
		if st.role == secondary {
			return v.forwardCall(ctx, st, typFwdPrefetch, body{off: off, n: n, flags: f}, nil, nil)
		}
		return false, v.cfg.Local.Prefetch(ctx, off, n, f)
	}))
}
