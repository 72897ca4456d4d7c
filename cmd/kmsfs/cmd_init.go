package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/fs/classify"
	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

// defaultClass is the class of a store that was made without a policy file.
const defaultClass = "general"

type initOptions struct {
	store      string
	keys       []string
	policy     string
	placement  string
	suite      string
	headerSize int
	names      string
	chunkSize  string
	protect    bool
	json       bool
}

func newInitCommand(a *app) *cobra.Command {
	var o initOptions
	cmd := &cobra.Command{
		Use:   "init STORE",
		Short: "Make a store",
		Long: `Make a store in a new or empty directory.

Without --key and --policy the store has one class, general, under the key
keyring:general of the embedded keyring; the keyring file and the key are made
if they do not exist. The store's keys are noted in the known-stores file.`,
		Example: `  kmsfs init ~/store
  kmsfs init --key alias/files --key keyring:recovery ~/store
  kmsfs init --policy policy.yaml --placement sidecar ~/store`,
		Args: operands("STORE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.store = args[0]
			for _, of := range []string{"key", "names", "chunk-size"} {
				if err := exclusive(cmd, "policy", of); err != nil {
					return err
				}
			}
			return a.runInit(cmd.Context(), o)
		},
	}
	f := cmd.Flags()
	f.StringArrayVar(&o.keys, "key", nil, "key `URI` of the one class: ARN, alias/NAME or keyring:NAME; repeat for further recipients")
	f.StringVar(&o.policy, "policy", "", "policy `FILE` (YAML) with classes and rules; - is standard input")
	f.StringVar(&o.placement, "placement", "header", "where headers live: header, xattr or sidecar")
	f.StringVar(&o.suite, "suite", dare.AES256GCM.String(), "cipher suite: aes-256-gcm or chacha20-poly1305")
	f.IntVar(&o.headerSize, "header-size", envelope.DefaultHeader, "bytes of a header block, a power of two from 512 to 8192")
	f.StringVar(&o.names, "names", string(classify.NamesEncrypted), "file names of the one class: encrypted or plain")
	f.StringVar(&o.chunkSize, "chunk-size", "16KiB", "plaintext `SIZE` of a chunk of the one class, a power of two from 4KiB to 64KiB")
	f.BoolVar(&o.protect, "passphrase", false, "protect a new keyring file with a passphrase (asked for, or from --passphrase-file)")
	f.BoolVar(&o.json, "json", false, "print JSON")
	return cmd
}

// initResult is what --json prints.
type initResult struct {
	Store          string              `json:"store"`
	ID             string              `json:"id"`
	Placement      string              `json:"placement"`
	Suite          string              `json:"suite"`
	HeaderSize     int                 `json:"header_size"`
	Keys           map[string][]string `json:"keys"`
	Keyring        string              `json:"keyring,omitempty"`
	KeyringCreated bool                `json:"keyring_created"`
	KeysCreated    []string            `json:"keys_created"`
	KnownStores    string              `json:"known_stores"`
}

func (a *app) runInit(ctx context.Context, o initOptions) error {
	cfg, err := a.initConfig(o)
	if err != nil {
		return err
	}
	known, err := a.global.knownStoresPath()
	if err != nil {
		return err
	}
	if _, err := loadKnownStores(known); err != nil { // before anything is made
		return err
	}
	result := initResult{KeysCreated: []string{}, KnownStores: known}
	keys := policyKeys(cfg.Policy)
	if schemes(keys)["keyring"] {
		if err := a.makeKeyringKeys(ctx, keys, o.protect, &result); err != nil {
			return err
		}
	}
	services, err := a.global.providerConfig()
	if err != nil {
		return err
	}
	p, err := openProviders(ctx, services, keys, a.passphraseSource(ctx), a.log())
	if err != nil {
		return err
	}
	defer p.Close()
	cfg.Provider = p
	info, err := cryptfs.Init(ctx, cfg)
	if err != nil {
		return err
	}
	facts := storeFacts{id: info.ID.String(), path: cfg.Store, keys: info.Keys}
	if err := pinStore(known, facts, true); err != nil {
		return hint(fmt.Errorf("the store was made, but not noted as known: %w", err), "the first mount needs --trust")
	}
	result.Store, result.ID, result.Keys = facts.path, facts.id, facts.keys
	result.Placement, result.Suite, result.HeaderSize = info.Placement.String(), info.Suite.String(), info.HeaderSize
	if o.json {
		return a.printJSON(result)
	}
	a.printInit(result)
	return nil
}

func (a *app) printInit(r initResult) {
	if r.KeyringCreated {
		a.printf("created keyring %s\n", r.Keyring)
	}
	for _, key := range r.KeysCreated {
		a.printf("created key %s\n", key)
	}
	a.printf("created store %s\n", r.Store)
	a.printf("  id         %s\n", r.ID)
	a.printf("  placement  %s, %s\n", r.Placement, r.Suite)
	for _, line := range classLines(r.Keys) {
		a.printf("  class      %s\n", line)
	}
	a.printf("next: kmsfs mount %s MOUNTPOINT\n", shellQuote(r.Store))
}

