// Package hsm tests kmsfs with keys in a PKCS#11 token: the program built with
// the tag pkcs11, real mounts, and SoftHSM2. It runs with that tag only (make
// integration-pkcs11), since it needs a C compiler.
package hsm
