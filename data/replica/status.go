package replica

// Status is how a volume stands at this node.
type Status struct {
	Role    string // alone, undecided, primary, secondary
	Mode    string // alone, pair, resync, degraded, waiting, forwarding
	Peer    string // the other node, as far as it is known
	Primary string
	Epoch   uint64
	Members []string
	InSync  bool
	// Reason says why calls wait or what is not as it should be; empty else.
	Reason      string
	ResyncBytes int64  // left to be copied at most
	Replicated  uint64 // changes made at both nodes since the start
}

// Status returns a snapshot.
func (v *Volume) Status() Status {
	if v.solo {
		return Status{Role: "alone", Mode: "alone"}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	st := v.now.Load()
	s := Status{Role: st.role.String(), Epoch: st.rec.Epoch, Primary: st.rec.Primary, Members: st.rec.Members,
		InSync: st.inSync, Reason: v.reason, ResyncBytes: v.left, Replicated: v.writes.Load()}
	switch {
	case st.role == secondary:
		s.Peer, s.Mode = st.rec.Primary, "forwarding"
		s.InSync = st.rec.Member(v.cfg.Node) && v.known.whole && v.inbound.Load() != nil
	case st.role != primary || !st.open:
		s.Mode = "waiting"
	case st.ship != nil && st.inSync:
		s.Mode = "pair"
	case st.ship != nil:
		s.Mode = "resync"
	case st.alone && v.cfg.Peer == nil:
		s.Mode = "alone"
	case st.alone:
		s.Mode = "degraded"
	default:
		s.Mode = "waiting"
	}
	if st.ship != nil {
		s.Peer = st.ship.node
	}
	if s.Peer == "" {
		for _, m := range st.rec.Members {
			if m != v.cfg.Node {
				s.Peer = m
			}
		}
	}
	return s
}
