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
		"go_goroutines",
	} {
		if !strings.Contains(string(body), want) {
			t.Errorf("the metrics lack %s", want)
		}
	}
}
