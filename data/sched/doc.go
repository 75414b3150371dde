// Package sched decides who goes next over the link, and waits.
//
// Its heart is pure: Queue orders chunks that somebody wants, Window says how
// much background may be on its way, bucket holds a rate; none of them has a
// goroutine, a clock or I/O. Scheduler is the thin shell that feeds them
// events and the time.
//
// Invariants:
//
//   - A chunk that is queued or on its way is never asked for a second time.
//     Who wants it meanwhile joins, and may raise its class.
//   - Demand goes before write-back, write-back before read-ahead (Background
//     with Soon), read-ahead before the sweep; inside each, first come first
//     served, but for neighbours that ride along in one request.
//   - Demand in flight is bounded by Options.DemandChunks, background by the
//     window and the limits; Options.Floor background requests may always be
//     under way, so that it never starves, but for a limit.
//   - Every delivered chunk is handed to the sink once, before anybody who
//     waited for it goes on.
//
// Limits are the rules of a site by class and time of day, pure as well;
// Limiter applies them to all schedulers of a node together.
//
// Lock order: Scheduler.mu, then Limiter.mu; the link and the sink are called without it.
package sched
