//go:build unix && !linux

package nbd

// rdhup is the event of a peer that sends no more; here only a full end is told.
const rdhup = 0
