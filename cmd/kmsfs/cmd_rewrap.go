package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keywrap/limit"
	"github.com/kmsfs/kmsfs/fs/cryptfs"
	"github.com/kmsfs/kmsfs/fs/record"
	"github.com/kmsfs/kmsfs/fs/rewrap"
)

type rewrapOptions struct {
	openOptions
	class, from, to string
	rate            float64
	dryRun          bool
	json            bool
}

func newRewrapCommand(a *app) *cobra.Command {
	var o rewrapOptions
	cmd := &cobra.Command{
		Use:   "rewrap STORE",
		Short: "Wrap the data keys of files for other keys, without decrypting anything",
		Long: `Give every file the recipients that its class has in the policy: copies of its
data key under new keys are added, those under retired keys go. The key service
does it (ReEncrypt): the contents are not touched, and no right to decrypt is
needed. It works while the store is mounted, too.

With --from only copies under that key are replaced, by copies under --to, or
under all keys of the class. With --to alone every file gets a copy under that
key, and those under retired keys go.

The command may be ended at any moment, however hard: no file is lost, and the
same command goes on where it ended. kmsfs keys STORE tells when nothing depends
on a key any more.`,
		Example: `  kmsfs rewrap --dry-run ~/store
  kmsfs rewrap ~/store
  kmsfs rewrap --class phi --from keyring:old --rate 100 ~/store`,
		Args: operands("STORE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.store = args[0]
			return a.runRewrap(cmd.Context(), o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.class, "class", "", "only files of this `CLASS`")
	f.StringVar(&o.from, "from", "", "replace copies under this `KEY` only")
	f.StringVar(&o.to, "to", "", "by copies under this `KEY` (default: all keys of the class)")
	f.Float64Var(&o.rate, "rate", 0, "at most `N` calls a second to the key service (default: no limit)")
	f.BoolVar(&o.dryRun, "dry-run", false, "count what is to be done, and do nothing")
	f.BoolVar(&o.json, "json", false, "print JSON")
	addTrustFlag(cmd, &o.trust)
	return cmd
}

// rewrapResult is what --json prints.
type rewrapResult struct {
	Store     string        `json:"store"`
	ID        string        `json:"id"`
	Online    bool          `json:"online"` // the store was mounted
	DryRun    bool          `json:"dry_run"`
	Files     uint64        `json:"files"`     // with contents
	Todo      uint64        `json:"todo"`      // whose recipients were not as they shall be
	Rewrapped uint64        `json:"rewrapped"` // and are now
	Left      uint64        `json:"left"`
	Keys      int           `json:"keys"` // name keys and store keys rewrapped
	Failed    []fileProblem `json:"failed"`
}

// fileProblem is a file of the store that something is wrong with.
type fileProblem struct {
	Path string `json:"path"` // ciphertext path
	What string `json:"what"`
	Kind string `json:"kind"`
}

func problems(in []rewrap.Problem) []fileProblem {
	out := []fileProblem{}
	for _, p := range in {
		out = append(out, fileProblem{p.Path, p.Err.Error(), fault.Of(p.Err).String()})
	}
	return out
}

func (a *app) runRewrap(ctx context.Context, o rewrapOptions) error {
	if o.rate < 0 {
		return usage("--rate is negative", "give calls per second, or leave it out")
	}
	s, p, err := a.openRaw(ctx, o.openOptions, o.rate)
	if err != nil {
		return err
	}
	defer p.Close()
	defer s.Close()
	path, err := storePath(o.store)
	if err != nil {
		return err
	}
	for _, key := range []*string{&o.from, &o.to} {
		if *key, err = resolveKey(ctx, p, *key); err != nil {
			return err
		}
	}
	w, end, err := a.rewrapWriter(ctx, s, path)
	if err != nil {
		return err
	}
	defer end()
	m := envelope.NewManager(p, s.ID(), envelope.Options{Log: a.log(), SameKey: p.sameKey, PoolSize: -1, Background: limit.Background})
	defer m.Close()
	bar := a.newRewrapProgress()
	r, err := s.Run(ctx, m, w, rewrap.Options{Class: o.class, From: o.from, To: o.to, DryRun: o.dryRun, Progress: bar.at})
	bar.finish()
	if r == nil {
		return err
	}
	_, online := w.(*daemonWriter)
	out := rewrapResult{path, s.ID().String(), online, o.dryRun, r.Seen, r.Todo, r.Rewrapped, r.Left, r.Keys, problems(r.Failed)}
	if perr := a.printRewrap(o, out); err == nil {
		err = perr
	}
	if errors.Is(err, context.Canceled) {
		a.note("the same command goes on where this one ended")
	}
	if err != nil {
		return err
	}
	return rewrapVerdict(o, r)
}

// openRaw opens a store that this machine trusts as it lies on the disk, and the
// services of its keys.
func (a *app) openRaw(ctx context.Context, o openOptions, rate float64) (*rewrap.Store, *providers, error) {
	facts, err := a.trustedStore(ctx, o.store, o.trust)
	if err != nil {
		return nil, nil, err
	}
	cfg, err := a.global.providerConfig()
	if err != nil {
		return nil, nil, err
	}
	if rate > 0 {
		cfg.Rate = rate
	}
	p, err := openProviders(ctx, cfg, allKeys(facts.keys), a.passphraseSource(ctx), a.log())
	if err != nil {
		return nil, nil, err
	}
	s, err := rewrap.Open(rewrap.Config{Path: facts.path, Keys: facts.keys, SameKey: p.sameKey})
	if err != nil {
		p.Close()
		return nil, nil, err
	}
	return s, p, nil
}

// resolveKey returns the key that an alias stands for now.
func resolveKey(ctx context.Context, p *providers, key string) (string, error) {
	if !strings.HasPrefix(key, "alias/") && !strings.Contains(key, ":alias/") {
		return key, nil
	}
	d, err := p.Describe(ctx, key)
	return d.Key, err
}

// rewrapWriter returns who writes headers: this process, under the store's lock,
// or the process that serves the store's mount.
func (a *app) rewrapWriter(ctx context.Context, s *rewrap.Store, path string) (w rewrap.Writer, end func(), err error) {
	m, err := mountOfStore(path)
	if err != nil {
		return nil, nil, err
	}
	if m != nil {
		root, err := openMount(ctx, m.Mountpoint)
		if err == nil {
			return &daemonWriter{root}, func() { _ = root.Close() }, nil
		}
		if !errors.Is(err, unix.ENOTCONN) { // else a mount whose process died
			return nil, nil, err
		}
	}
	locked, err := s.Lock(ctx, a.log())
	if errors.Is(err, rewrap.ErrLocked) {
		return nil, nil, hint(err, "another command works on the store, or its mount is not to be seen from here")
	}
	if err != nil {
		return nil, nil, err
	}
	return locked, locked.Close, nil
}

// openMount opens the root of a mount. Through the descriptor the mount's process
// is reached, or nobody: the path is an ordinary directory when it has ended.
func openMount(ctx context.Context, mountpoint string) (*os.File, error) {
	root, err := await(ctx, func() (*os.File, error) { return os.Open(mountpoint) })
	if err != nil {
		return nil, err
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(root.Fd()), &st); err != nil || st.Type != unix.FUSE_SUPER_MAGIC {
		_ = root.Close()
		return nil, fail(errBusy, mountpoint+" was unmounted just now", "give the same command again")
	}
	return root, nil
}

// mountOfStore returns the mount that may change the store at path, nil if there
// is none.
func mountOfStore(path string) (*mountEntry, error) {
	mounts, err := kmsfsMounts()
	if err != nil {
		return nil, err
	}
	for _, m := range mounts {
		if m.Source == path && !slices.Contains(strings.Split(m.Options, ","), "ro") {
			return &m, nil
		}
	}
	return nil, nil
}

// daemonWriter has the daemon of a mount write headers.
type daemonWriter struct{ root *os.File }

// set sets an attribute of the mount's root.
func (w *daemonWriter) set(ctx context.Context, name string, value []byte) error {
	_, err := await(ctx, func() ([]byte, error) { return nil, unix.Fsetxattr(int(w.root.Fd()), name, value, 0) })
	return w.failure(err)
}

// get returns an attribute of the mount's root.
func (w *daemonWriter) get(ctx context.Context, name string) ([]byte, error) {
	b, err := await(ctx, func() ([]byte, error) {
		buf := make([]byte, 1<<16)
		n, err := unix.Fgetxattr(int(w.root.Fd()), name, buf)
		return buf[:max(n, 0)], err
	})
	return b, w.failure(err)
}

// Write implements rewrap.Writer.
func (w *daemonWriter) Write(ctx context.Context, files []record.Rewrapped) ([]error, error) {
	name := cryptfs.RewrapAttr + envelope.NewID().String()
	if err := w.set(ctx, name, record.EncodeRewrap(files)); err != nil {
		return nil, err
	}
	b, err := w.get(ctx, name)
	if err != nil {
		return nil, err
	}
	var results []cryptfs.RewrapResult
	if err := json.Unmarshal(b, &results); err != nil || len(results) != len(files) {
		return nil, fmt.Errorf("%s answers %d results for %d files: %w", w.root.Name(), len(results), len(files), errNotAMount)
	}
	each := make([]error, len(files))
	for i, r := range results {
		switch {
		case r.Gone:
			each[i] = rewrap.ErrChanged
		case r.Error != "":
			each[i] = errors.New(r.Error)
		}
	}
	return each, nil
}

// Keys implements rewrap.Writer. Each class goes by itself: together they may be
// too much for one attribute.
func (w *daemonWriter) Keys(ctx context.Context, k record.StoreKeys) error {
	send := func(one record.StoreKeys) error {
		b, err := json.Marshal(one)
		if err != nil {
			return err
		}
		return w.set(ctx, cryptfs.RewrapKeysAttr, b)
	}
	for class, block := range k.Names {
		if err := send(record.StoreKeys{Names: map[string][]byte{class: block}}); err != nil {
			return err
		}
	}
	for class, block := range k.Store {
		if err := send(record.StoreKeys{Store: map[string][]byte{class: block}}); err != nil {
			return err
		}
	}
	return nil
}

func (w *daemonWriter) failure(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return fail(err, w.root.Name()+" is somebody else's mount", "run as its owner or as root, or unmount the store first")
	}
	// A call that was under way when the mount ended is answered EIO, too.
	var st unix.Statfs_t
	if errors.Is(err, unix.ENOTCONN) || errors.Is(err, unix.ECONNABORTED) || errors.Is(err, unix.EIO) && unix.Fstatfs(int(w.root.Fd()), &st) != nil {
		return fail(errBusy, w.root.Name()+": the mount has ended", "give the same command again")
	}
	return fmt.Errorf("%s: %w", w.root.Name(), err)
}

func (a *app) printRewrap(o rewrapOptions, r rewrapResult) error {
	if o.json {
		return a.printJSON(r)
	}
	for _, f := range r.Failed {
		a.printf("%s: %s: %s\n", printable(f.Path), f.Kind, oneLine(f.What))
	}
	if o.dryRun {
		a.printf("%d of %d files would be rewrapped, and %d name and store keys\n", r.Todo, r.Files, r.Keys)
		return nil
	}
	a.printf("%d of %d files rewrapped, %d left; %d name and store keys rewrapped\n", r.Rewrapped, r.Files, r.Left, r.Keys)
	return nil
}

// rewrapVerdict turns files that are left into the command's outcome.
func rewrapVerdict(o rewrapOptions, r *rewrap.Report) error {
	if o.dryRun || r.Left == 0 && len(r.Failed) == 0 {
		return nil
	}
	text := fmt.Sprintf("%d files are left as they were", r.Left)
	for _, want := range []func(fault.Kind) bool{
		func(k fault.Kind) bool { return k == fault.Integrity || k == fault.BadFormat },
		func(fault.Kind) bool { return true },
	} {
		for _, f := range r.Failed {
			if want(fault.Of(f.Err)) {
				return hint(fmt.Errorf("%s, the first because of: %w", text, f.Err), "remove the cause, then give the same command again")
			}
		}
	}
	return fail(errBusy, text, "they changed meanwhile: give the same command again")
}
