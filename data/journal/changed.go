package journal

import (
	"context"

	"forerun/block"
)

// Changed calls visit with the range of every record behind the named hold, in
// order, repeated and overlapping as they come; voided ones too. known is false
// when there is no such hold, or when it was given up before all was seen: then
// anything may have changed. Payloads are not read, nothing is kept.
func (j *Journal) Changed(ctx context.Context, hold string, visit func(off, n int64)) (known bool, err error) {
	from, ok := j.Held(hold)
	if !ok {
		return false, nil
	}
	end := j.Position()
	r, err := j.Reader(from)
	if err != nil {
		return false, lostHold(err)
	}
	defer r.Close()
	for r.Position().Sequence < end.Sequence {
		rec, err := r.Skim(ctx)
		if err != nil {
			return false, lostHold(err)
		}
		if rec.Type != TypeVoid {
			visit(rec.Off, rec.Len)
		}
	}
	// The segment under the reader stays, those before it may have gone.
	if _, ok := j.Held(hold); !ok {
		return false, nil
	}
	return true, nil
}

// lostHold drops the errors that mean: the journal no longer has it.
func lostHold(err error) error {
	switch block.KindOf(err) {
	case block.KindNotFound, block.KindCorrupt, block.KindInvalid:
		return nil
	}
	return err
}
