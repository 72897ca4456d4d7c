package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

type rekeyOptions struct {
	openOptions
	class     string
	olderThan string
	paths     []string
	rate      float64
	restart   bool
	json      bool
}

func newRekeyCommand(a *app) *cobra.Command {
	var o rekeyOptions
	cmd := &cobra.Command{
		Use:   "rekey STORE [PATH...]",
		Short: "Encrypt files again, each under a new data key",
		Long: `Encrypt files of a store that is not mounted again, each under a new data key: all
of them, or those of a class, at or below paths of the plaintext tree, or whose
data keys are old. Mode, owner, times, attributes, holes and hard links stay.

Each file changes in one step. When the command is interrupted, at any moment and
however hard, every file is whole, and the same command goes on where it ended.

To wrap the data keys for other keys of the key service without touching contents,
use kmsfs rewrap. Disks and backups may still hold the old contents, which the old
keys open.`,
		Example: `  kmsfs rekey ~/store
  kmsfs rekey --class phi --older-than 365d ~/store
  kmsfs rekey ~/store /patients/scans`,
		Args: operands("STORE", "[PATH...]"),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.store, o.paths = args[0], args[1:]
			return a.runRekey(cmd.Context(), o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.class, "class", "", "only files of this `CLASS`")
	f.StringVar(&o.olderThan, "older-than", "", "only files made before `TIME`: 2026-01-31, 2026-01-31T12:00:00Z, or an age such as 90d or 12h")
	f.Float64Var(&o.rate, "rate", 0, "at most `N` files a second (default: no limit)")
	f.BoolVar(&o.restart, "restart", false, "begin anew, where an unfinished rekey had other options")
	f.BoolVar(&o.json, "json", false, "print JSON")
	addTrustFlag(cmd, &o.trust)
	return cmd
}

func (a *app) runRekey(ctx context.Context, o rekeyOptions) (err error) {
	cutoff, err := parseAge(o.olderThan, time.Now())
	if err != nil {
		return err
	}
	job, bar, err := a.newJob("rekeying", o.rate)
	if err != nil {
		return err
	}
	v, err := a.openForJob(ctx, o.openOptions)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	report, err := v.Rekey(ctx, cryptfs.RekeyConfig{
		JobConfig: job, Class: o.class, Paths: o.paths, OlderThan: cutoff, Restart: o.restart,
		Selection: strings.Join(append([]string{o.class, o.olderThan}, o.paths...), "\x00"),
	})
	bar.finish()
	if report != nil {
		if perr := a.printRekey(o, report); perr != nil && err == nil {
			err = perr
		}
	}
	switch {
	case errors.Is(err, cryptfs.ErrOtherJob):
		return hint(fmt.Errorf("a rekey with other options is unfinished: %w", err), "give the same options to go on with it, or --restart to begin anew")
	case errors.Is(err, cryptfs.ErrNoClass):
		return usage(err.Error(), "kmsfs policy show "+shellQuote(o.store)+" lists the classes")
	case err != nil:
		return a.jobHint(err)
	}
	return failuresVerdict("files keep their old data keys", report.Failures)
}

func (a *app) printRekey(o rekeyOptions, r *cryptfs.RekeyReport) error {
	if o.json {
		return a.printJSON(r)
	}
	a.printFailures(r.Failures)
	a.printf("%d files rekeyed, %d bytes", r.Rekeyed, r.Bytes)
	if r.Resumed {
		a.printf("; %d done before", r.Done)
	}
	if r.Younger > 0 {
		a.printf("; %d are younger", r.Younger)
	}
	a.printf("; %d failed\n", len(r.Failures))
	return nil
}

func (a *app) printFailures(failures []cryptfs.JobFailure) {
	for _, f := range failures {
		a.printf("%s: %s: %s\n", printable(f.Path), f.Name, oneLine(f.What))
	}
}

// openForJob opens a store that nobody may use meanwhile.
func (a *app) openForJob(ctx context.Context, o openOptions) (*volume, error) {
	v, err := a.openStore(ctx, o)
	if errors.Is(err, cryptfs.ErrLocked) {
		return nil, fail(err, o.store+" is mounted, or in use by another command", "unmount it first (kmsfs status lists the mounts); this works on a store that is not mounted")
	}
	return v, err
}

// jobHint says how to go on.
func (a *app) jobHint(err error) error {
	switch {
	case errors.Is(err, context.Canceled):
		a.note("the same command goes on where this one ended")
		return err
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return hint(err, "nothing is lost; make room, and give the same command again")
	case fault.Of(err) == fault.KeyUnavailable:
		return hint(err, "nothing is lost; give the same command again when the key service answers")
	}
	return err
}

// failuresVerdict turns files that a job could not do into its outcome: damage
// weighs more than keys, and keys more than the rest.
func failuresVerdict(what string, failures []cryptfs.JobFailure) error {
	if len(failures) == 0 {
		return nil
	}
	text := fmt.Sprintf("%d %s", len(failures), what)
	cause := error(nil)
	for _, f := range failures {
		switch f.Kind {
		case fault.Integrity, fault.BadFormat:
			return fail(errDamage, text, "restore what is listed from a backup, or remove it; then the same command goes on")
		case fault.KeyDenied, fault.KeyMissing, fault.KeyRevoked, fault.KeyExpired, fault.KeyRejected:
			cause = errKeysNotUsable
		}
	}
	if cause == nil {
		return fail(errors.New(text), text, "see the messages above; then the same command goes on")
	}
	return fail(cause, text, "make the keys named above available; then the same command goes on")
}

// parseAge reads --older-than; "" is the zero time.
func parseAge(s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	for _, layout := range []string{time.RFC3339, time.DateOnly, time.DateTime, "2006-01-02T15:04"} {
		if t, err := time.ParseInLocation(layout, s, time.Local); err == nil {
			return t, nil
		}
	}
	if days, ok := strings.CutSuffix(s, "d"); ok {
		if n, err := strconv.Atoi(days); err == nil && n >= 0 && n < 100_000 {
			return now.AddDate(0, 0, -n), nil
		}
	}
	if d, err := time.ParseDuration(s); err == nil && d >= 0 {
		return now.Add(-d), nil
	}
	return time.Time{}, usage(fmt.Sprintf("--older-than %q is neither a time nor an age", s), "give 2026-01-31, 2026-01-31T12:00:00Z, 90d or 12h")
}

// newJob returns a job's configuration: its pace, and its progress bar.
func (a *app) newJob(what string, rate float64) (cryptfs.JobConfig, *jobBar, error) {
	if rate < 0 || rate > 1e6 {
		return cryptfs.JobConfig{}, nil, usage(fmt.Sprintf("--rate %v is no number of files a second", rate), "give a number above 0")
	}
	_, shown := terminal(a.stderr)
	bar := &jobBar{a: a, what: what, shown: shown}
	job := cryptfs.JobConfig{Progress: bar.at}
	if rate > 0 {
		p := &pace{every: time.Duration(float64(time.Second) / rate)}
		job.Wait = p.wait
	}
	return job, bar, nil
}

// pace lets one caller pass in each interval.
type pace struct {
	every time.Duration

	mu   sync.Mutex
	next time.Time
}

func (p *pace) wait(ctx context.Context) error {
	p.mu.Lock()
	at := p.next
	if now := time.Now(); at.Before(now) {
		at = now
	}
	p.next = at.Add(p.every)
	p.mu.Unlock()
	t := time.NewTimer(time.Until(at))
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// jobBar shows bytes done, files, and the time that is left, on a terminal only.
type jobBar struct {
	a     *app
	what  string
	shown bool

	mu  sync.Mutex
	bar *progressbar.ProgressBar
}

func (b *jobBar) at(p cryptfs.JobProgress) {
	if !b.shown {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.bar == nil {
		b.bar = progressbar.NewOptions64(int64(p.TotalBytes),
			progressbar.OptionSetWriter(b.a.stderr),
			progressbar.OptionShowBytes(true),
			progressbar.OptionSetPredictTime(true),
			progressbar.OptionThrottle(100*time.Millisecond),
			progressbar.OptionClearOnFinish(),
		)
	}
	b.bar.Describe(fmt.Sprintf("%s %d of %d files", b.what, p.Files, p.TotalFiles))
	_ = b.bar.Set64(int64(min(p.Bytes, p.TotalBytes))) // what cannot be shown is no failure
}

func (b *jobBar) finish() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.bar != nil {
		_ = b.bar.Finish()
	}
}
