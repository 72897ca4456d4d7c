// Package rewrap tells which keys the files of a store depend on, and gives
// files other recipients. It looks at the ciphertext tree as it lies on the disk:
// it needs no key, no key service and no mount for that, and works beside a
// mount.
//
// Nothing that it reads is authenticated. Whoever can write the store can make
// a key look needed, or its dependents look away by damaging their headers,
// which is reported; the keys that it wraps for are those that the caller has
// pinned for the store's classes, and no others.
//
// New recipients come from ReEncrypt alone (envelope.Manager.Rewrap). Only the
// recipients of a header change. Headers are written by a Writer: Locked for a
// store that nobody has mounted; the daemon writes those of a mounted one, see
// cryptfs.
package rewrap
