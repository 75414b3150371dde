// Package block is the language every storey of a volume speaks: the Device
// contract, the flags word, extents and the closed set of error kinds.
//
// A volume is a stack of devices. Each storey holds a Device below it and is
// one itself; it changes one thing only: where an answer comes from, when it
// may go, or what is remembered. The package imports nothing but the standard
// library and holds no policy.
//
// Invariants of the contract, checked between storeys by Checked:
//
//   - A call is served whole or fails. There is no short read and no partial
//     success that a caller may rely on.
//   - Offsets and lengths are bytes, inside [0, Info.Size).
//   - The caller owns p. The callee never keeps it after it returned and never
//     changes the p of a WriteAt.
//   - A returned error carries a Kind (KindOf never answers KindNone for it).
//   - After Flush returned nil, every write that had been acknowledged before
//     Flush was called survives a power cut. A write with FUA survives one as
//     soon as it has returned.
//   - Capability is data: what a device can do is said in Info and nowhere else.
package block
