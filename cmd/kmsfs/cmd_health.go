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
  4  something in the store failed authentication within --since
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
	damage, keys := 0, 0
	var last cryptfs.Failure
	for _, f := range h.Failures {
		if f.Damage {
			damage++
			last = f
		} else {
			keys++
			if damage == 0 {
				last = f
			}
		}
	}
	when := func() string { return last.Time.Format(time.RFC3339) + ": " + oneLine(last.Error) }
	switch {
	case damage > 0:
		return exitDamage, fmt.Sprintf("%d failures of authentication, the last %s", damage, when()), "run kmsfs fsck on the store, and compare with a backup"
	case keys > 0:
		return exitFailure, fmt.Sprintf("works now, but keys failed %d times, the last %s", keys, when()), "what ran meanwhile may have left out files: run it again"
	}
	return exitOK, fmt.Sprintf("healthy, %d classes", len(h.Classes)), ""
}
