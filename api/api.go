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
	SocketName  = "api.sock" // in the daemon's state directory
	PathNode    = "/v1/node"
	PathVolumes = "/v1/volumes"
	PathVolume  = "/v1/volumes/{volume}"
	PathFill    = "/v1/volumes/{volume}/fill"
	PathCutover = "/v1/volumes/{volume}/cutover"
	PathLimits  = "/v1/limits"

	PathAbort      = "/v1/volumes/{volume}/abort"
	PathCheckpoint = "/v1/volumes/{volume}/checkpoint"
	PathDiscard    = "/v1/volumes/{volume}/discard"
	PathFailover   = "/v1/volumes/{volume}/failover"
	PathPolicy     = "/v1/volumes/{volume}/policy"

	PathMetrics  = "/metrics"
	PathOpenAPI  = "/openapi.json"
	RoleBackend  = "backend"
	RoleFrontend = "frontend"
	RoleProxy    = "proxy"
)

// Phases of a volume's life, in order. The last two end it without a switch.
const (
	PhaseServing    = "serving"    // a backend's volume: it is offered to frontends
	PhaseStarting   = "starting"   // no workload has connected yet
	PhaseRunning    = "running"    // the workload runs, part of its data is still at the source only
	PhaseFilled     = "filled"     // everything is here; the source is still primary
	PhaseConverging = "converging" // being replicated to the native target
	PhaseSwitched   = "switched"   // the native target is primary
	PhaseAborted    = "aborted"    // called off: the source is up to date, or at its last checkpoint, and free
	PhaseDiscarded  = "discarded"  // a test clone that is gone; the source was never touched
)

// Who is primary for a volume.
const (
	PrimarySource = "source"
	PrimaryTarget = "target"
)

// What a volume's changes are for: Writeback.Policy.
const (
	PolicyWriteBack = "write-back" // they go back to the source, a checkpoint at a time
	PolicyIsolated  = "isolated"   // the source never sees them
)

// Roles of a frontend for a volume: Replica.Role.
const (
	ReplicaPrimary   = "primary"   // it serves and acknowledges
	ReplicaSecondary = "secondary" // it holds what the primary acknowledges, and passes calls on to it
	ReplicaJoining   = "joining"   // a secondary that does not hold everything yet
	ReplicaAlone     = "alone"     // no peer was configured
)

// How a primary acknowledges: Replica.Mode.
const (
	ModeReplicated = "replicated" // both frontends hold a write before it is acknowledged
	ModeDegraded   = "degraded"   // the peer is lost: each write is synced before it is acknowledged
	ModeWaiting    = "waiting"    // the peer is lost, and writes wait for it or for the arbiter
	ModeForwarding = "forwarding" // at a secondary: calls are passed on to the primary
)

// States of Abort.State.
const (
	AbortDraining  = "draining"  // what is unwritten goes to the source
	AbortReleasing = "releasing" // the source is synced and unlocked, leftovers are removed
	AbortDone      = "aborted"   // over
	AbortFailed    = "failed"    // it stopped; Error says why, and it may be asked for again
)

// Node describes a daemon.
type Node struct {
	Name     string   `json:"name" doc:"name in its certificate"`
	Role     string   `json:"role" enum:"backend,frontend,proxy"`
	Version  string   `json:"version"`
	UptimeS  int64    `json:"uptime_s"`
	Backend  string   `json:"backend,omitempty" doc:"address of the backend, at a frontend; of the first one where there are several"`
	Backends []string `json:"backends,omitempty" doc:"addresses of all backends, at a frontend"`
	Exports  []string `json:"exports,omitempty" doc:"NBD URIs that are served"`
	Listen   string   `json:"listen,omitempty" doc:"address a backend listens on"`
	Peer     string   `json:"peer,omitempty" doc:"address of the other frontend"`
	Zone     string   `json:"zone,omitempty" doc:"where a frontend stands; its peer stands elsewhere"`
	Arbiter  string   `json:"arbiter,omitempty" doc:"address of who decides which frontend is primary, where that is one for all volumes"`
	Targets  []string `json:"targets,omitempty" doc:"NBD URIs that a proxy passes calls on to"`
	QoS      string   `json:"qos,omitempty" enum:"ready,less" doc:"ready: the network keeps the classes apart; less: background makes room here"`
	Limits   *Limits  `json:"limits,omitempty" doc:"limits of background and write-back, at a frontend"`
	// ListenBackground and ListenWriteBack are extra ports of a backend.
	ListenBackground string `json:"listen_background,omitempty" doc:"address a backend listens on for background"`
	ListenWriteBack  string `json:"listen_writeback,omitempty" doc:"address a backend listens on for write-back"`
}

