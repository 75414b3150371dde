package block

import "context"

type originKey struct{}

// WithOrigin returns a context for calls that are made for somebody who may go
// away while they wait. gone says whether they have, and may cost a system call.
func WithOrigin(ctx context.Context, gone func() bool) context.Context {
	return context.WithValue(ctx, originKey{}, gone)
}

// OriginGone says whether the one a call is made for is known to have gone.
// Nobody waits for the answer then, and whoever it was may have had the change
// made elsewhere and others after it. So a device that would begin a change
// anew, at another node or after a long wait, gives it up instead. Of a call
// with no known origin it is false.
func OriginGone(ctx context.Context) bool {
	gone, ok := ctx.Value(originKey{}).(func() bool)
	return ok && gone()
}
