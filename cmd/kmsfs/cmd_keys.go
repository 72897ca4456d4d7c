package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsfs/kmsfs/crypto/audit"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/fs/rewrap"
)

type keysOptions struct {
	openOptions
	dependsOn string
	plaintext bool
	logFile   string
	json      bool
}

func newKeysCommand(a *app) *cobra.Command {
	var o keysOptions
	cmd := &cobra.Command{
		Use:   "keys STORE",
		Short: "Tell what depends on which key, and whether a key may be deleted",
		Long: `Look at every header of a store, mounted or not, and tell for each key what
depends on it, what the key service says of it, and whether it may be deleted. No
key is used, and nothing is authenticated.

With --depends-on list the files with a copy of their data key under KEY: their
ciphertext paths, or with --plaintext their names, which takes the name keys.

Exit code 11: something depends on KEY, or, without --depends-on, on a key that is
pending deletion or gone. Copies and backups of the store are not looked at.`,
		Example: `  kmsfs keys ~/store
  kmsfs keys --depends-on keyring:old ~/store
  kmsfs keys --json ~/store | jq '.keys[] | select(.verdict.deletable).key'`,
		Args: operands("STORE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.store = args[0]
			return a.runKeys(cmd.Context(), o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.dependsOn, "depends-on", "", "list the files that depend on this `KEY`")
	f.BoolVar(&o.plaintext, "plaintext", false, "list plaintext paths; only with --depends-on")
	f.StringVar(&o.logFile, "log", "", "take the time of each key's last use from this audit log `FILE`")
	f.BoolVar(&o.json, "json", false, "print JSON")
	addTrustFlag(cmd, &o.trust)
	return cmd
}

// keyReport is one key as --json prints it.
type keyReport struct {
	*rewrap.KeyUse
	State      string         `json:"state"` // the key service's, or "unknown"
	Error      string         `json:"error,omitempty"`
	Created    *time.Time     `json:"created,omitempty"`
	Rotation   bool           `json:"rotation"` // automatic
	Rotated    *time.Time     `json:"rotated,omitempty"`
	Material   string         `json:"material,omitempty"` // the newest
	DeletionAt *time.Time     `json:"deletion_at,omitempty"`
	LastUsed   *time.Time     `json:"last_used,omitempty"` // by this store's mounts
	Verdict    rewrap.Verdict `json:"verdict"`             // may it be deleted?

	gone bool // pending deletion, or not found
}

// keysReport is what --json prints.
type keysReport struct {
	Store     string        `json:"store"`
	ID        string        `json:"id"`
	Mounted   bool          `json:"mounted"`
	Files     rewrap.Count  `json:"files"` // with contents
	Keys      []*keyReport  `json:"keys"`
	Problems  []fileProblem `json:"problems"`             // files that cannot be looked at
	DependsOn string        `json:"depends_on,omitempty"` // --depends-on
	Paths     []string      `json:"paths,omitempty"`      // its files
}

func (a *app) runKeys(ctx context.Context, o keysOptions) error {
	if o.plaintext && o.dependsOn == "" {
		return usage("--plaintext without --depends-on", "give --depends-on KEY")
	}
	s, p, err := a.openRaw(ctx, o.openOptions, 0)
	if err != nil {
		return err
	}
	defer p.Close()
	defer s.Close()
	r := &keysReport{ID: s.ID().String()}
	if r.Store, err = storePath(o.store); err != nil {
		return err
	}
	m, err := mountOfStore(r.Store)
	if err != nil {
		return err
	}
	r.Mounted = m != nil
	bar := a.newProgress("looking", "files")
	inv, err := s.Inventory(ctx, bar.at)
	bar.finish()
	if err != nil {
		return err
	}
	used, err := lastUsed(s, o.logFile)
	if err != nil {
		return err
	}
	r.Files, r.Problems = inv.Files, problems(inv.Problems)
	for _, k := range inv.Keys {
		r.Keys = append(r.Keys, describeKey(ctx, p, k, inv.Verdict(k, r.Mounted), used))
	}
	if o.dependsOn != "" {
		if r.DependsOn, err = resolveKey(ctx, p, o.dependsOn); err != nil {
			return err
		}
		if r.Paths, err = a.dependents(ctx, o, s, r.DependsOn); err != nil {
			return err
		}
	}
	if err := a.printKeys(o, r); err != nil {
		return err
	}
	return keysVerdict(o, r)
}

// lastUsed returns when each key was last used: as the audit log says, or else
// the store's own note.
func lastUsed(s *rewrap.Store, logFile string) (map[string]time.Time, error) {
	if logFile == "" {
		return s.LastUsed()
	}
	out := map[string]time.Time{}
	store := s.ID().String()
	_, err := audit.Walk(logFile, func(e audit.Event) error {
		if e.Kind == audit.KindUse && e.Key != "" && (e.Store == "" || e.Store == store) && !e.Failed() && e.Time.After(out[e.Key]) {
			out[e.Key] = e.Time
		}
		return nil
	})
	return out, err
}

func describeKey(ctx context.Context, p keywrap.Provider, k *rewrap.KeyUse, v rewrap.Verdict, used map[string]time.Time) *keyReport {
	some := func(t time.Time) *time.Time {
		if t.IsZero() {
			return nil
		}
		t = t.UTC()
		return &t
	}
	r := &keyReport{KeyUse: k, State: "unknown", Verdict: v, LastUsed: some(used[k.Key])}
	if k.Foreign { // not to be called: the store could name any key
		r.Error = "none of the store's keys"
		return r
	}
	d, err := p.Describe(ctx, k.Key)
	if err != nil {
		_, r.Error, _ = explain(err)
		r.gone = keyIsGone(err)
		return r
	}
	r.State, r.Created, r.Rotation, r.Rotated = string(d.State), some(d.Created), d.Rotation, some(d.Rotated)
	r.Material, r.DeletionAt = d.Material, some(d.DeletionAt)
	r.gone = d.State == keywrap.PendingDeletion
	return r
}

// dependents lists the files of --depends-on.
func (a *app) dependents(ctx context.Context, o keysOptions, s *rewrap.Store, key string) ([]string, error) {
	paths, _, err := s.DependsOn(ctx, key) // the problems are in the inventory
	if err != nil || !o.plaintext {
		return paths, err
	}
	open := o.openOptions
	open.readOnly = true
	v, err := a.openStore(ctx, open)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	for i, at := range paths {
		if plain, err := v.PlainPath(ctx, at); err == nil {
			paths[i] = plain
		} else {
			a.warn("%s: its name cannot be read: %v", at, err)
		}
	}
	return paths, nil
}

func (a *app) printKeys(o keysOptions, r *keysReport) error {
	if o.json {
		return a.printJSON(r)
	}
	if o.dependsOn != "" {
		for _, at := range r.Paths {
			a.printf("%s\n", printable(at))
		}
		return nil
	}
	for i, k := range r.Keys {
		if i > 0 {
			a.printf("\n")
		}
		a.printKey(k)
	}
	for _, p := range r.Problems {
		a.warn("%s: %s", p.Path, p.What)
	}
	return nil
}

func (a *app) printKey(k *keyReport) {
	a.printf("%s\n", printable(k.Key))
	state := k.State
	if k.Error != "" {
		state += ": " + oneLine(k.Error)
	}
	if k.DeletionAt != nil {
		state += ", deletion on " + k.DeletionAt.Format(time.RFC3339)
	}
	a.printf("  state        %s\n", state)
	if k.Created != nil {
		rotation := "no automatic rotation"
		if k.Rotation {
			rotation = "automatic rotation"
		}
		if k.Rotated != nil {
			rotation += ", last rotated " + k.Rotated.Format(time.DateOnly)
		}
		a.printf("  age          %d days; %s\n", int(time.Since(*k.Created).Hours()/24), rotation)
	}
	if k.LastUsed != nil {
		a.printf("  last used    %s\n", k.LastUsed.Format(time.RFC3339))
	}
	a.printIf("  new files    %s\n", strings.Join(k.ActiveIn, ", "))
	a.printIf("  retired in   %s\n", strings.Join(k.RetiredIn, ", "))
	a.printDependents("  ", "", &k.Dependents)
	for _, class := range slices.Sorted(maps.Keys(k.Classes)) {
		a.printDependents("    ", "class "+printable(class)+": ", k.Classes[class])
	}
	if len(k.Materials) > 1 {
		for _, id := range slices.Sorted(maps.Keys(k.Materials)) {
			a.printDependents("    ", "material "+printable(id)+": ", k.Materials[id])
		}
	}
	answer := "no"
	if k.Verdict.Deletable {
		answer = "yes"
	}
	a.printf("  delete it?   %s: %s\n", answer, strings.Join(k.Verdict.Reasons, "; "))
}

func (a *app) printDependents(indent, what string, d *rewrap.Dependents) {
	a.printf("%s%s%d files (%d bytes) under it alone, %d files (%d bytes) under others as well\n",
		indent, what, d.Sole.Files, d.Sole.Bytes, d.Several.Files, d.Several.Bytes)
}

// keysVerdict turns the inventory into the command's outcome.
func keysVerdict(o keysOptions, r *keysReport) error {
	if o.dependsOn != "" {
		i := slices.IndexFunc(r.Keys, func(k *keyReport) bool { return k.Key == r.DependsOn })
		switch {
		case i >= 0 && !r.Keys[i].Verdict.Deletable:
			return fail(errKeyNeeded, r.DependsOn+": "+strings.Join(r.Keys[i].Verdict.Reasons, "; "),
				"retire it in the policy, run kmsfs rewrap "+shellQuote(r.Store)+", then ask again")
		case i < 0 && len(r.Problems) > 0:
			return fail(errKeyNeeded, fmt.Sprintf("%d files cannot be looked at, and may depend on it", len(r.Problems)), "run kmsfs fsck "+shellQuote(r.Store))
		}
		return nil
	}
	for _, k := range r.Keys {
		if k.gone && k.Needed() {
			return fail(errKeyNeeded, k.Key+" is going or gone, and "+strings.Join(k.Verdict.Reasons, "; "), "cancel its deletion, then run kmsfs rewrap "+shellQuote(r.Store))
		}
	}
	return nil
}