// QoS modes: Node.QoS.
const (
	QoSReady = "ready" // the network keeps the classes apart, by port or mark
	QoSLess  = "less"  // it does not: background makes room by itself
)

// Codec counts the chunks that were sent in one packed form.
type Codec struct {
	Codec       string `json:"codec" enum:"raw,zstd,s2,zeros,signature,bundle,zstd-x86"`
	Chunks      int64  `json:"chunks"`
	PlainBytes  int64  `json:"plain_bytes"`
	PackedBytes int64  `json:"packed_bytes"`
}

// Limits bound background and write-back of all volumes of a node together.
type Limits struct {
	Rules []string     `json:"rules" doc:"as they were given: [CLASS][@HH:MM-HH:MM]=RATE"`
	Now   []LimitInUse `json:"now" doc:"what is in force"`
}

// LimitInUse is the limit of a class now.
type LimitInUse struct {
	Class     string `json:"class" enum:"all,background,writeback" doc:"all: background and write-back together"`
	RateBytes int64  `json:"rate_bytes" doc:"bytes a second, 0 for no limit"`
	Rule      string `json:"rule,omitempty" doc:"the rule that says so"`
	Until     string `json:"until,omitempty" doc:"when another rule holds, RFC 3339; empty: not foreseen"`
}

// LimitsRequest replaces the limits of a node until it is restarted.
type LimitsRequest struct {
	Rules []string `json:"rules" doc:"[CLASS][@HH:MM-HH:MM]=RATE; none for no limit"`
}

// Sending is how a backend sends and reads: the limits that background is
// held to, and where it stands. It is of all volumes together.
type Sending struct {
	QoS                  string  `json:"qos" enum:"ready,less"`
	Queued               int64   `json:"queued" doc:"chunks asked for that wait to be read"`
	QueuedBackground     int64   `json:"queued_background" doc:"background chunks among them"`
	Reads                int64   `json:"reads" doc:"source reads under way"`
	ReadsLimit           int64   `json:"reads_limit" doc:"source reads that may be under way"`
	BackgroundReads      int64   `json:"background_reads" doc:"background reads under way"`
	BackgroundReadsLimit int64   `json:"background_reads_limit" doc:"background reads that may be under way; less while a source is busy"`
	BackgroundReadsFloor int64   `json:"background_reads_floor" doc:"background reads that always may"`
	SourceReadUs         int64   `json:"source_read_us" doc:"what reads of the busiest source take, lately"`
	SendQueueBytes       int64   `json:"send_queue_bytes" doc:"read and not yet sent"`
	PaceBytes            int64   `json:"pace_bytes" doc:"bytes a second that background is sent with at most, with demand's; 0 when unknown"`
	QueueUs              int64   `json:"queue_us" doc:"longest queue seen on the way to a frontend"`
	QueueTargetUs        int64   `json:"queue_target_us" doc:"queue that is aimed at there"`
	FloorUs              int64   `json:"floor_us" doc:"a background chunk waits no longer for demand, where the way carries sixteen times that"`
	PackLevel            string  `json:"pack_level,omitempty" doc:"how hard background is packed for most sessions: plain, quick, fast, good, tight"`
	Codecs               []Codec `json:"codecs,omitempty" doc:"chunks sent, by codec"`
	Yields               int64   `json:"yields" doc:"times background waited for demand or its pace"`
}

// Volume is everything status shows about one volume.
type Volume struct {
	Volume     string  `json:"volume" doc:"name of the volume and of its NBD export"`
	Role       string  `json:"role" enum:"backend,frontend,proxy" doc:"of the daemon that answers"`
	Phase      string  `json:"phase" enum:"serving,starting,running,filled,converging,switched,aborted,discarded"`
	Primary    string  `json:"primary" enum:"source,target" doc:"which side holds the volume"`
	SizeBytes  int64   `json:"size_bytes"`
	ChunkBytes int64   `json:"chunk_bytes"`
	Source     string  `json:"source,omitempty" doc:"where the bytes come from"`
	Backend    string  `json:"backend,omitempty" doc:"address of the backend that owns the source, at a frontend"`
	ReadOnly   bool    `json:"read_only,omitempty"`
	Waiting    string  `json:"waiting,omitempty" doc:"what the workload or the daemon waits for, empty when nothing"`
	Clients    int     `json:"clients" doc:"connected NBD clients, or sessions at a backend"`
	Chunks     Chunks  `json:"chunks"`
	WAN        WAN     `json:"wan"`
	Demand     Demand  `json:"demand"`
	Fill       Fill    `json:"fill"`
	StoreBytes int64   `json:"store_bytes" doc:"bytes the site's store takes, all volumes together"`
	Store      Store   `json:"store"`
	Dedup      Dedup   `json:"dedup"`
	Cache      Cache   `json:"cache"`
	Journal    Journal `json:"journal"`
	Cutover    Cutover `json:"cutover"`

	Replica   *Replica   `json:"replica,omitempty" doc:"the pair of frontends, at one that has an arbiter"`
	Writeback *Writeback `json:"writeback,omitempty" doc:"what becomes of the workload's changes at the source"`
	Abort     *Abort     `json:"abort,omitempty" doc:"an abort under way or done"`
	Failover  *Failover  `json:"failover,omitempty" doc:"at a proxy: which target serves"`
	Sending   *Sending   `json:"sending,omitempty" doc:"at a backend: what is read and sent, of all volumes together"`
	Clones    []string   `json:"clones,omitempty" doc:"at a backend: test clones that read the source"`

	FileSystems []FileSystem `json:"file_systems,omitempty" doc:"at a backend: what was found on the source"`
	Limits      []LimitInUse `json:"limits,omitempty" doc:"limits of the node that are in force"`

	Warnings []string `json:"warnings,omitempty"`
}

