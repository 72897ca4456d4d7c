package envelope

import "crypto/sha256"

// maxMACed bounds the message of hmacSHA256, in bytes: the longest is what a
// branch derives a wrapping key from, for a class of the greatest length.
const maxMACed = len(branchInfo) + 2*len(ID{}) + MaxClass + 1

// hmacSHA256 sets out to the HMAC-SHA256 (RFC 2104) of a short message under a
// key of at most one block. crypto/hmac and crypto/hkdf leave the key, the
// padded key and the message in garbage on the heap, where a search of the
// memory finds them long after; here they are on the stack, and wiped. The
// result goes through a pointer because returned values leave copies on the
// way. It panics on longer arguments: lengths are decided by code.
func hmacSHA256(out *[sha256.Size]byte, key, message []byte) {
	// The stack grows now or not at all: growing copies it, and gives the old
	// one back as it is.
	_ = scrubStack(len(key))
	hmacOnStack(out, key, message)
	// What sha256 copied to its own frames lies below this one.
	_ = scrubStack(len(message))
}

//go:noinline
func hmacOnStack(out *[sha256.Size]byte, key, message []byte) {
	var inner [sha256.BlockSize + maxMACed]byte
	var outer [sha256.BlockSize + sha256.Size]byte
	defer clear(inner[:])
	defer clear(outer[:])
	if len(key) > sha256.BlockSize || len(message) > maxMACed {
		panic("envelope: HMAC of something long")
	}
	copy(inner[:], key)
	for i := range sha256.BlockSize {
		outer[i] = inner[i] ^ 0x5c
		inner[i] ^= 0x36
	}
	n := copy(inner[sha256.BlockSize:], message)
	*out = sha256.Sum256(inner[:sha256.BlockSize+n])
	copy(outer[sha256.BlockSize:], out[:])
	*out = sha256.Sum256(outer[:])
}

// scrubStack overwrites the stack below its caller. The index makes the
// compiler keep the array.
//
//go:noinline
func scrubStack(i int) byte {
	var b [4 << 10]byte
	return b[i&(len(b)-1)]
}
