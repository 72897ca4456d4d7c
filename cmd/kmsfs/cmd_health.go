package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

type healthOptions struct {
	mountpoint string
	since      time.Duration
	json       bool
}

func newHealthCommand(a *app) *cobra.Command {
	var o healthOptions
	cmd := &cobra.Command{
		Use:   "health MOUNTPOINT",
		Short: "Tell whether every class of a mount can use its keys now, and what failed of late",
		Long: `Ask a mount whether each class can wrap keys for new files and unwrap those of
files that are there, by calls without effect (DryRun), and what failed of late.
One line, and an exit code for backup hooks and monitors:

  0  every class works, and nothing failed of late
  1  every class works now, but keys failed within --since: what ran meanwhile
     may have left out files
  4  something in the store failed authentication since it was mounted, or the
     mount takes no changes any more
  5  a class cannot use its keys now
  6  the mount does not answer`,
		Example: `  kmsfs health /mnt/plain && borg create ::{now} /mnt/plain && kmsfs health --since 1h /mnt/plain
  kmsfs health --json /mnt/plain | jq '.classes[] | select(.unwrap[] | .ok | not)'`,
		Args:              operands("MOUNTPOINT"),
		ValidArgsFunction: completeMountpoints,
		RunE: func(cmd *cobra.Command, args []string) error {
			o.mountpoint = args[0]
			return a.runHealth(cmd.Context(), o)
		},
	}
	cmd.Flags().DurationVar(&o.since, "since", 10*time.Minute, "how far back failures count; 0: only what is true now")
	cmd.Flags().BoolVar(&o.json, "json", false, "print JSON")
	return cmd
}

// healthReport is what --json prints.
type healthReport struct {
	Mountpoint string `json:"mountpoint"`
	Healthy    bool   `json:"healthy"`
	Code       int    `json:"code"` // the exit code
	Summary    string `json:"summary"`
	*cryptfs.Health
}

func (a *app) runHealth(ctx context.Context, o healthOptions) error {
	if o.since < 0 {
		return usage("--since must not be negative", "give a duration such as 10m")
	}
	m, err := findMount(o.mountpoint)
	if err != nil {
		return err
	}
	h, err := readHealth(ctx, m.Mountpoint)
	if err != nil {
		return deadMount(*m, err)
	}
	kept := h.Failures[:0]
	for _, f := range h.Failures {
		if time.Since(f.Time) < o.since {
			kept = append(kept, f)
		}
	}
	h.Failures = kept
	code, text, hint := healthVerdict(h)
	if o.json {
		err := a.printJSON(healthReport{m.Mountpoint, code == exitOK, code, text, h})
		if code != exitOK {
			err = errors.Join(err, fail(healthError(code), m.Mountpoint+": "+text, hint))
		}
		return err
	}
	if code == exitOK {
		a.printf("%s: %s\n", m.Mountpoint, text)
		return nil
	}
	return fail(healthError(code), m.Mountpoint+": "+text, hint)
}

func readHealth(ctx context.Context, mountpoint string) (*cryptfs.Health, error) {
	text, err := readXattr(ctx, mountpoint, "user.kmsfs.health")
	if err != nil {
		return nil, err
	}
	h := &cryptfs.Health{}
	if err := json.Unmarshal(text, h); err != nil {
		return nil, fmt.Errorf("health of %s: %w", mountpoint, err)
	}
	return h, nil
}

// healthError has the error whose exit code is code.
func healthError(code int) error {
	switch code {
	case exitDamage:
		return errDamage
	case exitKeys:
		return errKeysNotUsable
	}
	return errFailedOfLate
}

// healthVerdict says what a report means, worst first.
func healthVerdict(h *cryptfs.Health) (code int, text, hint string) {
	if !h.Usable() {
		var bad []string
		for _, c := range h.Classes {
			for _, p := range append(c.Wrap, c.Unwrap...) {
				if !p.OK {
					bad = append(bad, fmt.Sprintf("class %s: %s", c.Name, oneLine(p.Error)))
					if hint == "" {
						hint = p.Hint
					}
				}
			}
		}
		return exitKeys, strings.Join(bad, "; "), hint
	}
	switch text := conditionText(h.Condition); h.Condition.State {
	case cryptfs.StateHalted:
		return exitDamage, text, "unmount, see to the reason, and mount again"
	case cryptfs.StateDamaged:
		return exitDamage, text, "run kmsfs fsck on the store, and compare with a backup; kmsfs status names the inodes"
	}
	keys := 0
	var last cryptfs.Failure
	for _, f := range h.Failures {
		if !f.Damage {
			keys++
			last = f
		}
	}
	if keys > 0 {
		return exitFailure, fmt.Sprintf("works now, but keys failed %d times, the last %s: %s", keys, last.Time.Format(time.RFC3339), oneLine(last.Error)),
			"what ran meanwhile may have left out files: run it again"
	}
	return exitOK, fmt.Sprintf("healthy, %d classes", len(h.Classes)), ""
}

// conditionText says in one line what is wrong with a mount's store; "" if
// nothing is.
func conditionText(c cryptfs.Condition) string {
	var out []string
	if h := c.Halt; h != nil {
		out = append(out, fmt.Sprintf("no changes are taken since %s: %s", h.Time.Format(time.RFC3339), oneLine(h.Error)))
	}
	if d := c.Damage; d.Count > 0 && d.First != nil && d.Last != nil && len(d.Recent) > 0 {
		out = append(out, fmt.Sprintf("%d failures of authentication since %s, the last %s: %s",
			d.Count, d.First.Format(time.RFC3339), d.Last.Format(time.RFC3339), oneLine(d.Recent[len(d.Recent)-1].Error)))
	}
	return strings.Join(out, "; ")
}
