package chunk

import "crypto/sha256"

// Key separates dedup domains: signatures under different keys have nothing
// to do with each other, so who can see one domain's learns nothing of another's
// content. The zero Key is the common domain, whose signatures are plain SHA-256.
type Key [32]byte

var common Key // nobody writes it

// Of turns the SHA-256 of some bytes into their signature under k:
// HMAC-SHA256 (RFC 2104) of it, or itself with the zero Key. So bytes are
// hashed once, whatever the number of domains.
func (k *Key) Of(plain Sig) Sig {
	if *k == (Key{}) {
		return plain
	}
	// By hand, because crypto/hmac allocates and every chunk that is read
	// comes through here: a key shorter than a block is padded with zeros.
	const block = sha256.BlockSize
	var b [block + SigLen]byte
	for i := range block {
		b[i] = 0x36
	}
	for i, c := range k {
		b[i] ^= c
	}
	copy(b[block:], plain[:])
	inner := sha256.Sum256(b[:])
	for i := range block {
		b[i] ^= 0x36 ^ 0x5c
	}
	copy(b[block:], inner[:])
	return sha256.Sum256(b[:])
}

// Sum computes the signature of plain bytes under k.
func (k *Key) Sum(plain []byte) Sig { return k.Of(Sum(plain)) }

// recipeSum computes the signature of a recipe under k. The complement makes
// it another function than Sum: plain bytes with the signature of a recipe are
// as hard to find as two with one signature.
func (k *Key) recipeSum(recipe []byte) Sig {
	s := Sum(recipe)
	for i := range s {
		s[i] = ^s[i]
	}
	return k.Of(s)
}

// Algo is the algorithm byte of signatures under k.
func (k *Key) Algo() uint8 {
	if *k == (Key{}) {
		return AlgoSHA256
	}
	return AlgoHMAC
}

// KeyID tells keys apart where the key itself must not stand. That of the zero
// Key is zero.
type KeyID [8]byte

// ID is the first bytes of the SHA-256 of "forerun key id" and the key.
func (k *Key) ID() (id KeyID) {
	if *k != (Key{}) {
		s := Sum(append([]byte("forerun key id"), k[:]...))
		copy(id[:], s[:])
	}
	return id
}
