package frontend

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"forerun/block"
	"forerun/data/store"
	"forerun/data/wire"
	"forerun/disk"
	"forerun/internal/chunk"
)

// domain is one store of chunks and what backends are told of it. Volumes of
// one domain share what they hold; between domains nothing is shared, and their
// signatures are made with different keys, so nothing can be compared.
type domain struct {
	name  string // empty for the common one
	key   chunk.Key
	store *store.Store
	site  *wire.Site
}

// ParseDomain reads VOLUME=DOMAIN.
func ParseDomain(s string) (volume, name string, err error) {
	volume, name, ok := strings.Cut(s, "=")
	if !ok || volume == "" || name == "" {
		return "", "", fmt.Errorf("--domain %q is not VOLUME=DOMAIN; example: web=customer7", s)
	}
	return volume, name, nil
}

func checkDomain(name string) error {
	if name == "" || len(name) > 64 || strings.Trim(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") != "" || strings.HasPrefix(name, ".") {
		return fmt.Errorf("the domain's name %q: 1 to 64 letters, digits, dots, dashes and underscores, and no dot in front", name)
	}
	return nil
}

// openDomains opens the store of every domain that a volume of this node is in.
func (f *Frontend) openDomains() error {
	f.domains = map[string]*domain{}
	for _, v := range f.cfg.Volumes {
		name := f.cfg.Domains[v]
		if f.domains[name] != nil {
			continue
		}
		d, err := f.openDomain(name)
		if err != nil {
			return err
		}
		f.domains[name] = d
	}
	return nil
}

func (f *Frontend) openDomain(name string) (*domain, error) {
	d := &domain{name: name}
	dir := filepath.Join(f.cfg.StateDir, "store")
	if name != "" {
		at := filepath.Join(f.cfg.StateDir, "domains", name)
		if err := f.fs.MkdirAll(at); err != nil {
			return nil, block.E("domain", at, block.KindNone, err)
		}
		var err error
		if d.key, err = domainKey(f.fs, filepath.Join(at, "key")); err != nil {
			return nil, fmt.Errorf("domain %s: %w", name, err)
		}
		dir = filepath.Join(at, "store")
	}
	d.site = wire.NewSite(d.key, func(each func(chunk.Sig) bool) error { return d.store.Each(each) })
	var err error
	d.store, err = store.Open(f.fs, dir, store.Options{Log: f.log, Key: d.key, LimitBytes: f.cfg.StoreLimit,
		OnAdd: d.site.Added, OnGone: d.site.Gone})
	return d, err
}

// domainKey reads the key of a domain, 64 hexadecimal digits and a line end,
// and makes one the first time.
func domainKey(fs disk.FS, name string) (key chunk.Key, err error) {
	b := make([]byte, 2*len(key)+1)
	file, err := fs.Open(name, disk.Read)
	switch {
	case err == nil:
		n, _ := file.ReadAt(b, 0) // what is short is no key
		if err := file.Close(); err != nil {
			return key, block.E("domain.key", name, block.KindIO, err)
		}
		raw, err := hex.DecodeString(strings.TrimSuffix(string(b[:n]), "\n"))
		if err != nil || len(raw) != len(key) || key == chunk.Key(raw) {
			return key, block.E("domain.key", name, block.KindCorrupt,
				errors.New("the file does not hold a key of 64 hexadecimal digits; without its key the domain's store is worth nothing: restore the file, or remove the domain's directory to begin anew"))
		}
		return chunk.Key(raw), nil
	case block.KindOf(err) != block.KindNotFound:
		return key, block.E("domain.key", name, block.KindNone, err)
	}
	rand.Read(key[:]) // never fails, see its documentation
	if err := disk.PublishBytes(fs, name, []byte(hex.EncodeToString(key[:])+"\n")); err != nil {
		return key, block.E("domain.key", name, block.KindNone, err)
	}
	return key, nil
}

func (f *Frontend) closeDomains() error {
	var errs []error
	for _, d := range f.domains {
		errs = append(errs, d.store.Close())
	}
	return errors.Join(errs...)
}

// domain is that of a volume of this node.
func (f *Frontend) domain(volume string) *domain { return f.domains[f.cfg.Domains[volume]] }

// full says whether a store with a limit has reached it: what the fill brought
// then would push out what workloads have read. A quarter of a second's
// figures do.
func (d *domain) full(limit int64) func() string {
	if limit == 0 {
		return nil
	}
	var mu sync.Mutex
	var at time.Time
	var why string
	return func() string {
		mu.Lock()
		defer mu.Unlock()
		if now := time.Now(); now.Sub(at) > time.Second/4 {
			at, why = now, ""
			if st := d.store.Stats(); st.EvictedBytes > 0 || st.DiskBytes > limit-limit/8 {
				why = fmt.Sprintf("the store has reached its limit of %d bytes; what is not here is read from the source when it is needed", limit)
			}
		}
		return why
	}
}
