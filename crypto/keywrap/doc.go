// Package keywrap defines what a key service does for kmsfs: it makes data
// keys, wraps them, and unwraps them, each call bound to an encryption context.
//
// A key URI names the service as well as the key: an AWS key ARN or "alias/…"
// is AWS KMS, "keyring:NAME" the embedded keyring. Providers live in
// sub-packages and pass the contract suite in keywraptest; which of them exist
// is decided by the program (see Mux), never by a registry.
package keywrap
