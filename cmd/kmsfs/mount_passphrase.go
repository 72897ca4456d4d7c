package main

import (
	"context"
	"errors"

	"github.com/kmsfs/kmsfs/crypto/keywrap/keyring"
)

var errProtected = errors.New("the keyring is protected")

// mountPassphrase gets the passphrase that a mount needs, if it needs one, while
// there is a terminal to ask on. A passphrase file is left to the serving
// process, which reads it again when the passphrase was changed.
func (a *app) mountPassphrase(ctx context.Context, p *mountPlan) ([]byte, error) {
	if p.PassFile != "" || !schemes(allKeys(p.Keys))["keyring"] {
		return nil, nil
	}
	k, err := keyring.Open(p.Provider.Keyring, func() ([]byte, error) { return nil, errProtected })
	if err == nil {
		return nil, k.Close()
	}
	if !errors.Is(err, errProtected) {
		return nil, nil // the serving process meets the same error, and decides
	}
	return a.passphraseSource(ctx)()
}

// passphraseSource returns where the serving process has the passphrase from:
// the file, or what was handed to it, once.
func (p *mountPlan) passphraseSource(given []byte) func() ([]byte, error) {
	if p.PassFile != "" {
		return func() ([]byte, error) { return passphraseFromFile(p.PassFile) }
	}
	if len(given) == 0 {
		return nil
	}
	return once(func() ([]byte, error) {
		defer clear(given)
		return append([]byte(nil), given...), nil
	})
}
