// Package api is the hallway between the wings: the types that daemons answer
// with and the paths they answer on. It holds no behaviour.
//
// Each daemon serves the API on the unix socket SocketName in its state
// directory, with an OpenAPI document at /openapi.json and Prometheus metrics
// at /metrics. Field names are part of the promise to users: they are added
// to, never renamed. Units stand last in a name.
package api

// Names and paths of the API.
const (
	SocketName   = "api.sock" // in the daemon's state directory
	PathNode     = "/v1/node"
	PathVolumes  = "/v1/volumes"
	PathVolume   = "/v1/volumes/{volume}"
	PathFill     = "/v1/volumes/{volume}/fill"
	PathCutover  = "/v1/volumes/{volume}/cutover"
	PathMetrics  = "/metrics"
	PathOpenAPI  = "/openapi.json"
	RoleBackend  = "backend"
	RoleFrontend = "frontend"
)

// Phases of a volume's life, in order.
const (
	PhaseServing    = "serving"    // a backend's volume: it is offered to frontends
	PhaseStarting   = "starting"   // no workload has connected yet
	PhaseRunning    = "running"    // the workload runs, part of its data is still at the source only
	PhaseFilled     = "filled"     // everything is here; the source is still primary
	PhaseConverging = "converging" // being replicated to the native target
	PhaseSwitched   = "switched"   // the native target is primary
)

// Who is primary for a volume.
const (
	PrimarySource = "source"
	PrimaryTarget = "target"
)

// Node describes a daemon.
type Node struct {
	Name    string   `json:"name" doc:"name in its certificate"`
	Role    string   `json:"role" enum:"backend,frontend"`
	Version string   `json:"version"`
	UptimeS int64    `json:"uptime_s"`
	Backend string   `json:"backend,omitempty" doc:"address of the backend, at a frontend"`
	Exports []string `json:"exports,omitempty" doc:"NBD URIs that are served"`
	Listen  string   `json:"listen,omitempty" doc:"address a backend listens on"`
}

// Volume is everything status shows about one volume.
type Volume struct {
	Volume     string   `json:"volume" doc:"name of the volume and of its NBD export"`
	Role       string   `json:"role" enum:"backend,frontend" doc:"of the daemon that answers"`
	Phase      string   `json:"phase" enum:"serving,starting,running,filled,converging,switched"`
	Primary    string   `json:"primary" enum:"source,target" doc:"which side holds the volume"`
	SizeBytes  int64    `json:"size_bytes"`
	ChunkBytes int64    `json:"chunk_bytes"`
	Source     string   `json:"source,omitempty" doc:"where the bytes come from"`
	ReadOnly   bool     `json:"read_only,omitempty"`
	Waiting    string   `json:"waiting,omitempty" doc:"what the workload or the daemon waits for, empty when nothing"`
	Clients    int      `json:"clients" doc:"connected NBD clients, or sessions at a backend"`
	Chunks     Chunks   `json:"chunks"`
	WAN        WAN      `json:"wan"`
	Demand     Demand   `json:"demand"`
	Fill       Fill     `json:"fill"`
	StoreBytes int64    `json:"store_bytes" doc:"bytes the site's store takes, all volumes together"`
	Store      Store    `json:"store"`
	Cache      Cache    `json:"cache"`
	Journal    Journal  `json:"journal"`
	Cutover    Cutover  `json:"cutover"`
	Warnings   []string `json:"warnings,omitempty"`
}

// Chunks counts the volume map; the four sum to the volume.
type Chunks struct {
	Untouched int64 `json:"untouched" doc:"only the source has them"`
	Held      int64 `json:"held" doc:"kept here, verified"`
	Zero      int64 `json:"zero" doc:"known to read as zeros"`
	Modified  int64 `json:"modified" doc:"written by the workload"`
	Absent    int64 `json:"absent" doc:"still to be fetched, wholly or in part"`
	Corrupt   int64 `json:"corrupt" doc:"found damaged since start, and fetched again"`
}

