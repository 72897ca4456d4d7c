package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"text/tabwriter"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

type lsOptions struct {
	openOptions
	path string
	json bool
}

func newLsCommand(a *app) *cobra.Command {
	var o lsOptions
	cmd := &cobra.Command{
		Use:   "ls STORE [PATH]",
		Short: "List a directory of a store without mounting it",
		Long: `List a directory of a store, or one file, without mounting it; beside a mount as
well. Sizes are those of the plaintext. A name that does not print is quoted.`,
		Example: `  kmsfs ls ~/store
  kmsfs ls --json ~/store /patients | jq -r .entries[].name`,
		Args: operands("STORE", "[PATH]"),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.store, o.path, o.readOnly = args[0], "/", true
			if len(args) > 1 {
				o.path = args[1]
			}
			return a.runLs(cmd.Context(), o)
		},
	}
	cmd.Flags().BoolVar(&o.json, "json", false, "print JSON")
	addTrustFlag(cmd, &o.trust)
	return cmd
}

func addTrustFlag(cmd *cobra.Command, to *bool) {
	cmd.Flags().BoolVar(to, "trust", false, "accept a store that is new to this machine, with the keys it names")
}

// lsEntry is one file as --json prints it. Error is set, and the attributes
// are not, where the file's own record is damaged.
type lsEntry struct {
	Name    string    `json:"name"`
	RawName []byte    `json:"name_base64,omitempty"` // if the name is not UTF-8
	Type    string    `json:"type"`
	Mode    string    `json:"mode"` // octal permission bits, with setuid, setgid and sticky
	Nlink   uint32    `json:"nlink"`
	UID     uint32    `json:"uid"`
	GID     uint32    `json:"gid"`
	Size    int64     `json:"size"`
	Mtime   time.Time `json:"mtime"`
	Target  string    `json:"target,omitempty"` // of a symbolic link
	Error   string    `json:"error,omitempty"`

	mode uint32
}

func (a *app) runLs(ctx context.Context, o lsOptions) (err error) {
	v, err := a.openStore(ctx, o.openOptions)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	w := walker{v}
	n, attr, err := w.resolve(ctx, o.path, false)
	if err != nil {
		return err
	}
	defer w.forget(n)
	var entries []lsEntry
	var failed error
	if n.IsDir() {
		entries, failed, err = w.list(ctx, n)
	} else {
		entries, err = []lsEntry{w.entry(o.path, n, attr)}, nil
	}
	if err != nil {
		return err
	}
	if o.json {
		return cmp.Or(a.printJSON(map[string]any{"path": o.path, "entries": entries}), failed)
	}
	return cmp.Or(a.printEntries(entries), failed)
}

// list returns a directory's entries by name. failed is the first entry's
// failure; the others are listed all the same.
func (w walker) list(ctx context.Context, dir *cryptfs.Node) (out []lsEntry, failed, err error) {
	d, err := w.v.OpenDir(ctx, dir)
	if err != nil {
		return nil, nil, err
	}
	defer d.Close()
	out = []lsEntry{}
	for _, e := range d.Entries() {
		if e.Name == "." || e.Name == ".." {
			continue
		}
		if err := ctx.Err(); err != nil {
			return nil, nil, err
		}
		n, attr, err := w.v.LookupEntry(ctx, dir, e)
		if errors.Is(err, fs.ErrNotExist) { // gone meanwhile, beside a mount
			continue
		}
		if err != nil {
			out = append(out, lsEntry{Name: e.Name, Type: fileType(e.Mode), Error: err.Error()})
			failed = cmp.Or(failed, fmt.Errorf("an entry cannot be read: %w", err))
			continue
		}
		out = append(out, w.entry(e.Name, n, attr))
		w.forget(n)
	}
	slices.SortFunc(out, func(x, y lsEntry) int { return cmp.Compare(x.Name, y.Name) })
	return out, failed, nil
}

func (w walker) entry(name string, n *cryptfs.Node, attr cryptfs.Attr) lsEntry {
	e := lsEntry{
		Name: name, Type: fileType(attr.Mode), Mode: fmt.Sprintf("%04o", attr.Mode&0o7777), Nlink: attr.Nlink,
		UID: attr.Uid, GID: attr.Gid, Size: attr.Size, Mtime: time.Unix(attr.Mtime.Sec, int64(attr.Mtime.Nsec)).UTC(), mode: attr.Mode,
	}
	if !utf8.ValidString(name) {
		e.RawName = []byte(name)
	}
	if e.Type == "symlink" {
		target, err := w.v.Readlink(n)
		if err != nil {
			e.Error = err.Error()
		}
		e.Target = target
	}
	return e
}

func (a *app) printEntries(entries []lsEntry) error {
	w := tabwriter.NewWriter(a.stdout, 0, 8, 1, ' ', 0)
	for _, e := range entries {
		if e.mode == 0 {
			fmt.Fprintf(w, "%s\t?\t?\t?\t?\t?\t%s\n", "??????????", printable(e.Name))
			continue
		}
		name := printable(e.Name)
		if e.Type == "symlink" {
			name += " -> " + printable(e.Target)
		}
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%d\t%s\t%s\n", lsMode(e.mode), e.Nlink, e.UID, e.GID, e.Size, e.Mtime.Format("2006-01-02 15:04"), name)
	}
	return w.Flush()
}

// printable returns a name as it can go to a terminal: quoted, as in Go, if it
// holds anything that does not print.
func printable(name string) string {
	for _, r := range name {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return strconv.Quote(name)
		}
	}
	return name
}

func fileType(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return "directory"
	case unix.S_IFLNK:
		return "symlink"
	case unix.S_IFIFO:
		return "fifo"
	case unix.S_IFSOCK:
		return "socket"
	case unix.S_IFCHR:
		return "char-device"
	case unix.S_IFBLK:
		return "block-device"
	}
	return "file"
}

// lsMode prints as ls -l does: "drwxr-xr-x".
func lsMode(mode uint32) string {
	kinds := map[string]byte{"directory": 'd', "symlink": 'l', "fifo": 'p', "socket": 's', "char-device": 'c', "block-device": 'b', "file": '-'}
	out := []byte(fs.FileMode(mode & 0o777).String()) // "-rwxr-xr-x"
	out[0] = kinds[fileType(mode)]
	for _, special := range []struct {
		bit, exec uint32
		at        int
		letter    byte
	}{{unix.S_ISUID, 0o100, 3, 's'}, {unix.S_ISGID, 0o010, 6, 's'}, {unix.S_ISVTX, 0o001, 9, 't'}} {
		if mode&special.bit == 0 {
			continue
		}
		out[special.at] = special.letter
		if mode&special.exec == 0 {
			out[special.at] -= 'a' - 'A'
		}
	}
	return string(out)
}
