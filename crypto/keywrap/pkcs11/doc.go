// Package pkcs11 is the key service for keys in a PKCS#11 token: a hardware
// security module, AWS CloudHSM, a smart card, or SoftHSM.
//
// A key is named by an RFC 7512 URI (see URI). The wrapping keys are used
// where they are and never leave the token: this package makes, changes and
// reads none of them.
//
// The protocol is in this package without build tags, over a small interface
// (cryptoki) that a program written in Go implements in tests. The one real
// implementation, New, loads the vendor's shared library with cgo and exists
// only in programs built with the tag pkcs11.
//
// # Keys and versions
//
// A key is the AES secret keys of one token that match the URI's object label
// and id: usually several objects of one label, each a version of the key. The
// version's CKA_ID, in hexadecimal, is its key-material id; a version without
// an id has the material id "none". Of the versions that may encrypt and whose
// CKA_START_DATE is not in the future, the one with the latest start date wraps
// new data keys; among those of one date, the one with the largest id as a
// number. Every version that may decrypt opens what it wrapped. Rotating a key
// is making one more object of its label.
//
// A key none of whose versions may encrypt is disabled for wrapping
// (CKA_ENCRYPT false, or CKA_WRAP where data keys are wrapped with AES key
// wrap); a version whose CKA_END_DATE has passed is expired and used for
// nothing. PKCS#11 knows no waiting period before deletion.
//
// # Wrapped keys
//
//	offset  bytes  content
//	0       1      form: 1 AES-GCM, 2 AES key wrap (CKM_AES_KEY_WRAP),
//	               3 AES key wrap with padding (CKM_AES_KEY_WRAP_KWP),
//	               4 the same by its older number (CKM_AES_KEY_WRAP_PAD)
//	1       1      length of the version's CKA_ID, 0 to 64
//	2       n      CKA_ID
//	form 1:
//	2+n     12     IV
//	14+n    48     data key (32) and tag (16)
//	forms 2 to 4:
//	2+n     72…88  wrapped: data key (32) || SHA-256 of the associated data (32)
//
// The associated data are the strings "kmsfs pkcs11 data key v1" and the pairs
// of the encryption context sorted by name (name, value, …), each preceded by
// its length as uint32, big-endian, so that no two contexts have the same
// form. In form 1 they are AES-GCM's additional data. AES key wrap (RFC 3394,
// RFC 5649; NIST SP 800-38F) has none: there the hash of the associated data is
// wrapped together with the data key, under the same integrity check, and
// compared in constant time after unwrapping. Whoever moves a wrapped key to
// another context would have to find a second preimage of SHA-256 or forge the
// key wrap. AES key wrap is deterministic, which shows only that one data key
// was wrapped twice for one context.
//
// The form is chosen by the token, never by the store: AES-GCM where the token
// and the key can do it, else AES key wrap in the order of the table. Every
// form is authenticated, so a changed form byte opens nothing.
//
// The IV is 12 random bytes of the token's generator. Tokens that insist on an
// IV of their own (CloudHSM) get a zeroed buffer and have to fill it; a zero IV
// is refused. By NIST SP 800-38D a version should wrap at most 2^32 data keys:
// rotate before.
//
// # Data keys in memory
//
// Data keys come from C_GenerateRandom. The calls that carry a secret
// (C_Login, C_GenerateRandom, C_Decrypt, C_CreateObject, C_GetAttributeValue)
// write to and read from buffers of this package, which wipes them: the
// wrapper library's own copies on the C heap would stay behind. What the
// vendor's library does with them is its own affair.
package pkcs11
