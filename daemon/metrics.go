package daemon

import (
	"net/http"
	"time"

	"forerun/api"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// gauge is one family of metrics made from a volume's status.
type gauge struct {
	name, help string
	kind       prometheus.ValueType
	labels     []string
	values     func(api.Volume) []sample
}

type sample struct {
	v      float64
	labels []string
}

func one(v float64) []sample { return []sample{{v: v}} }

func boolean(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

const microsecond = 1e-6 // seconds

var families = []gauge{
	{"forerun_volume_size_bytes", "Size of the volume.", prometheus.GaugeValue, nil,
		func(v api.Volume) []sample { return one(float64(v.SizeBytes)) }},
	{"forerun_volume_chunks", "Chunks of the volume by state.", prometheus.GaugeValue, []string{"state"},
		func(v api.Volume) []sample {
			return []sample{{float64(v.Chunks.Untouched), []string{"untouched"}}, {float64(v.Chunks.Free), []string{"free"}}, {float64(v.Chunks.Held), []string{"held"}},
				{float64(v.Chunks.Zero), []string{"zero"}}, {float64(v.Chunks.Modified), []string{"modified"}}}
		}},
	{"forerun_volume_absent_chunks", "Chunks still to be fetched, wholly or in part.", prometheus.GaugeValue, nil,
		func(v api.Volume) []sample { return one(float64(v.Chunks.Absent)) }},
	{"forerun_volume_corrupt_chunks_total", "Chunks found damaged and fetched again.", prometheus.CounterValue, nil,
		func(v api.Volume) []sample { return one(float64(v.Chunks.Corrupt)) }},
	{"forerun_volume_primary", "1 for the side that is primary.", prometheus.GaugeValue, []string{"side"},
		func(v api.Volume) []sample {
			return []sample{{boolean(v.Primary == api.PrimarySource), []string{api.PrimarySource}},
				{boolean(v.Primary == api.PrimaryTarget), []string{api.PrimaryTarget}}}
		}},
	{"forerun_volume_waiting", "1 while the workload waits for something named in status.", prometheus.GaugeValue, nil,
		func(v api.Volume) []sample { return one(boolean(v.Waiting != "")) }},
	{"forerun_clients", "Connected NBD clients, or sessions at a backend.", prometheus.GaugeValue, nil,
		func(v api.Volume) []sample { return one(float64(v.Clients)) }},
	{"forerun_wan_received_bytes_total", "Bytes received for the volume by class.", prometheus.CounterValue, []string{"class"},
		func(v api.Volume) []sample {
			return []sample{{float64(v.WAN.DemandBytes), []string{"demand"}}, {float64(v.WAN.BackgroundBytes), []string{"background"}}}
		}},
	{"forerun_wan_sent_bytes_total", "Bytes sent over the link.", prometheus.CounterValue, nil,
		func(v api.Volume) []sample { return one(float64(v.WAN.SentBytes)) }},
	{"forerun_wan_connected", "1 while the link is up.", prometheus.GaugeValue, nil,
		func(v api.Volume) []sample { return one(boolean(v.WAN.Connected)) }},
	{"forerun_wan_rtt_seconds", "Round trip of the link.", prometheus.GaugeValue, nil,
		func(v api.Volume) []sample { return one(float64(v.WAN.RTTUs) * microsecond) }},
	{"forerun_wan_reconnects_total", "Times the link had to be made again.", prometheus.CounterValue, nil,
		func(v api.Volume) []sample { return one(float64(v.WAN.Reconnects)) }},
	{"forerun_demand_reads_total", "Reads that needed the link.", prometheus.CounterValue, nil,
		func(v api.Volume) []sample { return one(float64(v.Demand.Reads)) }},
	{"forerun_demand_wait_seconds", "Wait of demand reads for the link.", prometheus.GaugeValue, []string{"quantile"},
		func(v api.Volume) []sample {
			return []sample{{float64(v.Demand.P50Us) * microsecond, []string{"0.5"}}, {float64(v.Demand.P99Us) * microsecond, []string{"0.99"}}}
		}},
	{"forerun_fill_rate_bytes", "Plain bytes a second the fill brings.", prometheus.GaugeValue, nil,
		func(v api.Volume) []sample { return one(v.Fill.RateBytes) }},
	{"forerun_fill_remaining_bytes", "Plain bytes still to be filled.", prometheus.GaugeValue, nil,
		func(v api.Volume) []sample { return one(float64(v.Fill.RemainingBytes)) }},
	{"forerun_fill_window_bytes", "Background bytes allowed in flight.", prometheus.GaugeValue, nil,
		func(v api.Volume) []sample { return one(float64(v.Fill.WindowBytes)) }},
	{"forerun_fill_in_flight_bytes", "Background bytes in flight, estimated; bounded by the window.", prometheus.GaugeValue, nil,
		func(v api.Volume) []sample { return one(float64(v.Fill.InFlightBytes)) }},
	{"forerun_fill_requests", "Background requests under way.", prometheus.GaugeValue, nil,
		func(v api.Volume) []sample { return one(float64(v.Fill.Requests)) }},
	{"forerun_fill_requests_floor", "Background requests that may always be under way.", prometheus.GaugeValue, nil,
		func(v api.Volume) []sample { return one(float64(v.Fill.RequestsFloor)) }},
	{"forerun_fill_cursor_chunk", "Where the sweep stands in the volume.", prometheus.GaugeValue, nil,
		func(v api.Volume) []sample { return one(float64(v.Fill.CursorChunk)) }},
	{"forerun_demand_in_flight", "Demand chunks asked for and not here yet.", prometheus.GaugeValue, nil,
		func(v api.Volume) []sample { return one(float64(v.Demand.InFlight)) }},
	{"forerun_demand_in_flight_limit", "Demand chunks that may be asked for at a time.", prometheus.GaugeValue, nil,
		func(v api.Volume) []sample { return one(float64(v.Demand.InFlightLimit)) }},
	{"forerun_backend_queue_chunks", "Chunks asked for that wait to be read.", prometheus.GaugeValue, []string{"class"},
		sending(func(s *api.Sending) []sample {
			return []sample{{float64(s.Queued - s.QueuedBackground), []string{"demand"}}, {float64(s.QueuedBackground), []string{"background"}}}
		})},
	{"forerun_backend_reads", "Source reads under way.", prometheus.GaugeValue, []string{"class"},
		sending(func(s *api.Sending) []sample {
			return []sample{{float64(s.Reads - s.BackgroundReads), []string{"demand"}}, {float64(s.BackgroundReads), []string{"background"}}}
		})},
	{"forerun_backend_reads_limit", "Source reads that may be under way.", prometheus.GaugeValue, []string{"class"},
		sending(func(s *api.Sending) []sample {
			return []sample{{float64(s.ReadsLimit), []string{"all"}}, {float64(s.BackgroundReadsLimit), []string{"background"}}}
		})},
	{"forerun_backend_background_reads_floor", "Background reads that always may be under way.", prometheus.GaugeValue, nil,
		sending(func(s *api.Sending) []sample { return one(float64(s.BackgroundReadsFloor)) })},
	{"forerun_backend_source_read_seconds", "What reads of the busiest source take, lately.", prometheus.GaugeValue, nil,
		sending(func(s *api.Sending) []sample { return one(float64(s.SourceReadUs) * microsecond) })},
	{"forerun_backend_send_queue_bytes", "Bytes read and not yet sent.", prometheus.GaugeValue, nil,
		sending(func(s *api.Sending) []sample { return one(float64(s.SendQueueBytes)) })},
	{"forerun_backend_pace_bytes", "Bytes a second that background is sent with at most; 0 when unknown.", prometheus.GaugeValue, nil,
		sending(func(s *api.Sending) []sample { return one(float64(s.PaceBytes)) })},
	{"forerun_backend_path_queue_seconds", "Queue seen on the way to a frontend.", prometheus.GaugeValue, nil,
		sending(func(s *api.Sending) []sample { return one(float64(s.QueueUs) * microsecond) })},
	{"forerun_backend_path_queue_target_seconds", "Queue that is aimed at on the way to a frontend.", prometheus.GaugeValue, nil,
		sending(func(s *api.Sending) []sample { return one(float64(s.QueueTargetUs) * microsecond) })},
	{"forerun_backend_sent_bytes_total", "Packed bytes of chunks sent, by packed form.", prometheus.CounterValue, []string{"codec"},
		sending(func(s *api.Sending) (out []sample) {
			for _, c := range s.Codecs {
				out = append(out, sample{float64(c.PackedBytes), []string{c.Codec}})
			}
			return out
		})},
	{"forerun_backend_packed_plain_bytes_total", "Plain bytes of chunks sent, by packed form.", prometheus.CounterValue, []string{"codec"},
		sending(func(s *api.Sending) (out []sample) {
			for _, c := range s.Codecs {
				out = append(out, sample{float64(c.PlainBytes), []string{c.Codec}})
			}
			return out
		})},
	{"forerun_backend_yields_total", "Times background waited for demand or its pace.", prometheus.CounterValue, nil,
		sending(func(s *api.Sending) []sample { return one(float64(s.Yields)) })},
	{"forerun_limit_bytes", "Limit in force in bytes a second, 0 for none.", prometheus.GaugeValue, []string{"class"},
		func(v api.Volume) (out []sample) {
			for _, l := range v.Limits {
				out = append(out, sample{float64(l.RateBytes), []string{l.Class}})
			}
			return out
		}},
	{"forerun_store_bytes", "Bytes the site's store takes.", prometheus.GaugeValue, nil,
		func(v api.Volume) []sample { return one(float64(v.StoreBytes)) }},
	{"forerun_dedup_chunks_total", "Chunks that came, or at a backend went, as a signature alone.", prometheus.CounterValue, nil,
		func(v api.Volume) []sample { return one(float64(v.Dedup.Chunks)) }},
	{"forerun_dedup_repairs_total", "Signatures of chunks that were not held, whose bytes had to be asked for.", prometheus.CounterValue, nil,
		func(v api.Volume) []sample { return one(float64(v.Dedup.Repairs)) }},
	{"forerun_dedup_known_chunks", "Chunks of the source whose content a backend knows.", prometheus.GaugeValue, nil,
		func(v api.Volume) []sample { return one(float64(v.Dedup.KnownChunks)) }},
	{"forerun_dedup_hashed_bytes_total", "Plain bytes that a backend computed signatures of.", prometheus.CounterValue, nil,
		func(v api.Volume) []sample { return one(float64(v.Dedup.HashedBytes)) }},
	{"forerun_store_evicted_bytes_total", "Bytes dropped from the store to keep to its limit.", prometheus.CounterValue, nil,
		func(v api.Volume) []sample { return one(float64(v.Dedup.EvictedBytes)) }},
	{"forerun_cache_hits_total", "Local reads by the tier that answered.", prometheus.CounterValue, []string{"tier"},
		func(v api.Volume) []sample {
			return []sample{{float64(v.Cache.MemoryHits), []string{"memory"}}, {float64(v.Cache.ScratchHits), []string{"scratch"}},
				{float64(v.Cache.Misses), []string{"store"}}}
		}},
	{"forerun_journal_records_total", "Writes journaled.", prometheus.CounterValue, nil,
		func(v api.Volume) []sample { return one(float64(v.Journal.Records)) }},
	{"forerun_journal_syncs_total", "Syncs of the journal.", prometheus.CounterValue, nil,
		func(v api.Volume) []sample { return one(float64(v.Journal.Syncs)) }},
	{"forerun_journal_retained_bytes", "Bytes of journal that a restart would replay.", prometheus.GaugeValue, nil,
		func(v api.Volume) []sample { return one(float64(v.Journal.RetainedBytes)) }},
	{"forerun_cutover_changeset_bytes", "Bytes the target still lacks.", prometheus.GaugeValue, nil,
		func(v api.Volume) []sample { return one(float64(v.Cutover.ChangesetBytes)) }},
	{"forerun_cutover_pause_seconds", "How long the switch held I/O.", prometheus.GaugeValue, nil,
		func(v api.Volume) []sample { return one(float64(v.Cutover.PauseUs) * microsecond) }},
	{"forerun_replica_role", "1 for the part this frontend has in the pair.", prometheus.GaugeValue, []string{"role"},
		replica(func(r *api.Replica) []sample {
			return which(r.Role, api.ReplicaPrimary, api.ReplicaSecondary, api.ReplicaJoining, api.ReplicaAlone)
		})},
	{"forerun_replica_mode", "1 for how writes are acknowledged.", prometheus.GaugeValue, []string{"mode"},
		replica(func(r *api.Replica) []sample {
			return which(r.Mode, api.ModeReplicated, api.ModeDegraded, api.ModeWaiting, api.ModeForwarding)
		})},
	{"forerun_replica_in_sync", "1 while both frontends hold every acknowledged write.", prometheus.GaugeValue, nil,
		replica(func(r *api.Replica) []sample { return one(boolean(r.InSync)) })},
	{"forerun_replica_epoch", "Epoch of the volume; it grows with each change of the primary.", prometheus.GaugeValue, nil,
		replica(func(r *api.Replica) []sample { return one(float64(r.Epoch)) })},
	{"forerun_replica_resync_bytes", "Bytes still to be copied to the peer.", prometheus.GaugeValue, nil,
		replica(func(r *api.Replica) []sample { return one(float64(r.ResyncBytes)) })},
	{"forerun_writeback_policy", "1 for what becomes of changes at the source.", prometheus.GaugeValue, []string{"policy"},
		writeback(func(w *api.Writeback) []sample { return which(w.Policy, api.PolicyWriteBack, api.PolicyIsolated) })},
	{"forerun_writeback_waiting", "1 while write-back waits for something named in status.", prometheus.GaugeValue, nil,
		writeback(func(w *api.Writeback) []sample { return one(boolean(w.Reason != "")) })},
	{"forerun_writeback_unwritten_bytes", "Changes that are in no stored checkpoint yet.", prometheus.GaugeValue, nil,
		writeback(func(w *api.Writeback) []sample { return one(float64(w.UnwrittenBytes)) })},
	{"forerun_writeback_oldest_unwritten_seconds", "Age of the oldest unwritten change, 0 when there is none.", prometheus.GaugeValue, nil,
		writeback(func(w *api.Writeback) []sample { return one(w.OldestS) })},
	{"forerun_writeback_rpo_seconds", "How far back the source would be if the target site were lost now.", prometheus.GaugeValue, nil,
		writeback(func(w *api.Writeback) []sample { return one(w.RPOS) })},
	{"forerun_writeback_last_checkpoint_timestamp_seconds", "When the last stored checkpoint was cut; absent while there is none.", prometheus.GaugeValue, nil,
		writeback(func(w *api.Writeback) []sample {
			at, err := time.Parse(time.RFC3339Nano, w.LastCheckpoint)
			if err != nil {
				return nil
			}
			return one(float64(at.UnixMilli()) / 1e3)
		})},
	{"forerun_writeback_last_checkpoint_id", "Number of the last stored checkpoint.", prometheus.GaugeValue, nil,
		writeback(func(w *api.Writeback) []sample { return one(float64(w.LastID)) })},
	{"forerun_failover_connected", "1 while a target serves the proxy's volume.", prometheus.GaugeValue, nil,
		failover(func(f *api.Failover) []sample { return one(boolean(f.Target != "")) })},
	{"forerun_failover_moves_total", "Times a proxy began to use a target.", prometheus.CounterValue, nil,
		failover(func(f *api.Failover) []sample { return one(float64(f.Moves)) })},
	{"forerun_failover_repeated_calls_total", "Calls that were sent again to another target.", prometheus.CounterValue, nil,
		failover(func(f *api.Failover) []sample { return one(float64(f.Repeated)) })},
	{"forerun_failover_stalls_total", "Times a target answered nothing for too long.", prometheus.CounterValue, nil,
		failover(func(f *api.Failover) []sample { return one(float64(f.Stalls)) })},
	{"forerun_failover_longest_gap_seconds", "Longest time without any target.", prometheus.GaugeValue, nil,
		failover(func(f *api.Failover) []sample { return one(float64(f.LongestUs) * microsecond) })},
}

// replica, sending, writeback and failover make samples of a part of the status that
// not every volume has.
func replica(f func(*api.Replica) []sample) func(api.Volume) []sample {
	return func(v api.Volume) []sample {
		if v.Replica == nil {
			return nil
		}
		return f(v.Replica)
	}
}

func sending(f func(*api.Sending) []sample) func(api.Volume) []sample {
	return func(v api.Volume) []sample {
		if v.Sending == nil {
			return nil
		}
		return f(v.Sending)
	}
}

func writeback(f func(*api.Writeback) []sample) func(api.Volume) []sample {
	return func(v api.Volume) []sample {
		if v.Writeback == nil {
			return nil
		}
		return f(v.Writeback)
	}
}

func failover(f func(*api.Failover) []sample) func(api.Volume) []sample {
	return func(v api.Volume) []sample {
		if v.Failover == nil {
			return nil
		}
		return f(v.Failover)
	}
}

// which is 1 for the value that is, 0 for the others.
func which(is string, all ...string) []sample {
	out := make([]sample, len(all))
	for i, a := range all {
		out[i] = sample{boolean(a == is), []string{a}}
	}
	return out
}

// collector turns the daemon's status into metrics at each scrape, so that no
// room knows Prometheus.
type collector struct {
	descs   []*prometheus.Desc
	volumes func() []api.Volume
}

func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range c.descs {
		ch <- d
	}
}

func (c *collector) Collect(ch chan<- prometheus.Metric) {
	for _, v := range c.volumes() {
		for i, f := range families {
			for _, s := range f.values(v) {
				ch <- prometheus.MustNewConstMetric(c.descs[i], f.kind, s.v, append([]string{v.Volume}, s.labels...)...)
			}
		}
	}
}

// Metrics serves what volumes reports, in the Prometheus text format.
func Metrics(volumes func() []api.Volume) http.Handler {
	c := &collector{volumes: volumes}
	for _, f := range families {
		c.descs = append(c.descs, prometheus.NewDesc(f.name, f.help, append([]string{"volume"}, f.labels...), nil))
	}
	r := prometheus.NewRegistry()
	r.MustRegister(c, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return promhttp.HandlerFor(r, promhttp.HandlerOpts{})
}
