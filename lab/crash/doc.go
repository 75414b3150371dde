// Package crash kills the product's processes at seeded moments and asks the
// oracle what is left.
//
// One round: the daemons run, a verifying load writes through the frontend,
// one daemon gets kill -9, is started again, and the whole disk is read and
// judged. Three targets: the frontend, the backend (the workload then sees a
// wait and no error), and the frontend during a cut-over, where the native
// disk is judged as well once it has become primary.
//
// Invariants that are checked, each a failure of the round:
//
//   - every sector holds the newest flushed write or a later one, whole;
//   - a workload whose frontend lives sees no error, whatever happens to the backend;
//   - of the fill no more than one second is lost;
//   - the source disk is never written.
//
// Lock order: sampler.mu is the only lock.
package crash
