package nbd

import "golang.org/x/sys/unix"

// rdhup is the event of a peer that sends no more.
const rdhup = unix.POLLRDHUP
