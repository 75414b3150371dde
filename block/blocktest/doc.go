// Package blocktest holds what tests of devices share: the suite that every
// block.Device passes (Test), a device of plain bytes to compare with (Twin),
// and devices that do nothing (Null), are late (Slow) or fail (Failing).
//
// The suite judges a device by the contract alone. It keeps a copy of the
// device's content and compares after every read; where the contract leaves a
// choice (trimmed blocks, calls whose context ended) it accepts each permitted
// outcome per 512-byte sector and then goes on with what it found.
package blocktest