// WAN is what crossed the link for this volume since the daemon started.
type WAN struct {
	DemandBytes     int64   `json:"demand_bytes" doc:"received for reads the workload waited for"`
	BackgroundBytes int64   `json:"background_bytes" doc:"received in the background"`
	SentBytes       int64   `json:"sent_bytes" doc:"sent to the other side"`
	ReceivedBytes   int64   `json:"received_bytes" doc:"all bytes the session received, TLS and framing included"`
	RateBytes       float64 `json:"rate_bytes" doc:"received per second, lately"`
	Connected       bool    `json:"connected"`
	RTTUs           int64   `json:"rtt_us"`
	Reconnects      int64   `json:"reconnects"`
	LastError       string  `json:"last_error,omitempty"`
}

// Demand is how long the workload waited for the link.
type Demand struct {
	Reads   int64 `json:"reads" doc:"reads that needed the link"`
	Waiting int64 `json:"waiting" doc:"chunks waited for now"`
	P50Us   int64 `json:"p50_us"`
	P99Us   int64 `json:"p99_us"`
	Joined  int64 `json:"joined" doc:"requests that found their chunk already asked for"`
}

// Fill is the background transfer.
type Fill struct {
	State          string  `json:"state" enum:"running,paused,waiting,filled,stopped"`
	Reason         string  `json:"reason,omitempty" doc:"why it waits"`
	RateBytes      float64 `json:"rate_bytes" doc:"plain bytes a second, lately"`
	LimitBytes     int64   `json:"limit_bytes" doc:"limit on the link in bytes a second, 0 for none"`
	RemainingBytes int64   `json:"remaining_bytes"`
	ETAS           int64   `json:"eta_s" doc:"-1 when unknown"`
	WindowBytes    int64   `json:"window_bytes" doc:"background bytes allowed in flight"`
	InFlight       int64   `json:"in_flight" doc:"background chunks in flight"`
}

// Store is the site's chunk store.
type Store struct {
	Chunks     int64 `json:"chunks"`
	PlainBytes int64 `json:"plain_bytes"`
	Packs      int64 `json:"packs"`
	Corrupt    int64 `json:"corrupt"`
}

// Cache counts where local reads were answered.
type Cache struct {
	MemoryHits   int64 `json:"memory_hits"`
	ScratchHits  int64 `json:"scratch_hits"`
	Misses       int64 `json:"misses"`
	MemoryBytes  int64 `json:"memory_bytes"`
	ScratchBytes int64 `json:"scratch_bytes"`
}

// Journal is the log of acknowledged writes.
type Journal struct {
	Records       int64 `json:"records"`
	Bytes         int64 `json:"bytes"`
	Syncs         int64 `json:"syncs"`
	RetainedBytes int64 `json:"retained_bytes"`
	Position      int64 `json:"position"`
}

// Cutover is the replication to a native disk and the switch to it.
type Cutover struct {
	State          string  `json:"state" doc:"idle, waiting, copying, paused, switching, switched, not-converging, failed, canceled"`
	Target         string  `json:"target,omitempty"`
	Error          string  `json:"error,omitempty"`
	Rounds         int     `json:"rounds"`
	RoundBytes     []int64 `json:"round_bytes,omitempty" doc:"changeset of each round"`
	ChangesetBytes int64   `json:"changeset_bytes"`
	CopiedBytes    int64   `json:"copied_bytes"`
	ThresholdBytes int64   `json:"threshold_bytes"`
	RateBytes      float64 `json:"rate_bytes"`
	ETAS           int64   `json:"eta_s"`
	PauseUs        int64   `json:"pause_us" doc:"how long the switch held I/O"`
}

// FillRequest changes the background transfer of a volume.
type FillRequest struct {
	Action    string `json:"action" enum:"pause,resume,limit"`
	RateBytes int64  `json:"rate_bytes,omitempty" minimum:"0" doc:"with limit: bytes a second on the link, 0 for none"`
}

// CutoverRequest starts a cut-over.
type CutoverRequest struct {
	To             string `json:"to" minLength:"1" doc:"absolute path of the raw file or block device that becomes the disk"`
	ThresholdBytes int64  `json:"threshold_bytes,omitempty" minimum:"0" doc:"changeset below which the switch is made, 0 for the default"`
	Wait           bool   `json:"wait,omitempty" doc:"wait for the fill to complete rather than refuse"`
	Force          bool   `json:"force,omitempty" doc:"overwrite a target that holds data"`
}