// Chunks counts the volume map; untouched, free, held, zero and modified sum to the volume.
type Chunks struct {
	Untouched int64 `json:"untouched" doc:"only the source has them, without those that are free"`
	Free      int64 `json:"free" doc:"only the source has them, whose file systems do not use them: they are left there"`
	Held      int64 `json:"held" doc:"kept here, verified"`
	Zero      int64 `json:"zero" doc:"known to read as zeros"`
	Modified  int64 `json:"modified" doc:"written by the workload"`
	Absent    int64 `json:"absent" doc:"still to be fetched, wholly or in part"`
	Corrupt   int64 `json:"corrupt" doc:"found damaged since start, and fetched again"`
}

// FileSystem is what a backend found in a partition of a source, or on the
// whole of it.
type FileSystem struct {
	OffsetBytes int64  `json:"offset_bytes"`
	SizeBytes   int64  `json:"size_bytes" doc:"of the partition"`
	Partition   string `json:"partition,omitempty" doc:"its name or type in the partition table"`
	Type        string `json:"type,omitempty" doc:"ext4, xfs, ntfs, or what else it looks like"`
	Label       string `json:"label,omitempty"`
	UUID        string `json:"uuid,omitempty"`
	FreeBytes   int64  `json:"free_bytes" doc:"that it did not use when the source was opened"`
	Reason      string `json:"reason,omitempty" doc:"why none of it is left out with --skip-free, empty when it is"`
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

	InFlight      int64 `json:"in_flight" doc:"chunks asked for and not here yet"`
	InFlightLimit int64 `json:"in_flight_limit" doc:"so many may be asked for at a time"`
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
	InFlightBytes  int64   `json:"in_flight_bytes" doc:"background bytes in flight, estimated; window_bytes is their limit"`
	Requests       int64   `json:"requests" doc:"background requests under way"`
	RequestsFloor  int64   `json:"requests_floor" doc:"so many may always be under way, whatever else is going on"`
	Queued         int64   `json:"queued" doc:"background chunks that wait to be asked for"`
	CursorChunk    int64   `json:"cursor_chunk" doc:"where the sweep stands in the volume"`
	QueueDelayUs   int64   `json:"queue_delay_us" doc:"how much longer answers take than the fastest of late"`
}

// Store is the site's chunk store.
type Store struct {
	Chunks     int64 `json:"chunks"`
	PlainBytes int64 `json:"plain_bytes"`
	Packs      int64 `json:"packs"`
	Corrupt    int64 `json:"corrupt"`
}

