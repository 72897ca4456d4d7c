// Package nameenc encrypts file names, symlink targets and extended attributes,
// and authenticates directory records: pure functions from string to string
// under the name key of one class.
//
// All encryption is AES-SIV (RFC 5297) with 64-byte keys, one per use, which
// HKDF-Expand-SHA256 makes from the class's name key with these labels:
//
//	use              label                   associated data
//	names            "kmsfs v1 name"         directory id (16 bytes)
//	symlink targets  "kmsfs v1 link"         label || nonce
//	xattr names      "kmsfs v1 xattr name"   label
//	xattr values     "kmsfs v1 xattr value"  label || uint64be(len(name)) || name || nonce
//	records (HMAC)   "kmsfs v1 record"       –
//
// Names and xattr names are padded with NUL to a multiple of 16 bytes, encrypt
// deterministically (a lookup must find them), and are written in base64url
// without padding (RFC 4648, section 5). Targets and values start with 16
// random bytes, the nonce, and are not padded; targets are base64url as well.
// Decoding accepts one spelling only, so that no name has two forms.
//
// A name opens in its directory only. Targets and attributes are not bound to
// the object that they belong to: whoever can write the store can swap those of
// two objects of one class. The format is in docs/format.md, section 10.
package nameenc
