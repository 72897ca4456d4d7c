package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

type infoOptions struct {
	path string
	json bool
}

func newInfoCommand(a *app) *cobra.Command {
	var o infoOptions
	cmd := &cobra.Command{
		Use:   "info PATH",
		Short: "Tell a file's class, key, ids and sizes",
		Long: `Tell a file's class, key, ids and sizes. PATH is a file on a mount, or a
ciphertext file in a store. For a file in a store no key is used, so that what
its header says is not verified.`,
		Example: `  kmsfs info ~/plain/patients/42.json
  kmsfs info --json ~/store/VGhpcyBpcyBhIG5hbWU`,
		Args: operands("PATH"),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.path = args[0]
			return a.runInfo(cmd.Context(), o)
		},
	}
	cmd.Flags().BoolVar(&o.json, "json", false, "print JSON")
	return cmd
}

// mountedInfo is what is known about a file on a mount, as --json prints it.
type mountedInfo struct {
	Path       string   `json:"path"`
	Mountpoint string   `json:"mountpoint"`
	Store      string   `json:"store"`
	Type       string   `json:"type"`
	Class      string   `json:"class,omitempty"`
	Keys       []string `json:"keys,omitempty"` // recipients, in the header's order
	ID         string   `json:"id,omitempty"`   // file id, or directory id
	Size       int64    `json:"size"`           // of the plaintext
	Allocated  int64    `json:"allocated"`      // bytes on the store's disk
	Links      uint64   `json:"links"`
}

func (a *app) runInfo(ctx context.Context, o infoOptions) error {
	m, real, err := mountOf(o.path)
	if err != nil {
		return hint(err, "give an existing file on a mount or in a store")
	}
	if m == nil {
		return a.infoInStore(o, real)
	}
	// The path as given, not its target: a link has a class of its own.
	out, err := infoOnMount(ctx, o.path, *m)
	if err != nil {
		return err
	}
	if o.json {
		return a.printJSON(out)
	}
	a.printf("path       %s\n", printable(out.Path))
	a.printf("type       %s\n", out.Type)
	a.printf("mount      %s of store %s\n", printable(out.Mountpoint), printable(out.Store))
	a.printIf("class      %s\n", out.Class)
	for _, key := range out.Keys {
		a.printf("key        %s\n", key)
	}
	a.printIf("id         %s\n", out.ID)
	a.printf("size       %d bytes\n", out.Size)
	a.printf("on disk    %d bytes\n", out.Allocated)
	return nil
}

func (a *app) printIf(format, value string) {
	if value != "" {
		a.printf(format, value)
	}
}

func infoOnMount(ctx context.Context, path string, m mountEntry) (*mountedInfo, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return nil, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	out := &mountedInfo{
		Path: path, Mountpoint: m.Mountpoint, Store: m.Source, Type: fileType(st.Mode),
		Size: st.Size, Allocated: st.Blocks * 512, Links: uint64(st.Nlink),
	}
	var keys string
	for name, to := range map[string]*string{"class": &out.Class, "key": &keys, "id": &out.ID} {
		value, err := readXattr(ctx, path, "user.kmsfs."+name)
		switch {
		case errors.Is(err, unix.ENODATA), errors.Is(err, unix.EPERM), errors.Is(err, unix.EOPNOTSUPP):
			// an empty file has no key, and a link or device no such attributes
		case err != nil:
			return nil, err
		default:
			*to = string(value)
		}
	}
	out.Keys = strings.Fields(keys)
	return out, nil
}

// infoInStore tells about a ciphertext file.
func (a *app) infoInStore(o infoOptions, real string) error {
	store, err := storeAbove(real)
	if err != nil {
		return err
	}
	out, err := cryptfs.InspectFile(store, real)
	if err != nil {
		return err
	}
	if o.json {
		return a.printJSON(out)
	}
	a.printf("entry      %s\n", printable(out.Entry))
	a.printf("type       %s\n", out.Kind)
	a.printf("store      %s, placement %s\n", printable(out.Store), out.Placement)
	a.printIf("class      %s\n", out.Class)
	for _, r := range out.Recipients {
		a.printf("key        %s (class %s)\n", printable(r.Key), printable(r.Class))
		a.printIf("  material %s\n", r.Material)
	}
	a.printIf("id         %s\n", out.ID)
	if out.ChunkSize > 0 {
		a.printf("chunks     %d bytes, %s\n", out.ChunkSize, out.Suite)
	}
	if out.Sparse {
		a.printf("sparse     yes\n")
	}
	a.printf("size       %d bytes\n", out.Size)
	a.printf("in store   %d bytes\n", out.StoreSize)
	return nil
}

// storeAbove returns the store that a file lies in.
func storeAbove(path string) (string, error) {
	for dir := path; ; dir = filepath.Dir(dir) {
		if _, err := os.Lstat(filepath.Join(dir, ".kmsfs", "store")); err == nil {
			return dir, nil
		}
		if dir == "/" {
			return "", fail(errNoStore, path+" lies neither on a kmsfs mount nor in a store", "kmsfs status lists the mounts")
		}
	}
}
