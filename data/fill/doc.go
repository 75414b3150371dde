// Package fill brings the rest: what nobody has asked for yet.
//
// Order is pure: from where the sweep stands and which chunks are absent it
// says what to ask next. Pump is the shell: it surveys the source's holes ahead
// of the sweep, keeps enough asked for that the scheduler's window is the only
// limit, waits out obstacles, and tells how far it is.
//
// Invariants: a hole is never asked for; nothing that is here is asked for; an
// error is never the end, only a wait with a reason; when nothing is absent
// the pump says so and looks again from time to time, because a damaged chunk
// may become absent again.
package fill
