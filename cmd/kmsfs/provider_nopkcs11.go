//go:build !pkcs11 || !cgo

package main

import (
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// hasPKCS11 is whether this program can use pkcs11: keys.
const hasPKCS11 = false

// openPKCS11 says that this program is the static one.
func openPKCS11(providerConfig) (keywrap.Provider, func(), error) {
	return nil, nil, fail(keywrap.ErrUnsupported, "this kmsfs was built without PKCS#11, which pkcs11: keys need",
		"build it with make build-pkcs11, or install that build")
}
