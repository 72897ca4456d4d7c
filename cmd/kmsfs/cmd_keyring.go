package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsfs/kmsfs/crypto/keywrap/keyring"
)

func newKeyringCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "keyring",
		Short: "Manage the embedded keyring",
		Long: `The embedded keyring is a local file of named keys with the semantics of AWS KMS:
versions (rotation), states, a waiting period before deletion. A policy names
its keys keyring:NAME. Running mounts see every change at once.`,
		Example: `  kmsfs keyring create phi
  kmsfs keyring list --json
  kmsfs keyring rotate general`,
	}
	makeGroup(cmd)
	cmd.AddCommand(newKeyringCreateCommand(a), newKeyringListCommand(a), newKeyringScheduleCommand(a), newKeyringPassphraseCommand(a))
	for _, c := range []keyringAction{
		{"rotate", "Add a version that wraps from now on; older versions still unwrap", "rotated", (*keyring.Keyring).Rotate},
		{"enable", "Make a disabled key usable", "enabled", (*keyring.Keyring).Enable},
		{"disable", "Make a key unusable until it is enabled", "disabled", (*keyring.Keyring).Disable},
		{"cancel-deletion", "Keep a key that is pending deletion; it is disabled afterwards", "no longer pending deletion, and disabled", (*keyring.Keyring).CancelDeletion},
	} {
		cmd.AddCommand(newKeyringActionCommand(a, c))
	}
	return cmd
}

type keyringCreateOptions struct {
	names   []string
	protect bool
}

func newKeyringCreateCommand(a *app) *cobra.Command {
	var o keyringCreateOptions
	cmd := &cobra.Command{
		Use:   "create [NAME...]",
		Short: "Make keys, and the keyring file if there is none",
		Example: `  kmsfs keyring create general phi
  kmsfs keyring create --passphrase              # an empty file, protected
  kmsfs keyring create --keyring ./k.json general`,
		Args: operands("[NAME...]"),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.names = args
			return a.runKeyringCreate(cmd.Context(), o)
		},
	}
	cmd.Flags().BoolVar(&o.protect, "passphrase", false, "protect a new file with a passphrase (asked for, or from --passphrase-file)")
	return cmd
}

func (a *app) runKeyringCreate(ctx context.Context, o keyringCreateOptions) error {
	k, created, err := a.openOrCreateKeyring(ctx, o.protect)
	if err != nil {
		return err
	}
	defer k.Close()
	if created {
		a.printf("created keyring %s\n", k.Path())
	} else if o.protect {
		return usage("keyring "+k.Path()+" exists", "kmsfs keyring passphrase changes its protection")
	} else if len(o.names) == 0 {
		return usage("keyring "+k.Path()+" exists, and no key name was given", "give the names of the keys to make")
	}
	for _, name := range o.names {
		if err := k.CreateKey(strings.TrimPrefix(name, "keyring:")); err != nil {
			return err
		}
		a.printf("created key keyring:%s\n", strings.TrimPrefix(name, "keyring:"))
	}
	return nil
}

// openKeyring opens the keyring that the options name.
func (a *app) openKeyring(ctx context.Context) (*keyring.Keyring, error) {
	path, err := a.global.keyringPath()
	if err != nil {
		return nil, err
	}
	k, err := keyring.Open(path, a.passphraseSource(ctx))
	if errors.Is(err, keyring.ErrNoFile) {
		return nil, fail(err, "there is no keyring file at "+path, "give the file with --keyring, or make one with kmsfs keyring create NAME")
	}
	return k, passphraseFailure(err)
}

// openOrCreateKeyring makes the file if it does not exist, under a passphrase
// if protect says so.
func (a *app) openOrCreateKeyring(ctx context.Context, protect bool) (k *keyring.Keyring, created bool, err error) {
	path, err := a.global.keyringPath()
	if err != nil {
		return nil, false, err
	}
	if _, err := os.Lstat(path); err == nil || !errors.Is(err, os.ErrNotExist) {
		k, err := a.openKeyring(ctx)
		return k, false, err
	}
	var pass []byte
	if protect {
		if pass, err = a.newPassphrase(ctx, a.global.passphraseFile, a.global.passphraseFD); err != nil {
			return nil, false, err
		}
		defer clear(pass)
	}
	if k, err = keyring.Create(path, pass); err != nil {
		return nil, false, err
	}
	if !protect {
		a.warn("%s", keyring.UnprotectedWarning)
	}
	return k, true, nil
}

type keyringListOptions struct{ json bool }

func newKeyringListCommand(a *app) *cobra.Command {
	var o keyringListOptions
	cmd := &cobra.Command{
		Use:     "list",
		Short:   "List the keys with their states",
		Example: "  kmsfs keyring list --json",
		Args:    operands(),
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.runKeyringList(cmd.Context(), o) },
	}
	cmd.Flags().BoolVar(&o.json, "json", false, "print JSON")
	return cmd
}

