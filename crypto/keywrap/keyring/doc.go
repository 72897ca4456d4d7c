// Package keyring is the embedded key service: named AES-256-GCM keys in one
// local file, with the semantics of AWS KMS (versions, states, a waiting
// period before deletion, an encryption context that must match).
//
// # What it protects
//
// The file's keys are as secret as the file. Without a passphrase the key
// material lies in it in clear, mode 0600, and whoever reads the file (root, a
// backup, a stolen disk) opens every store made with it: see
// UnprotectedWarning. With a passphrase the keys are sealed under it, and an
// attacker with a copy can only guess. States and deletion dates are rules that
// this package follows, not a barrier: an older copy of the file still has the
// keys.
//
// # Keys in memory
//
// Key versions are tink keysets. Tink keeps key bytes in ordinary Go memory
// behind types that do not print them, and offers neither locking nor wiping;
// the same holds for the buffers of encoding/json. This package wipes the
// buffers it owns (file contents, opened body, serialized keysets), drops
// keysets as soon as the file changes, and keeps data keys, the passphrase's
// key and nothing else in keymem. Processes that must not be dumped or swapped
// have to see to that themselves.
//
// # File format, version 1
//
// One JSON object of at most 4 MiB. Byte strings are standard base64, times RFC
// 3339 in UTC, unknown members are refused. Members:
//
//	format      "kmsfs-keyring"
//	version     1
//	keys        without a passphrase: the keys
//	protection  with one: kdf "argon2id", salt (16 to 64 bytes), time (passes,
//	            1 to 16), memory_kib (8*threads to 1,048,576), threads (1 to
//	            16), cipher "AES256-GCM"
//	sealed      with one: nonce (12 bytes), ciphertext and tag (16 bytes) of the
//	            JSON object {"keys": …}
//
// The sealing key is Argon2id (RFC 9106) of the passphrase, 32 bytes. The
// associated data are the strings "kmsfs keyring body v1", kdf, salt, the
// three work factors in decimal, and cipher, each preceded by its length as
// uint32, big-endian. A key has the members name, state (enabled, disabled,
// pending-deletion), created, rotated (if ever), deletion_at (pending deletion
// only) and keyset: a serialized tink Keyset (binary protobuf) whose keys are
// enabled AesGcmKeys of 32 bytes with TINK prefix. Each is one version, the
// primary one the newest; the material id is its key id in eight hexadecimal
// digits.
//
// # Wrapped keys
//
// A wrapped data key is a version byte 0x01 and tink's ciphertext: 0x01, key id
// (4 bytes), nonce (12), data key (32), tag (16); 66 bytes in all. The associated
// data are the strings "kmsfs keyring data key v1", the key's name, and the
// pairs of the encryption context sorted by name (name, value, …), each
// preceded by its length as uint32, big-endian, so that no two contexts have
// the same form.
package keyring
