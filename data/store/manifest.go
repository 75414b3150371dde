package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"sort"

	"forerun/block"
	"forerun/data/store/internal/runs"
	"forerun/disk"
	"forerun/internal/chunk"
)

const (
	manifestMagic   = 0x50414d46 // "FMAP"
	manifestVersion = 2          // 1 had no key id
	manifestHeader  = 72
	manifestHeader1 = 64
	manifestRun     = 8
	manifestPack    = 40
	manifestName    = "MAP"
	manifestTemp    = "MAP.new"
	maxManifest     = 256 << 20
	flagBuilding    = 1
)

// position is a place in the log: packs below Pack, and Pack up to Off.
type position struct {
	Pack uint32
	Off  int64
}

// manifest is the root of the block map: which runs there are, and how much of
// the log is in them.
type manifest struct {
	id       storeID
	key      chunk.KeyID
	gen      uint64 // counts manifests
	nextRun  uint32
	nextPack uint32
	pos      position
	runs     []uint32 // the newest first
	packs    []packState
	building bool // the map is being built from the packs and ends at pos
}

type packState struct {
	id   uint32
	end  int64
	live tally
}

func (m *manifest) marshal() []byte {
	b := make([]byte, manifestHeader+len(m.runs)*manifestRun+len(m.packs)*manifestPack+4)
	le := binary.LittleEndian
	le.PutUint32(b[0:], manifestMagic)
	le.PutUint32(b[4:], manifestVersion)
	copy(b[8:24], m.id[:])
	le.PutUint64(b[24:], m.gen)
	le.PutUint32(b[32:], m.nextRun)
	le.PutUint32(b[36:], m.nextPack)
	le.PutUint32(b[40:], m.pos.Pack)
	le.PutUint64(b[44:], uint64(m.pos.Off))
	le.PutUint32(b[52:], uint32(len(m.runs)))
	le.PutUint32(b[56:], uint32(len(m.packs)))
	if m.building {
		le.PutUint32(b[60:], flagBuilding)
	}
	copy(b[64:72], m.key[:])
	o := manifestHeader
	for _, r := range m.runs {
		le.PutUint32(b[o:], r)
		o += manifestRun
	}
	for _, p := range m.packs {
		le.PutUint32(b[o:], p.id)
		le.PutUint64(b[o+8:], uint64(p.end))
		le.PutUint64(b[o+16:], uint64(p.live.chunks))
		le.PutUint64(b[o+24:], uint64(p.live.plain))
		le.PutUint64(b[o+32:], uint64(p.live.stored))
		o += manifestPack
	}
	le.PutUint32(b[o:], crc32.Checksum(b[:o], castagnoli))
	return b
}

func parseManifest(b []byte) (*manifest, error) {
	le := binary.LittleEndian
	if len(b) < manifestHeader1+4 || le.Uint32(b) != manifestMagic ||
		le.Uint32(b[len(b)-4:]) != crc32.Checksum(b[:len(b)-4], castagnoli) {
		return nil, fmt.Errorf("%s does not match its checksum: %w", manifestName, runs.ErrDamaged)
	}
	v := le.Uint32(b[4:])
	if v < 1 || v > manifestVersion {
		return nil, block.E("store.open", manifestName, block.KindUnsupported,
			fmt.Errorf("it has version %d, this program reads versions up to %d: use the program that wrote it", v, manifestVersion))
	}
	m := &manifest{gen: le.Uint64(b[24:]), nextRun: le.Uint32(b[32:]), nextPack: le.Uint32(b[36:]),
		pos: position{le.Uint32(b[40:]), int64(le.Uint64(b[44:]))}, building: le.Uint32(b[60:])&flagBuilding != 0}
	copy(m.id[:], b[8:24])
	nr, np := int64(le.Uint32(b[52:])), int64(le.Uint32(b[56:]))
	o := manifestHeader
	if v == 1 {
		o = manifestHeader1
	}
	if int64(len(b)) != int64(o)+nr*manifestRun+np*manifestPack+4 || m.pos.Off < 0 {
		return nil, fmt.Errorf("%s has another length than it says: %w", manifestName, runs.ErrDamaged)
	}
	if v > 1 {
		copy(m.key[:], b[64:72])
	}
	for range nr {
		m.runs = append(m.runs, le.Uint32(b[o:]))
		o += manifestRun
	}
	for range np {
		m.packs = append(m.packs, packState{le.Uint32(b[o:]), int64(le.Uint64(b[o+8:])),
			tally{int64(le.Uint64(b[o+16:])), int64(le.Uint64(b[o+24:])), int64(le.Uint64(b[o+32:]))}})
		o += manifestPack
	}
	return m, nil
}

