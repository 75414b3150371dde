package chunk

import (
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"testing"
)

func testKey() *Key {
	var k Key
	for i := range k {
		k[i] = byte(7*i + 1)
	}
	return &k
}

func TestKeyIsHMAC(t *testing.T) {
	k := testKey()
	for name, plain := range samples() {
		h := hmac.New(sha256.New, k[:])
		d := sha256.Sum256(plain)
		h.Write(d[:])
		if got := k.Sum(plain); got != Sig(h.Sum(nil)) {
			t.Errorf("%s: %s is not HMAC-SHA256 of the SHA-256", name, got)
		}
		if (&Key{}).Sum(plain) != d {
			t.Errorf("%s: the common domain's signature is not SHA-256", name)
		}
	}
	plain := samples()["short"]
	if n := testing.AllocsPerRun(100, func() { k.Sum(plain) }); n != 0 {
		t.Errorf("%v allocations for a signature", n)
	}
}

func TestDomainsDoNotOpenEachOther(t *testing.T) {
	plain := samples()["text"]
	a, b := testKey(), testKey()
	b[31]++
	dst := make([]byte, len(plain))
	keys := []*Key{{}, a, b}
	for i, from := range keys {
		p := SealUnder(from, nil, plain, S2)
		for j, to := range keys {
			if err := p.OpenUnder(to, dst); (err == nil) != (i == j) || err != nil && !errors.Is(err, ErrMismatch) {
				t.Errorf("sealed under key %d, opened under key %d: %v", i, j, err)
			}
		}
	}
	if a.ID() == b.ID() || a.ID() == (KeyID{}) || (&Key{}).ID() != (KeyID{}) {
		t.Error("key ids do not tell keys apart")
	}
	if a.Algo() != AlgoHMAC || (&Key{}).Algo() != AlgoSHA256 {
		t.Error("algorithm bytes are wrong")
	}
}
