package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

const maxLinks = 40 // as the kernel has it

// walker resolves plaintext paths in a volume, without a mount.
type walker struct {
	v *volume
}

// resolve returns the node at path and its attributes; symbolic links on the
// way are followed, the last element only if follow says so. The caller gives
// the node back with forget. Errors are *os.PathError.
func (w walker) resolve(ctx context.Context, path string, follow bool) (*cryptfs.Node, cryptfs.Attr, error) {
	n, attr, err := w.walk(ctx, path, follow)
	if err != nil {
		return nil, attr, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return n, attr, nil
}

func (w walker) forget(n *cryptfs.Node) {
	if n != w.v.Root() {
		w.v.Forget(n, 1)
	}
}

// walk keeps the directories from the root down to where it is, so that ".."
// is the directory it came from.
func (w walker) walk(ctx context.Context, path string, follow bool) (_ *cryptfs.Node, _ cryptfs.Attr, err error) {
	trail := []*cryptfs.Node{w.v.Root()}
	defer func() {
		for _, n := range trail {
			w.forget(n)
		}
	}()
	attr, err := w.v.Getattr(trail[0])
	if err != nil {
		return nil, attr, err
	}
	todo, links := elements(path), 0
	for len(todo) > 0 {
		name := todo[0]
		todo = todo[1:]
		here := trail[len(trail)-1]
		if name == ".." {
			if len(trail) > 1 {
				w.forget(here)
				trail = trail[:len(trail)-1]
			}
			if attr, err = w.v.Getattr(trail[len(trail)-1]); err != nil {
				return nil, attr, err
			}
			continue
		}
		if !here.IsDir() {
			return nil, attr, syscall.ENOTDIR
		}
		var n *cryptfs.Node
		if n, attr, err = w.v.Lookup(ctx, here, name); err != nil {
			return nil, attr, err
		}
		if attr.Mode&unix.S_IFMT != unix.S_IFLNK || len(todo) == 0 && !follow {
			trail = append(trail, n)
			continue
		}
		target, err := w.v.Readlink(n)
		w.forget(n)
		if err != nil {
			return nil, attr, err
		}
		if links++; links > maxLinks {
			return nil, attr, syscall.ELOOP
		}
		if strings.HasPrefix(target, "/") {
			return nil, attr, fmt.Errorf("a symbolic link leads out of the store: %w", syscall.ENOENT)
		}
		todo = append(elements(target), todo...)
	}
	last := trail[len(trail)-1]
	trail = trail[:len(trail)-1]
	return last, attr, nil
}

// elements cuts a path into its elements; empty ones and "." are left out.
func elements(path string) []string {
	out := strings.FieldsFunc(path, func(r rune) bool { return r == '/' })
	return slices.DeleteFunc(out, func(s string) bool { return s == "." })
}
