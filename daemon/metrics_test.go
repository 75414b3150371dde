package daemon

import (
	"io"
	"net/http/httptest"
	"strings"
	"testing"

	"forerun/api"
)

func TestMetrics(t *testing.T) {
	h := Metrics(func() []api.Volume {
		return []api.Volume{
			{Volume: "a", SizeBytes: 1 << 30, Chunks: api.Chunks{Held: 3}, Primary: api.PrimarySource},
			{Volume: "b", WAN: api.WAN{DemandBytes: 5, RTTUs: 40000}, Primary: api.PrimaryTarget},
			{Volume: "c", Replica: &api.Replica{Role: api.ReplicaSecondary, Mode: api.ModeReplicated, Epoch: 7, InSync: true, ResyncBytes: 9},
				Writeback: &api.Writeback{Policy: api.PolicyWriteBack, UnwrittenBytes: 4096, OldestS: 2.5, RPOS: 3.5, LastID: 12,
					LastCheckpoint: "2026-01-02T03:04:05.5Z", Reason: "the backend's disk is full"}},
			{Volume: "d", Writeback: &api.Writeback{Policy: api.PolicyIsolated},
				Failover: &api.Failover{Target: "nbd://a", Moves: 2, Repeated: 5, LongestUs: 1500000}},
		}
	})
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	body, _ := io.ReadAll(w.Result().Body)
	for _, want := range []string{
		`forerun_volume_chunks{state="held",volume="a"} 3`,
		`forerun_volume_size_bytes{volume="a"} 1.073741824e+09`,
		`forerun_wan_received_bytes_total{class="demand",volume="b"} 5`,
		`forerun_wan_rtt_seconds{volume="b"} 0.04`,
		`forerun_volume_primary{side="target",volume="b"} 1`,
		`forerun_replica_role{role="secondary",volume="c"} 1`,
		`forerun_replica_role{role="primary",volume="c"} 0`,
		`forerun_replica_mode{mode="replicated",volume="c"} 1`,
		`forerun_replica_in_sync{volume="c"} 1`,
		`forerun_replica_epoch{volume="c"} 7`,
		`forerun_replica_resync_bytes{volume="c"} 9`,
		`forerun_writeback_policy{policy="isolated",volume="d"} 1`,
		`forerun_writeback_waiting{volume="c"} 1`,
		`forerun_writeback_unwritten_bytes{volume="c"} 4096`,
		`forerun_writeback_oldest_unwritten_seconds{volume="c"} 2.5`,
		`forerun_writeback_rpo_seconds{volume="c"} 3.5`,
		`forerun_writeback_last_checkpoint_timestamp_seconds{volume="c"} 1.7673230455e+09`,
		`forerun_writeback_last_checkpoint_id{volume="c"} 12`,
		`forerun_failover_connected{volume="d"} 1`,
		`forerun_failover_moves_total{volume="d"} 2`,
		`forerun_failover_repeated_calls_total{volume="d"} 5`,
		`forerun_failover_longest_gap_seconds{volume="d"} 1.5`,
		"go_goroutines",
	} {
		if !strings.Contains(string(body), want) {
			t.Errorf("the metrics lack %s", want)
		}
	}
	for _, no := range []string{`forerun_replica_in_sync{volume="a"}`, `forerun_writeback_rpo_seconds{volume="b"}`,
		`forerun_writeback_last_checkpoint_timestamp_seconds{volume="d"}`, `forerun_failover_connected{volume="c"}`} {
		if strings.Contains(string(body), no) {
			t.Errorf("%s is said of a volume that has no such thing", no)
		}
	}
}
