// Package keywrap defines what a key service does for kmsfs: it makes data
// keys, wraps them, and unwraps them, each call bound to an encryption context.
//
// A key URI names the service as well as the key: an AWS key ARN or "alias/…"
// is AWS KMS, "keyring:NAME" the embedded keyring, "pkcs11:…" a token.
// Providers live in sub-packages and pass the contract suite in keywraptest;
// which of them exist is decided by the program (see Mux), never by a registry.
//
// Beyond its result a call leaves a trace of the requests that it made (see
// WithTrace), and most providers can tell whether a call would succeed without
// making it (see Checker).
package keywrap
