package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

type statusOptions struct {
	mountpoint string
	json       bool
}

func newStatusCommand(a *app) *cobra.Command {
	var o statusOptions
	cmd := &cobra.Command{
		Use:   "status [MOUNTPOINT]",
		Short: "Show mounts with their classes, keys, cache and counters",
		Example: `  kmsfs status
  kmsfs status --json ~/plain | jq .mounts[0].status.classes`,
		Args:              operands("[MOUNTPOINT]"),
		ValidArgsFunction: completeMountpoints,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				o.mountpoint = args[0]
			}
			return a.runStatus(cmd.Context(), o)
		},
	}
	cmd.Flags().BoolVar(&o.json, "json", false, "print JSON")
	return cmd
}

// completeMountpoints gives the shell the mountpoints to choose from.
func completeMountpoints(_ *cobra.Command, args []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
	mounts, err := kmsfsMounts()
	if err != nil || len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var out []cobra.Completion
	for _, m := range mounts {
		if strings.HasPrefix(m.Mountpoint, prefix) {
			out = append(out, m.Mountpoint)
		}
	}
	if len(out) == 0 { // a relative path, for example
		return nil, cobra.ShellCompDirectiveFilterDirs
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}

// mountStatus is one mount as --json prints it.
type mountStatus struct {
	Mountpoint string          `json:"mountpoint"`
	Store      string          `json:"store"`
	Options    string          `json:"options"`
	Status     *cryptfs.Status `json:"status,omitempty"` // none if the mount does not answer
	Error      string          `json:"error,omitempty"`
}

func (a *app) runStatus(ctx context.Context, o statusOptions) error {
	var mounts []mountEntry
	var err error
	if o.mountpoint != "" {
		m, err := findMount(o.mountpoint)
		if err != nil {
			return err
		}
		mounts = []mountEntry{*m}
	} else if mounts, err = kmsfsMounts(); err != nil {
		return err
	}
	all := make([]mountStatus, 0, len(mounts))
	var failed error
	for _, m := range mounts {
		s := mountStatus{Mountpoint: m.Mountpoint, Store: m.Source, Options: m.Options}
		if s.Status, err = readStatus(ctx, m.Mountpoint); err != nil {
			s.Error = err.Error()
			if o.mountpoint != "" {
				failed = deadMount(m, err)
			}
		}
		all = append(all, s)
	}
	if o.json {
		return errors.Join(a.printJSON(map[string]any{"mounts": all}), failed)
	}
	for i := range all {
		if i > 0 {
			a.printf("\n")
		}
		a.printStatus(&all[i])
	}
	return failed
}

func deadMount(m mountEntry, err error) error {
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
		return hint(err, "ask as the user who mounted, or as root")
	}
	return fail(errBusy, fmt.Sprintf("the mount %s does not answer: %v", m.Mountpoint, err), "kmsfs umount "+shellQuote(m.Mountpoint)+" frees it; then mount again")
}

func (a *app) printStatus(m *mountStatus) {
	a.printf("%s\n  store      %s\n", m.Mountpoint, m.Store)
	if m.Status == nil {
		a.printf("  error      %s\n", oneLine(m.Error))
		return
	}
	s := m.Status
	a.printf("  id         %s\n  placement  %s, %s\n", s.ID, s.Placement, s.Suite)
	if s.PID > 0 {
		a.printf("  process    %d\n", s.PID)
	}
	for _, c := range s.Classes {
		state := "available"
		if !c.Available {
			state = "not available, see the log"
		}
		a.printf("  class      %s: %s; names %s, chunks of %d bytes, cache %s\n", c.Name, state, c.Names, c.ChunkSize, c.Cache)
		for _, key := range c.Keys {
			a.printf("    key      %s\n", key)
		}
	}
	a.printf("  keys       %d calls, %d from the cache, %d failures; %d in memory\n", s.Keys.Calls, s.Keys.CacheHits, s.Keys.Failures, s.Keys.Entries)
	if !s.KeysLocked {
		a.printf("  warning    keys cannot be locked into memory\n")
	}
	if text := conditionText(s.Condition); text != "" {
		a.printf("  %-10s %s\n", s.Condition.State, text)
	}
	for _, o := range s.Condition.Damage.Recent {
		a.printf("    inode    %d: %d times, the last %s: %s\n", o.Ino, o.Count, o.Last.Format(time.RFC3339), oneLine(o.Error))
	}
	c := s.Counters
	a.printf("  files      %d open; %d bytes read, %d written; %d integrity failures, %d repairs\n", c.OpenFiles, c.BytesRead, c.BytesWritten, c.Integrity, c.Repairs)
}

// statusWait bounds how long a mount may take to answer; a hung one never does.
const statusWait = 5 * time.Second

// readStatus asks the mount for its status, through an extended attribute.
func readStatus(ctx context.Context, mountpoint string) (*cryptfs.Status, error) {
	text, err := readXattr(ctx, mountpoint, "user.kmsfs.status")
	if err != nil {
		return nil, err
	}
	s := &cryptfs.Status{}
	if err := json.Unmarshal(text, s); err != nil {
		return nil, fmt.Errorf("status of %s: %w", mountpoint, err)
	}
	return s, nil
}

// readXattr reads an attribute of a file on a mount, which may hang.
func readXattr(ctx context.Context, path, name string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, statusWait)
	defer cancel()
	return await(ctx, func() ([]byte, error) {
		for size := 4096; ; size *= 4 {
			value := make([]byte, size)
			n, err := unix.Lgetxattr(path, name, value)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if errors.Is(err, unix.ERANGE) && size < 1<<20 {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("%s of %s: %w", name, path, err)
			}
			return value[:n], nil
		}
	})
}
