// Package failover is one disk behind several doors: a device that passes each
// call to a target, and when that target is lost, passes every call under way
// and all that follow to the next one. Its user sees a slow call, and no error
// as long as any target works, however long that takes to come true.
//
// # What targets promise
//
// The targets are ways to one volume. What one of them acknowledged is seen
// through every other, a flush at one covers what was acknowledged at any, and
// both outlive the loss of a target. Two frontends that replicate to one another
// are that, and two servers of one file on one host. Two servers of copies are
// not. A target of another size is refused, for ever; that is all that can be
// checked from here.
//
// A target that is given up while it lives may still carry out calls that it
// has. The ones it has are sent again elsewhere with the same bytes, so that is
// harmless until the same range is written anew. Then it is for the target to
// know that it is no longer the one (package fence); and because a call may be
// on its way from one target to another, a range whose change was repeated takes
// no other change until Options.Settle after the target was lost.
//
// # How a target is lost
//
//   - It says so: a call fails with KindUnavailable (a lost connection,
//     ESHUTDOWN), KindFenced, KindClosed and their like, or a change with
//     KindReadOnly though the volume is writable (what NBD makes of fenced).
//   - It gives no sign of life: calls wait, none was answered for PingAfter, and
//     then no ping for PingTimeout. While nobody calls it is asked now and then.
//   - It lives and answers nothing, for Patience, while another target can be
//     opened. Patience doubles each time until something is answered: slow is
//     not dead, and a pair that waits for its link is not to be tossed about.
//   - It has an error that is about bytes (KindIO, KindCorrupt). The call is then
//     tried at each other target once; if all say so, the caller is told. Such
//     an error moves the device at most once in hardPause.
//
// Other errors (no space, out of range, not supported) are the volume's answer
// and the caller's to know.
//
// # Order
//
// A call that overlaps an earlier one waits for it if either changes the disk
// (ranges). So of overlapping calls one is under way at a time, and repeating
// it cannot undo what was acknowledged after it, nor show bytes older than
// those that were read before.
//
// # Memory
//
// Nothing is copied or queued: each call keeps its caller's goroutine and buffer
// until it is answered. Options.Depth bounds the calls that are under way; the
// rest wait before they take anything.
//
// # Goroutines and locks
//
// One watch for the device's life; one search while there is no target; one for
// each target being opened or closed. Device.gate is held for reading during
// each call, and by Close; then ranges.mu or Device.mu, which are leaves and
// not held together.
package failover
