package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

type fsckOptions struct {
	store  string
	repair bool
	quick  bool
	empty  bool
	jobs   int
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

With --quick no contents are read and no file's key is asked for: records, names,
symlink targets and attributes are authenticated, and of each file the size and
what its header says.

With --repair, records are restored from their second copies and what a crash
left is finished, or put aside in .kmsfs/quarantine; contents are never changed
or removed. --empty-quarantine removes what lies there, if nothing is damaged.
Paths in the output are those of the store.

Exit code 0: clean, or everything was mended. 4: damage is left. 5: some files
could not be checked for want of a key. Others as usual.`,
		Example: `  kmsfs fsck ~/store
  kmsfs fsck --quick ~/store
  kmsfs fsck --json ~/store | jq -r '.problems[].path'
  kmsfs fsck --repair ~/store`,
		Args: operands("STORE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.store = args[0]
			return a.runFsck(cmd.Context(), o)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&o.repair, "repair", false, "restore records from their second copies, and clear what a crash left")
	f.BoolVar(&o.quick, "quick", false, "leave out contents and whatever takes a file's own key")
	f.BoolVar(&o.empty, "empty-quarantine", false, "remove what repairs have put aside, if nothing is damaged")
	f.IntVar(&o.jobs, "jobs", cryptfs.DefaultJobs(), "files and directories to check at a time, 1 to 1024")
	f.Lookup("jobs").DefValue = "" // of this machine: man pages have no such numbers
	f.BoolVar(&o.json, "json", false, "print JSON")
	addTrustFlag(cmd, &o.trust)
	return cmd
}

// fsckResult is what --json prints.
type fsckResult struct {
	Store string `json:"store"`
	ID    string `json:"id"`
	Quick bool   `json:"quick,omitempty"`
	// Complete is false if the check ended before it had looked at everything.
	Complete bool `json:"complete"`
	*cryptfs.FsckReport
}

func (o *fsckOptions) check() error {
	switch {
	case o.quick && (o.repair || o.empty):
		return usage("--quick goes neither with --repair nor with --empty-quarantine", "leave out --quick: what is changed is checked in full first")
	case o.jobs < 1 || o.jobs > 1024:
		return usage(fmt.Sprintf("--jobs %d is not from 1 to 1024", o.jobs), "leave it out for the default")
	}
	return nil
}

func (a *app) runFsck(ctx context.Context, o fsckOptions) error {
	if err := o.check(); err != nil {
		return err
	}
	facts, err := a.fsckFacts(ctx, o)
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
	c := cryptfs.FsckConfig{
		Config: cryptfs.Config{Store: facts.path, Provider: p, Keys: facts.keys, Log: a.log(), SameKey: p.sameKey},
		Repair: o.repair, Quick: o.quick, EmptyQuarantine: o.empty, Jobs: o.jobs,
	}
	bar := a.newFsckProgress(o.quick)
	if bar.shown() {
		c.Progress = bar.at
	}
	report, err := cryptfs.Fsck(ctx, c)
	bar.finish()
	if report == nil {
		return err
	}
	complete := err == nil
	if complete {
		err = pinStore(known, facts, false)
	}
	if o.json {
		err = errors.Join(err, a.printJSON(fsckResult{facts.path, facts.id, o.quick, complete, report}))
	} else {
		a.printFsck(report)
	}
	if !complete {
		a.note("ended early: not everything was looked at; what is said to be mended is")
	}
	if err != nil {
		return err
	}
	return fsckVerdict(o, report)
}

// fsckFacts are those of a store that this machine trusts, by the second copy of
// its record if there is no first.
func (a *app) fsckFacts(ctx context.Context, o fsckOptions) (storeFacts, error) {
	facts, err := a.trustedStore(ctx, o.store, o.trust)
	if !errors.Is(err, cryptfs.ErrRecordLost) {
		return facts, err
	}
	real, err := storePath(o.store)
	if err != nil {
		return facts, err
	}
	info, err := cryptfs.InspectCopy(real)
	if err != nil {
		return facts, err
	}
	facts = storeFacts{id: info.ID.String(), path: real, keys: info.Keys}
	return facts, a.mustTrust(ctx, facts, o.trust)
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
	if r.Quarantined > 0 {
		a.note(".kmsfs/quarantine holds %d things that repairs put aside; when nothing is missed: kmsfs fsck --empty-quarantine", r.Quarantined)
	}
}

// fsckVerdict turns a report into the command's outcome: damage weighs more
// than keys that are not available, and these more than a disk that fails.
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
	case r.Unread():
		return fail(errDisk, fmt.Sprintf("%s: the disk failed, and not everything could be checked; %d problems", o.store, left),
			"see the kernel's log, copy what can be read to another disk, then check the copy")
	}
	return nil
}
