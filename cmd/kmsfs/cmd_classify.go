package main

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

type classifyOptions struct {
	openOptions
	dir   string
	class string
}

func newClassifyCommand(a *app) *cobra.Command {
	var o classifyOptions
	cmd := &cobra.Command{
		Use:   "classify DIR CLASS",
		Short: "Give an empty directory a class of its own",
		Long: `Add a rule to the policy that gives an empty directory a class. DIR lies on a
mount; with --store it is a path of the plaintext tree of a store that is not
mounted. Only the mount's owner and root may do this.`,
		Example: `  mkdir ~/plain/patients && kmsfs classify ~/plain/patients phi
  kmsfs classify --store ~/store /patients phi`,
		Args: operands("DIR", "CLASS"),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.dir, o.class = args[0], args[1]
			return a.runClassify(cmd.Context(), o)
		},
	}
	cmd.Flags().StringVar(&o.store, "store", "", "change this `STORE`, which is not mounted")
	addTrustFlag(cmd, &o.trust)
	return cmd
}

func (a *app) runClassify(ctx context.Context, o classifyOptions) error {
	var err error
	if o.store == "" {
		err = classifyMounted(o)
	} else {
		_, err = a.changePolicy(ctx, o.openOptions, nil, func(v *volume) ([]string, error) {
			w := walker{v}
			n, _, err := w.resolve(ctx, path.Clean("/"+o.dir), true)
			if err != nil {
				return nil, err
			}
			defer w.forget(n)
			return nil, v.Classify(ctx, n, o.class)
		})
	}
	if err != nil {
		return err
	}
	a.printf("%s has class %s\n", printable(o.dir), o.class)
	return nil
}

// classifyMounted asks the mount that the directory is on.
func classifyMounted(o classifyOptions) error {
	m, _, err := mountOf(o.dir)
	if err != nil {
		return err
	}
	if m == nil {
		return fail(errNotAMount, o.dir+" is not on a kmsfs mount", "give a directory on a mount, or --store STORE and a path in it")
	}
	err = unix.Setxattr(o.dir, "user.kmsfs.class", []byte(o.class), 0)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, syscall.EPERM), errors.Is(err, syscall.ENOTEMPTY):
		return fail(err, fmt.Sprintf("%s cannot be classified", o.dir), "the directory must be empty, and you its mount's owner or root")
	case errors.Is(err, syscall.EINVAL):
		return usage(fmt.Sprintf("%s cannot be given the class %q", o.dir, o.class), "kmsfs policy show "+shellQuote(m.Source)+" lists the classes")
	}
	return fmt.Errorf("%s: %w", o.dir, err)
}

// mountOf returns the kmsfs mount that an existing path lies on, or nil, and
// the path without links.
func mountOf(path string) (*mountEntry, string, error) {
	real, err := realPath(path)
	if err != nil {
		return nil, "", err
	}
	mounts, err := readMounts()
	if err != nil {
		return nil, "", err
	}
	var best *mountEntry
	for i, m := range mounts {
		under := m.Mountpoint == "/" || real == m.Mountpoint || strings.HasPrefix(real, m.Mountpoint+"/")
		if under && (best == nil || len(m.Mountpoint) >= len(best.Mountpoint)) {
			best = &mounts[i]
		}
	}
	if best == nil || best.Type != fsType {
		return nil, real, nil
	}
	return best, real, nil
}
