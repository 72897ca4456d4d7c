package main

import (
	"context"
	"errors"

	"github.com/kmsfs/kmsfs/crypto/keywrap/limit"
	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

// inspectStore reads what the store says about itself. Nothing in it is
// verified yet.
func inspectStore(path string) (*cryptfs.Info, storeFacts, error) {
	real, err := storePath(path)
	if err != nil {
		return nil, storeFacts{}, err
	}
	info, err := cryptfs.Inspect(real)
	if err != nil {
		if errors.Is(err, cryptfs.ErrNoStore) {
			err = fail(err, path+" is not a kmsfs store", "give the directory that kmsfs init made, not the mountpoint")
		}
		return nil, storeFacts{}, err
	}
	return info, storeFacts{id: info.ID.String(), path: real, keys: info.Keys}, nil
}

// trustedStore is inspectStore for a store that this machine trusts; trust
// says whether a new one is accepted.
func (a *app) trustedStore(ctx context.Context, path string, trust bool) (storeFacts, error) {
	_, facts, err := inspectStore(path)
	if err != nil {
		return facts, err
	}
	return facts, a.mustTrust(ctx, facts, trust)
}

// mustTrust is checkTrust with the stores that this machine knows.
func (a *app) mustTrust(ctx context.Context, facts storeFacts, trust bool) error {
	file, err := a.global.knownStoresPath()
	if err != nil {
		return err
	}
	known, err := loadKnownStores(file)
	if err != nil {
		return err
	}
	return a.checkTrust(ctx, known, facts, trust)
}

// openOptions are the options of every command that opens a store.
type openOptions struct {
	store    string
	trust    bool
	readOnly bool
}

// volume is an open store with its key services.
type volume struct {
	*cryptfs.Volume
	providers *providers
}

// Close closes the store, then the key services.
func (v *volume) Close() error {
	err := v.Volume.Close()
	v.providers.Close()
	return err
}

// openStore opens a store for a command: trust, passphrase, key services,
// verification, and the note of it in the known-stores file.
func (a *app) openStore(ctx context.Context, o openOptions) (*volume, error) {
	return a.openStoreWith(ctx, o, nil)
}

// openStoreWith is openStore with the key services of further keys.
func (a *app) openStoreWith(ctx context.Context, o openOptions, more []string) (*volume, error) {
	facts, err := a.trustedStore(ctx, o.store, o.trust)
	if err != nil {
		return nil, err
	}
	cfg, err := a.global.providerConfig()
	if err != nil {
		return nil, err
	}
	knownStores, err := a.global.knownStoresPath()
	if err != nil {
		return nil, err
	}
	p, err := openProviders(ctx, cfg, append(allKeys(facts.keys), more...), a.passphraseSource(ctx), a.log())
	if err != nil {
		return nil, err
	}
	return openVolume(ctx, facts, p, cryptfs.Config{ReadOnly: o.readOnly, Recover: true, Log: a.log()}, knownStores)
}

// openVolume opens a store whose facts are trusted, and takes over p; c says how,
// and gets the rest here. It pins the facts once the store's record is verified:
// not before, so that a forged record which the user accepted and which no key
// opens leaves no trace.
func openVolume(ctx context.Context, facts storeFacts, p *providers, c cryptfs.Config, knownStores string) (*volume, error) {
	c.Store, c.Provider, c.Keys, c.SameKey, c.Background = facts.path, p, facts.keys, p.sameKey, limit.Background
	v, err := cryptfs.Open(ctx, c)
	if err != nil {
		p.Close()
		return nil, err
	}
	out := &volume{Volume: v, providers: p}
	if v.Info().ID.String() != facts.id { // another store with the same keys took the path meanwhile
		return nil, errors.Join(fail(errNotTrusted, facts.path+" changed while it was opened", "try again"), out.Close())
	}
	if err := pinStore(knownStores, facts, false); err != nil {
		return nil, errors.Join(hint(err, "give a known-stores file that can be written: --known-stores FILE"), out.Close())
	}
	return out, nil
}