type keyringListing struct {
	Path      string            `json:"path"`
	Protected bool              `json:"protected"`
	Keys      []keyring.KeyInfo `json:"keys"`
}

func (a *app) runKeyringList(ctx context.Context, o keyringListOptions) error {
	k, err := a.openKeyring(ctx)
	if err != nil {
		return err
	}
	defer k.Close()
	out := keyringListing{Path: k.Path()}
	if out.Keys, err = k.List(); err != nil {
		return err
	}
	if out.Protected, err = k.Protected(); err != nil {
		return err
	}
	if o.json {
		return a.printJSON(out)
	}
	w := tabwriter.NewWriter(a.stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "KEY\tSTATE\tVERSIONS\tCREATED\tROTATED\tDELETION")
	for _, e := range out.Keys {
		fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%s\t%s\n", e.URI, e.State, e.Versions, day(e.Created), day(e.Rotated), day(e.DeletionAt))
	}
	return w.Flush()
}

func day(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.Format(time.DateOnly)
}

// keyringAction is a subcommand that changes one key and has no options.
type keyringAction struct {
	name, short, done string
	do                func(k *keyring.Keyring, name string) error
}

func newKeyringActionCommand(a *app, c keyringAction) *cobra.Command {
	return &cobra.Command{
		Use:     c.name + " NAME",
		Short:   c.short,
		Example: "  kmsfs keyring " + c.name + " general",
		Args:    operands("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.changeKey(cmd.Context(), args[0], c.done, c.do)
		},
	}
}

// changeKey opens the keyring, changes one key and says so.
func (a *app) changeKey(ctx context.Context, name, done string, do func(k *keyring.Keyring, name string) error) error {
	k, err := a.openKeyring(ctx)
	if err != nil {
		return err
	}
	defer k.Close()
	name = strings.TrimPrefix(name, "keyring:")
	if err := do(k, name); err != nil {
		return err
	}
	a.printf("key keyring:%s is %s\n", name, done)
	return nil
}

type keyringScheduleOptions struct {
	name string
	days int
}

func newKeyringScheduleCommand(a *app) *cobra.Command {
	var o keyringScheduleOptions
	cmd := &cobra.Command{
		Use:   "schedule-deletion NAME",
		Short: "Make a key unusable now and delete it after a waiting period",
		Long: `The key cannot be used from now on, and is deleted after the waiting period.
Every file that only this key wraps is then lost. kmsfs keyring cancel-deletion
takes it back while the period lasts.`,
		Example: "  kmsfs keyring schedule-deletion --days 7 old",
		Args:    operands("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.name = args[0]
			return a.runKeyringSchedule(cmd.Context(), o)
		},
	}
	cmd.Flags().IntVar(&o.days, "days", 30, "waiting period in days, 7 to 30")
	return cmd
}

func (a *app) runKeyringSchedule(ctx context.Context, o keyringScheduleOptions) error {
	err := a.changeKey(ctx, o.name, fmt.Sprintf("pending deletion and goes in %d days", o.days),
		func(k *keyring.Keyring, name string) error { return k.ScheduleDeletion(name, o.days) })
	if err == nil {
		a.warn("files whose only key this is are lost when the %d days are over", o.days)
	}
	return err
}

type keyringPassphraseOptions struct {
	newFile string
	remove  bool
}

func newKeyringPassphraseCommand(a *app) *cobra.Command {
	var o keyringPassphraseOptions
	cmd := &cobra.Command{
		Use:   "passphrase",
		Short: "Protect the keyring file, change its passphrase, or take the protection away",
		Example: `  kmsfs keyring passphrase                        # asks for the old and the new one
  kmsfs keyring passphrase --passphrase-file old --new-passphrase-file new
  kmsfs keyring passphrase --remove`,
		Args: operands(),
		RunE: func(cmd *cobra.Command, _ []string) error { return a.runKeyringPassphrase(cmd.Context(), o) },
	}
	cmd.Flags().StringVar(&o.newFile, "new-passphrase-file", "", "`FILE` whose first line is the new passphrase")
	cmd.Flags().BoolVar(&o.remove, "remove", false, "take the protection away")
	return cmd
}

func (a *app) runKeyringPassphrase(ctx context.Context, o keyringPassphraseOptions) error {
	if o.remove && o.newFile != "" {
		return usage("--remove and --new-passphrase-file exclude each other", "give one of them")
	}
	k, err := a.openKeyring(ctx)
	if err != nil {
		return err
	}
	defer k.Close()
	if o.remove {
		if err := k.ChangePassphrase(nil); err != nil {
			return err
		}
		a.warn("%s", keyring.UnprotectedWarning)
		a.printf("keyring %s has no passphrase any more\n", k.Path())
		return nil
	}
	pass, err := a.newPassphrase(ctx, o.newFile, -1)
	if err != nil {
		return err
	}
	defer clear(pass)
	if err := k.ChangePassphrase(pass); err != nil {
		return err
	}
	a.printf("keyring %s has a new passphrase; older copies of the file still open with the old one\n", k.Path())
	return nil
}
