//go:build pkcs11 && cgo

package main

import (
	"errors"
	"fmt"

	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/crypto/keywrap/pkcs11"
)

// hasPKCS11 is whether this program can use pkcs11: keys.
const hasPKCS11 = true

// openPKCS11 opens the PKCS#11 module. The token is not asked yet.
func openPKCS11(cfg providerConfig) (keywrap.Provider, func(), error) {
	if cfg.PKCS11Module == "" {
		return nil, nil, fail(pkcs11.ErrNoModule, "the store has pkcs11: keys, and no PKCS#11 module is given",
			"give the vendor's library with --pkcs11-module FILE (KMSFS_PKCS11_MODULE)")
	}
	p, err := pkcs11.New(pkcs11.Options{Module: cfg.PKCS11Module, PIN: cfg.pkcs11PIN(), PINFile: cfg.PKCS11PINFile})
	if errors.Is(err, pkcs11.ErrModule) {
		return nil, nil, fail(err, fmt.Sprintf("PKCS#11 module %s: %v", cfg.PKCS11Module, err),
			"give the vendor's library with --pkcs11-module FILE; its own configuration must be in this environment")
	}
	if err != nil {
		return nil, nil, err
	}
	return p, func() { _ = p.Close() }, nil
}

// pkcs11PIN returns where the token's PIN comes from, or nil if there is none.
// A file is read at every login, so that a changed PIN is found.
func (c *providerConfig) pkcs11PIN() func() ([]byte, error) {
	switch {
	case c.PKCS11PINFile != "":
		return func() ([]byte, error) { return passphraseFromFile(c.PKCS11PINFile) }
	case c.PKCS11PIN != "":
		return func() ([]byte, error) { return []byte(c.PKCS11PIN), nil }
	}
	return nil
}
