// Package dare seals and opens the chunks of a file and does the arithmetic
// between plaintext and store-file offsets.
//
// A plaintext is cut into chunks of one size (a power of two, MinChunk to
// MaxChunk); only the last one may be shorter, and none is empty. Every chunk
// is one complete DARE 2.0 stream of exactly one package, made and opened by
// github.com/minio/sio:
//
//	offset  bytes  content
//	0       1      version, 0x20
//	1       1      cipher suite: 0 AES-256-GCM, 1 ChaCha20-Poly1305
//	2       2      plaintext length - 1, little-endian
//	4       12     nonce, random at every seal; its first bit is the final
//	               flag and always 1, since each stream has one package
//	16      n      ciphertext
//	16+n    16     tag
//
// Every chunk has a key of its own,
//
//	HKDF-Expand-SHA256(PRK, "kmsfs v1 chunk" || uint64be(index) || last, 32)
//
// with last = 1 for the final chunk of the file and 0 for the others. DARE 2.0
// leaves the stored nonce unauthenticated and XORs the sequence number into it,
// so that under a shared key a package opens at any position once its nonce is
// fixed up; with a key per position it opens nowhere else, and a middle chunk
// is not accepted as the last one after a cut.
//
// The format is in docs/format.md, section 3; the vectors in
// testdata/vectors hold it in place.
package dare
