package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

type fsckOptions struct {
	store  string
	repair bool
	trust  bool
	json   bool
}

func newFsckCommand(a *app) *cobra.Command {
	var o fsckOptions
	cmd := &cobra.Command{
		Use:   "fsck STORE",
		Short: "Check every file of a store that is not mounted, and repair what can be repaired",
		Long: `Check every record, name, header and chunk of a store that is not mounted. Every
file is read and authenticated, which takes one key service call for each.

With --repair, records are restored from their second copies and what a crash
left is cleared; contents are never changed or removed. Paths in the output are
those of the store.

Exit code 0: clean, or everything was mended. 4: damage is left. 5: some files
could not be checked for want of a key. Others as usual.`,
		Example: `  kmsfs fsck ~/store
  kmsfs fsck --json ~/store | jq -r '.problems[].path'
  kmsfs fsck --repair ~/store`,
		Args: operands("STORE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.store = args[0]
			return a.runFsck(cmd.Context(), o)
		},
	}
	cmd.Flags().BoolVar(&o.repair, "repair", false, "restore records from their second copies, and clear what a crash left")
	cmd.Flags().BoolVar(&o.json, "json", false, "print JSON")
	addTrustFlag(cmd, &o.trust)
	return cmd
}

// fsckResult is what --json prints.
type fsckResult struct {
	Store string `json:"store"`
	ID    string `json:"id"`
	*cryptfs.FsckReport
}

func (a *app) runFsck(ctx context.Context, o fsckOptions) error {
	facts, err := a.trustedStore(ctx, o.store, o.trust)
	if err != nil {
		return err
	}
	services, err := a.global.providerConfig()
	if err != nil {
		return err
	}
	known, err := a.global.knownStoresPath()
	if err != nil {
		return err
	}
	p, err := openProviders(ctx, services, allKeys(facts.keys), a.passphraseSource(ctx), a.log())
	if err != nil {
		return err
	}
	defer p.Close()
	bar := a.newProgress("checking", "files")
	report, err := cryptfs.Fsck(ctx, cryptfs.FsckConfig{
		Config: cryptfs.Config{Store: facts.path, Provider: p, Keys: facts.keys, Log: a.log(), SameKey: p.sameKey},
		Repair: o.repair, Progress: func(files uint64, _ string) { bar.at(files) },
	})
	bar.finish()
	if err != nil {
		return err
	}
	if err := pinStore(known, facts, false); err != nil {
		return err
	}
	if o.json {
		if err := a.printJSON(fsckResult{facts.path, facts.id, report}); err != nil {
			return err
		}
	} else {
		a.printFsck(report)
	}
	return fsckVerdict(o, report)
}

func (a *app) printFsck(r *cryptfs.FsckReport) {
	for _, p := range r.Problems {
		state := ""
		if p.Mended {
			state = " (mended)"
		}
		a.printf("%s: %s: %s%s\n", printable(p.Path), p.Class, oneLine(p.What), state)
	}
	a.printf("%d directories, %d files, %d others; %d bytes authenticated; %d problems\n",
		r.Directories, r.Files, r.Others, r.Bytes, len(r.Problems))
}

// fsckVerdict turns a report into the command's outcome: damage weighs more
// than keys that are not available.
func fsckVerdict(o fsckOptions, r *cryptfs.FsckReport) error {
	left := 0
	for _, p := range r.Problems {
		if !p.Mended {
			left++
		}
	}
	switch {
	case r.Damaged() && o.repair:
		return fail(errDamage, fmt.Sprintf("%s: %d problems are left", o.store, left), "restore what is listed from a backup")
	case r.Damaged():
		return fail(errDamage, fmt.Sprintf("%s: %d problems", o.store, left), "kmsfs fsck --repair mends records; restore the rest from a backup")
	case r.KeysMissing():
		return fail(errKeysNotUsable, fmt.Sprintf("%s: %d files could not be checked for want of a key", o.store, left), "make the keys named above available, then check again")
	}
	return nil
}
