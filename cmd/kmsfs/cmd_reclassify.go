package main

import (
	"context"
	"errors"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

type reclassifyOptions struct {
	openOptions
	dir   string
	class string
	rate  float64
	json  bool
}

func newReclassifyCommand(a *app) *cobra.Command {
	var o reclassifyOptions
	cmd := &cobra.Command{
		Use:   "reclassify STORE DIR CLASS",
		Short: "Give a directory and all below it another class",
		Long: `Give a directory and all below it another class, in a store that is not mounted.
DIR is a path of the plaintext tree. The policy gets a rule for it, a copy of the
tree is made under the new class's keys, and takes the old one's place in one
step; that takes room for the copy. Directories below that have a rule of their
own get the class of that rule.

It is also what ends the state after kmsfs policy apply in which policy and
directory name different classes, and nothing can be written.

When the command is interrupted, at any moment and however hard, everything is
readable, with its old class until the exchange; until the same command has ended
nothing can be written in the directory. Giving the old class calls it off.
Hard links that lead out of the tree become two files, and are listed.`,
		Example: `  kmsfs reclassify ~/store /patients phi`,
		Args:    operands("STORE", "DIR", "CLASS"),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.store, o.dir, o.class = args[0], args[1], args[2]
			return a.runReclassify(cmd.Context(), o)
		},
	}
	cmd.Flags().Float64Var(&o.rate, "rate", 0, "at most `N` files a second (default: no limit)")
	cmd.Flags().BoolVar(&o.json, "json", false, "print JSON")
	addTrustFlag(cmd, &o.trust)
	return cmd
}

func (a *app) runReclassify(ctx context.Context, o reclassifyOptions) (err error) {
	job, bar, err := a.newJob("reclassifying", o.rate)
	if err != nil {
		return err
	}
	v, err := a.openForJob(ctx, o.openOptions)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	report, err := v.Reclassify(ctx, cryptfs.ReclassifyConfig{JobConfig: job, Path: o.dir, Class: o.class})
	bar.finish()
	if report != nil && (err == nil || len(report.Failures) > 0) {
		if perr := a.printReclassify(o, report); perr != nil && err == nil {
			err = perr
		}
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, cryptfs.ErrIncomplete):
		return failuresVerdict("files cannot be encrypted again; "+printable(report.Path)+" keeps its class", report.Failures)
	case errors.Is(err, cryptfs.ErrOtherJob):
		return hint(err, "finish that one first: give its directory and class, or its old class to call it off")
	case errors.Is(err, cryptfs.ErrNoClass):
		return usage(err.Error(), "kmsfs policy show "+shellQuote(o.store)+" lists the classes")
	case errors.Is(err, cryptfs.ErrFixed):
		return hint(err, "give the directories at the top a class each; new stores can have another default")
	case errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.ENOENT):
		return hint(err, "give a directory of the plaintext tree; kmsfs ls "+shellQuote(o.store)+" lists them")
	}
	return a.jobHint(err)
}

func (a *app) printReclassify(o reclassifyOptions, r *cryptfs.ReclassifyReport) error {
	if o.json {
		return a.printJSON(r)
	}
	a.printFailures(r.Failures)
	for _, path := range r.Broken {
		a.printf("%s: had further names elsewhere, which are other files now\n", printable(path))
	}
	switch {
	case len(r.Failures) > 0:
	case !r.Changed:
		a.printf("%s has class %s already\n", printable(r.Path), r.Class)
	default:
		a.printf("%s has class %s now, was %s: %d directories, %d files, %d others, %d bytes", printable(r.Path), r.Class, r.From,
			r.Directories, r.Files, r.Others, r.Bytes)
		if r.Kept > 0 {
			a.printf("; %d done before", r.Kept)
		}
		a.printf("\n")
	}
	return nil
}