func readManifest(fs disk.FS, dir string) (*manifest, error) {
	f, err := fs.Open(dir+"/"+manifestName, disk.Read)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if st.Size > maxManifest {
		return nil, fmt.Errorf("%s is %d bytes long: %w", manifestName, st.Size, runs.ErrDamaged)
	}
	b := make([]byte, st.Size)
	if n, err := f.ReadAt(b, 0); n < len(b) {
		return nil, err
	}
	return parseManifest(b)
}

// publish makes m durable under the manifest's name: written beside it,
// synced, renamed, the directory synced. It wants syncMu held, and the names of
// m's runs durable. After an error with maybe, either manifest may be found
// after a crash, so nothing that one of them names may be removed; both are true.
func (s *Store) publish(m *manifest) (maybe bool, err error) {
	s.mapGen++
	m.gen = s.mapGen
	temp := s.mapDir + "/" + manifestTemp
	f, err := s.fs.Open(temp, disk.Write|disk.Create|disk.Trunc)
	if err != nil {
		return false, err
	}
	_, err = f.WriteAt(m.marshal(), 0)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		s.fs.Remove(temp)
		return false, err
	}
	if err := s.fs.Rename(temp, s.mapDir+"/"+manifestName); err != nil {
		return true, err
	}
	return true, s.fs.SyncDir(s.mapDir)
}

// adopt publishes a manifest of sn and rs and makes rs the version of the map;
// it wants syncMu held. fresh, which may be nil, is the run that is new in rs. also
// runs with mu held when the manifest is durable.
func (s *Store) adopt(sn snapshot, rs []*sharedRun, fresh *runs.Run, also func()) error {
	var maybe bool
	var err error
	if fresh != nil {
		err = s.fs.SyncDir(s.mapDir)
	}
	if err == nil {
		maybe, err = s.publish(s.manifestOf(sn, rs))
	}
	if err != nil {
		if fresh != nil {
			fresh.Close()
			if !maybe {
				s.fs.Remove(fresh.Path())
			}
		}
		return fmt.Errorf("block map: %w", err)
	}
	s.mu.Lock()
	old := s.install(rs)
	also()
	s.mu.Unlock()
	s.release(old)
	return nil
}

// snapshot is the state a manifest describes, as of the last checkpoint.
type snapshot struct {
	pos      position
	nextPack uint32
	packs    []packState
	building bool
}

// snapshotLocked describes the log as it is now; it wants appendMu and mu held.
func (s *Store) snapshotLocked() snapshot {
	sn := snapshot{nextPack: s.nextPack, building: s.building, pos: position{Pack: s.nextPack}, packs: make([]packState, 0, len(s.packs))}
	if s.active != nil {
		sn.pos = position{s.active.id, s.active.end}
	}
	if s.replaying != nil {
		sn.pos = *s.replaying
	}
	for _, p := range s.packs {
		end := p.end
		if p.bad > 0 {
			end = p.bad // it will be cut there
		}
		sn.packs = append(sn.packs, packState{p.id, end, p.live})
	}
	sort.Slice(sn.packs, func(i, j int) bool { return sn.packs[i].id < sn.packs[j].id })
	return sn
}

func (s *Store) manifestOf(sn snapshot, rs []*sharedRun) *manifest {
	m := &manifest{id: s.id, key: s.opt.Key.ID(), nextRun: s.nextRun, nextPack: sn.nextPack, pos: sn.pos, building: sn.building}
	// A pack removed since: the runs may have forgotten its chunks, so it must not
	// count should a power cut bring it back.
	s.mu.RLock()
	for _, p := range sn.packs {
		if s.packs[p.id] != nil {
			m.packs = append(m.packs, p)
		}
	}
	s.mu.RUnlock()
	for _, r := range rs {
		m.runs = append(m.runs, r.ID())
	}
	return m
}

// install makes rs the version of the map once its manifest is durable, and
// lets go of runs that are in it no more. It wants mu held and returns the old
// version, to be released without mu.
func (s *Store) install(rs []*sharedRun) *version {
	old := s.ver
	s.ver = newVersion(rs)
	s.gen++
	for _, r := range old.runs {
		kept := false
		for _, q := range rs {
			kept = kept || q == r
		}
		if !kept {
			r.obsolete.Store(true)
		}
	}
	return old
}

func (s *Store) runPath(id uint32) string { return fmt.Sprintf("%s/%08x.run", s.mapDir, id) }

// mapLost says whether an error of reading the map means that it is not there
// or damaged, so that the packs have to tell; others are reasons to give up.
func mapLost(err error) bool {
	return block.KindOf(err) == block.KindNotFound || errors.Is(err, runs.ErrDamaged)
}