// Dedup is what did not have to cross the link because the site held it.
type Dedup struct {
	Domain       string `json:"domain,omitempty" doc:"volumes share chunks inside one dedup domain only; empty: the common one"`
	Chunking     string `json:"chunking,omitempty" doc:"fixed or content, at a backend"`
	Chunks       int64  `json:"chunks" doc:"chunks that came as a signature alone, asked or unasked; at a backend, sent to all frontends"`
	Repairs      int64  `json:"repairs" doc:"signatures of chunks that were not held, whose bytes had to be asked for"`
	KnownChunks  int64  `json:"known_chunks" doc:"at a backend: chunks of the source whose content is known"`
	HashedBytes  int64  `json:"hashed_bytes" doc:"at a backend: plain bytes that a signature was computed of, for all volumes"`
	Scan         string `json:"scan,omitempty" doc:"at a backend: stopped, running, holding or done, of the scan that learns signatures ahead"`
	EvictedBytes int64  `json:"evicted_bytes" doc:"dropped from the store to keep to its limit"`
	LimitBytes   int64  `json:"limit_bytes" doc:"limit of the store, 0 for none"`
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

// Replica is a frontend's part in the pair that holds the volume.
type Replica struct {
	Role        string `json:"role" doc:"primary, secondary, joining, alone"`
	Arbiter     string `json:"arbiter,omitempty" doc:"address of who decides which frontend is primary, at a frontend"`
	Peer        string `json:"peer,omitempty" doc:"name of the other frontend"`
	Epoch       uint64 `json:"epoch" doc:"who has a lower one is fenced"`
	InSync      bool   `json:"in_sync" doc:"both frontends hold every acknowledged write"`
	Mode        string `json:"mode,omitempty" doc:"replicated, degraded, waiting, forwarding"`
	Reason      string `json:"reason,omitempty" doc:"why it is not in sync, or what writes wait for"`
	ResyncBytes int64  `json:"resync_bytes" doc:"still to be copied to the peer"`
	FromPeer    int64  `json:"from_peer" doc:"chunks that came from the peer rather than over the WAN"`
}

// Writeback is what becomes of the workload's changes at the source.
type Writeback struct {
	Policy         string  `json:"policy" doc:"write-back, isolated"`
	UnwrittenBytes int64   `json:"unwritten_bytes" doc:"changed here and not yet in a checkpoint that is stored at the source's site"`
	OldestS        float64 `json:"oldest_s" doc:"age of the oldest unwritten change, 0 when there is none"`
	LastCheckpoint string  `json:"last_checkpoint,omitempty" doc:"when the last stored checkpoint was cut, RFC 3339; empty when there is none"`
	LastID         uint64  `json:"last_id,omitempty" doc:"number of that checkpoint"`
	RPOS           float64 `json:"rpo_s" doc:"how far back the source would be if the target site were lost now"`
	State          string  `json:"state,omitempty" doc:"idle, cutting, sending, applying, waiting, stopped"`
	Reason         string  `json:"reason,omitempty" doc:"what it waits for"`
}

// Abort is the calling off of a move.
type Abort struct {
	State          string  `json:"state" doc:"draining, releasing, aborted, failed"`
	Forced         bool    `json:"forced" doc:"the source is left at its last checkpoint"`
	RemainingBytes int64   `json:"remaining_bytes" doc:"still to be written to the source"`
	LastCheckpoint string  `json:"last_checkpoint,omitempty" doc:"what the source holds: when that checkpoint was cut, RFC 3339"`
	LastID         uint64  `json:"last_id,omitempty" doc:"number of that checkpoint"`
	Loss           string  `json:"loss,omitempty" doc:"with force: what the source has and what it lacks, in words"`
	LostBytes      int64   `json:"lost_bytes" doc:"changes that the source will never have; with force only, -1 when nobody knows"`
	LostS          float64 `json:"lost_s" doc:"over how many seconds before the abort they were made, -1 when nobody knows"`
	Error          string  `json:"error,omitempty"`
}

// Failover is how a proxy reaches a volume.
type Failover struct {
	Target    string           `json:"target,omitempty" doc:"the one that serves, empty when none does"`
	Targets   []FailoverTarget `json:"targets" doc:"in the order they are tried"`
	Waiting   int64            `json:"waiting" doc:"calls under way"`
	Moves     int64            `json:"moves" doc:"changes from one target to another, or to the same one anew"`
	Repeated  int64            `json:"repeated" doc:"calls that were sent again to another target"`
	Stalls    int64            `json:"stalls" doc:"times a target answered nothing for too long"`
	LongestUs int64            `json:"longest_us" doc:"longest time without any target"`
}

// FailoverTarget is one way to a volume.
type FailoverTarget struct {
	Target string `json:"target" doc:"NBD URI"`
	State  string `json:"state" doc:"serving, standby, trying, failed, refused"`
	Error  string `json:"error,omitempty" doc:"why it was left, or what is wrong with it"`
}

// AbortRequest calls a move off.
type AbortRequest struct {
	Force bool `json:"force,omitempty" doc:"do not wait for what is unwritten: leave the source at its last checkpoint and say what is lost"`
}

// DiscardRequest removes a test clone.
type DiscardRequest struct {
	Force bool `json:"force,omitempty" doc:"although a client is connected"`
}

// FailoverRequest hands a volume over to the other frontend.
type FailoverRequest struct {
	Force bool `json:"force,omitempty" doc:"take the volume over although this frontend may lack acknowledged writes, when the other one is lost for good"`
}

// PolicyRequest says what becomes of the workload's changes from now on.
type PolicyRequest struct {
	Policy string `json:"policy" enum:"write-back,isolated"`
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
