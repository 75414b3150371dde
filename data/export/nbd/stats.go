package nbd

import (
	"sync/atomic"
	"time"

	"forerun/block"
	"forerun/internal/nbdproto"
)

// Command is a request type of the protocol that is counted.
type Command uint8

// The commands. Their numbers are those of the protocol.
const (
	Read        Command = Command(nbdproto.CmdRead)
	Write       Command = Command(nbdproto.CmdWrite)
	Disconnect  Command = Command(nbdproto.CmdDisc)
	Flush       Command = Command(nbdproto.CmdFlush)
	Trim        Command = Command(nbdproto.CmdTrim)
	Cache       Command = Command(nbdproto.CmdCache)
	WriteZeroes Command = Command(nbdproto.CmdWriteZeroes)
	BlockStatus Command = Command(nbdproto.CmdBlockStatus)
	Commands            = 8 // how many there are
)

// String names the command.
func (c Command) String() string {
	if int(c) < Commands {
		return [...]string{"read", "write", "disconnect", "flush", "trim", "cache", "write-zeroes", "block-status"}[c]
	}
	return "unknown"
}

// CommandStats counts the requests of one command.
type CommandStats struct {
	Requests int64 // answered, with or without error
	Bytes    int64 // of those answered without error
	Errors   int64 // answered with an error
}

// Stats is what a Server has done so far.
type Stats struct {
	Connections int64                  // open now, the handshake included
	Accepted    int64                  // ever accepted
	Refused     int64                  // turned away because there were too many
	Handshakes  int64                  // that led to transmission
	Takeovers   int64                  // a reader was held up by a request it served, and replaced
	Inline      int64                  // requests served by the goroutine that read them
	Command     [Commands]CommandStats // by Command
}

// counters are the live form of the part of Stats that a connection counts.
type counters struct {
	inline  atomic.Int64
	command [Commands]struct{ requests, bytes, errors atomic.Int64 }
}

func (c *counters) addTo(s *Stats) {
	s.Inline += c.inline.Load()
	for i := range c.command {
		s.Command[i].Requests += c.command[i].requests.Load()
		s.Command[i].Bytes += c.command[i].bytes.Load()
		s.Command[i].Errors += c.command[i].errors.Load()
	}
}

// Observation is one answered request, for a histogram.
type Observation struct {
	Command Command
	Bytes   int64
	Took    time.Duration // from when it was read whole until its reply was ready
	Kind    block.Kind    // KindNone for success
}
