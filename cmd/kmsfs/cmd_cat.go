package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/spf13/cobra"
)

type catOptions struct {
	openOptions
	paths []string
}

func newCatCommand(a *app) *cobra.Command {
	var o catOptions
	cmd := &cobra.Command{
		Use:   "cat STORE PATH...",
		Short: "Decrypt files of a store to standard output without mounting it",
		Long: `Decrypt files of a store to standard output without mounting it; beside a mount
as well. Every byte that is written was authenticated. A failure in the middle
of a file ends the output there, and the exit code tells.`,
		Example: `  kmsfs cat ~/store /patients/42.json
  kmsfs cat ~/store /backup.tar | tar t`,
		Args: operands("STORE", "PATH..."),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.store, o.paths, o.readOnly = args[0], args[1:], true
			return a.runCat(cmd.Context(), o)
		},
	}
	addTrustFlag(cmd, &o.trust)
	return cmd
}

func (a *app) runCat(ctx context.Context, o catOptions) (err error) {
	v, err := a.openStore(ctx, o.openOptions)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	buf := make([]byte, 1<<20)
	for _, path := range o.paths {
		if err := a.catFile(ctx, walker{v}, path, buf); err != nil {
			return err
		}
	}
	return nil
}

func (a *app) catFile(ctx context.Context, w walker, path string, buf []byte) error {
	n, attr, err := w.resolve(ctx, path, true)
	if err != nil {
		return err
	}
	defer w.forget(n)
	if n.IsDir() {
		return &os.PathError{Op: "read", Path: path, Err: syscall.EISDIR}
	}
	if fileType(attr.Mode) != "file" {
		return usage(path+" is a "+fileType(attr.Mode)+", not a file", "give a regular file")
	}
	h, err := w.v.Open(ctx, n, os.O_RDONLY, false)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	defer h.Release()
	for off := int64(0); ; {
		if err := ctx.Err(); err != nil {
			return err
		}
		got, err := h.ReadAt(buf, off)
		if _, err := a.stdout.Write(buf[:got]); err != nil {
			return fmt.Errorf("standard output: %w", err)
		}
		if err != nil {
			return fmt.Errorf("%s: at byte %d: %w", path, off+int64(got), err)
		}
		if off += int64(got); got < len(buf) {
			return nil
		}
	}
}