// initConfig checks the options, before anything is made.
func (a *app) initConfig(o initOptions) (cryptfs.InitConfig, error) {
	cfg := cryptfs.InitConfig{HeaderSize: o.headerSize, Log: a.log()}
	var err error
	if cfg.Placement, err = envelope.ParsePlacement(o.placement); err != nil {
		return cfg, usage(fmt.Sprintf("--placement %q is no placement", o.placement), "give header, xattr or sidecar")
	}
	if cfg.Suite, err = dare.ParseSuite(o.suite); err != nil {
		return cfg, usage(fmt.Sprintf("--suite %q is no cipher suite", o.suite), "give aes-256-gcm or chacha20-poly1305")
	}
	if n := o.headerSize; n < envelope.MinHeader || n > envelope.MaxHeader || n&(n-1) != 0 {
		return cfg, usage(fmt.Sprintf("--header-size %d is no header size", n), "give 512, 1024, 2048, 4096 or 8192")
	}
	if cfg.Policy, err = a.initPolicy(o); err != nil {
		return cfg, err
	}
	if cfg.Store, err = newStorePath(o.store); err != nil {
		return cfg, err
	}
	return cfg, nil
}

func (a *app) initPolicy(o initOptions) (*classify.Policy, error) {
	if o.policy != "" {
		return a.readPolicy(o.policy)
	}
	keys := o.keys
	if len(keys) == 0 {
		keys = []string{keyringURI(defaultClass)}
	}
	size, err := parseSize(o.chunkSize)
	if err != nil {
		return nil, usage(fmt.Sprintf("--chunk-size %q is no size", o.chunkSize), "give 4KiB, 8KiB, 16KiB, 32KiB or 64KiB")
	}
	p := classify.Single(defaultClass, keys...)
	c := p.Classes[defaultClass]
	c.ChunkSize, c.Names = size, classify.NameMode(o.names)
	p.Classes[defaultClass] = c
	if err := p.Check(); err != nil {
		return nil, policyError(err)
	}
	return p, nil
}

// readPolicy reads and checks a policy file; - is standard input.
func (a *app) readPolicy(path string) (*classify.Policy, error) {
	var r io.Reader = a.stdin
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, hint(fmt.Errorf("policy: %w", err), "give an existing policy file")
		}
		defer f.Close()
		r = f
	}
	text, err := io.ReadAll(io.LimitReader(r, classify.MaxText+1))
	if err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	p, err := classify.Parse(text)
	if err != nil {
		return nil, policyError(err)
	}
	return p, nil
}

// policyError splits a policy's error into what is wrong and what to do.
func policyError(err error) error {
	var bad *classify.ParseError
	if !errors.As(err, &bad) {
		return err
	}
	text := bad.Error()
	if bad.Hint != "" {
		text = strings.TrimSuffix(text, "; "+bad.Hint)
	}
	return fail(err, text, bad.Hint)
}

// newStorePath checks that a store can be made at path and returns the
// absolute path, links resolved.
func newStorePath(path string) (string, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	if real, err := filepath.EvalSymlinks(abs); err == nil {
		abs = real
	} else if abs, err = realParent(abs); err != nil {
		return "", hint(fmt.Errorf("the parent directory of %s: %w", path, err), "make the parent directory first")
	}
	entries, err := os.ReadDir(abs)
	if above, inStore := storeAbove(filepath.Dir(abs)); inStore == nil {
		return "", usage(path+" lies in the store "+above, "give a directory outside of it, or a subdirectory of its mount")
	}
	switch {
	case errors.Is(err, os.ErrNotExist):
		return abs, nil
	case errors.Is(err, syscall.ENOTDIR):
		return "", usage(path+" is not a directory", "give a new or empty directory")
	case err != nil:
		return "", err
	case slices.ContainsFunc(entries, func(e os.DirEntry) bool { return e.Name() == ".kmsfs" }):
		return "", fail(cryptfs.ErrNotEmpty, path+" holds a store already", "mount it with kmsfs mount, or give another directory")
	case len(entries) > 0:
		return "", fail(cryptfs.ErrNotEmpty, path+" is not empty", "give a new or empty directory; copy the files through the mount")
	}
	return abs, nil
}

// makeKeyringKeys makes what of the keyring a policy needs and is not there.
func (a *app) makeKeyringKeys(ctx context.Context, keys []string, protect bool, r *initResult) error {
	k, created, err := a.openOrCreateKeyring(ctx, protect)
	if err != nil {
		return err
	}
	defer k.Close()
	if !created && protect {
		return usage("--passphrase is for a new keyring, and "+k.Path()+" exists", "kmsfs keyring passphrase changes its protection")
	}
	r.Keyring, r.KeyringCreated = k.Path(), created
	for _, key := range keys {
		name, ok := strings.CutPrefix(key, "keyring:")
		if !ok {
			continue
		}
		_, err := k.Info(name)
		if err == nil {
			continue
		}
		if !errors.Is(err, keywrap.ErrNotFound) {
			return err
		}
		if err := k.CreateKey(name); err != nil {
			return err
		}
		r.KeysCreated = append(r.KeysCreated, key)
	}
	return nil
}

func keyringURI(name string) string { return "keyring:" + name }

// policyKeys returns every key that a policy names, once.
func policyKeys(p *classify.Policy) []string {
	keys := map[string][]string{}
	for name, c := range p.Classes {
		keys[name] = slices.Concat(c.Keys, c.Retired)
	}
	return allKeys(keys)
}

// parseSize reads bytes, or a number followed by KiB.
func parseSize(s string) (int, error) {
	number, kib := strings.CutSuffix(s, "KiB")
	n, err := strconv.ParseUint(number, 10, 24)
	if err == nil && kib {
		n <<= 10
	}
	return int(n), err
}
