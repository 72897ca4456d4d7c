package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsfs/kmsfs/crypto/audit"
)

func newAuditCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "audit",
		Short: "Check, show and report what an audit log tells",
		Long: `Check, show and report what an audit log tells: the file that a mount with
--audit FILE writes, with the files that it was rotated to, FILE.1, FILE.2, ….
All of it works beside the mount that writes the log.`,
		Example: `  kmsfs audit verify /var/log/kmsfs/audit.log
  kmsfs audit show --since 24h --result failed /var/log/kmsfs/audit.log
  kmsfs audit report --html report.html --log /var/log/kmsfs/audit.log ~/store`,
	}
	makeGroup(cmd)
	cmd.AddCommand(newAuditVerifyCommand(a), newAuditShowCommand(a), newAuditReportCommand(a))
	return cmd
}

type auditVerifyOptions struct {
	file  string
	heads []string
	json  bool
}

func newAuditVerifyCommand(a *app) *cobra.Command {
	var o auditVerifyOptions
	cmd := &cobra.Command{
		Use:   "verify FILE",
		Short: "Check that no line of an audit log is missing or changed",
		Long: `Check that no line of an audit log is missing, changed, moved or put in, and that
its end is not cut off. The chain holds no secret: whoever may write FILE and
FILE.head can rewrite both. Note the head that this command prints in another
place; with --head HASH a log that was rewritten before that line fails.

Exit code 0: the chain is whole; 4: it is not.`,
		Example: `  kmsfs audit verify /var/log/kmsfs/audit.log
  kmsfs audit verify --json audit.log | jq -r .head`,
		Args: operands("FILE"),
		RunE: func(_ *cobra.Command, args []string) error {
			o.file = args[0]
			return a.runAuditVerify(o)
		},
	}
	cmd.Flags().StringArrayVar(&o.heads, "head", nil, "`HASH` of a line, as noted earlier; may be repeated")
	cmd.Flags().BoolVar(&o.json, "json", false, "print JSON")
	return cmd
}

// auditVerdict is what --json prints.
type auditVerdict struct {
	OK bool `json:"ok"`
	audit.Report
}

func (a *app) runAuditVerify(o auditVerifyOptions) error {
	for i, h := range o.heads {
		h = strings.ToLower(strings.TrimSpace(h))
		if len(h) != 64 || strings.Trim(h, "0123456789abcdef") != "" {
			return usage(fmt.Sprintf("--head %q is no hash", o.heads[i]), "give the 64 hexadecimal digits that kmsfs audit verify printed as head")
		}
		o.heads[i] = h
	}
	r, err := audit.Verify(o.file, o.heads...)
	if err != nil {
		return auditFailure(o.file, err)
	}
	if o.json {
		if r.Problems == nil {
			r.Problems = []audit.Finding{}
		}
		if r.Warnings == nil {
			r.Warnings = []audit.Finding{}
		}
		if err := a.printJSON(auditVerdict{r.OK(), r}); err != nil {
			return err
		}
	} else {
		a.printVerdict(&r)
	}
	if !r.OK() {
		return brokenChain(o.file, &r)
	}
	return nil
}

func (a *app) printVerdict(r *audit.Report) {
	for _, p := range r.Problems {
		a.printf("problem: %s\n", oneLine(p.String()))
	}
	for _, w := range r.Warnings {
		a.printf("note: %s\n", oneLine(w.String()))
	}
	if r.More > 0 {
		a.printf("and %d more\n", r.More)
	}
	if r.Lines == 0 {
		a.printf("no lines\n")
		return
	}
	a.printf("lines %d to %d in %d files, %s to %s\nhead %s\n", r.First, r.Last, len(r.Files),
		r.From.Format(time.RFC3339), r.To.Format(time.RFC3339), r.Head)
}

func brokenChain(file string, r *audit.Report) error {
	return fail(errDamage, fmt.Sprintf("%s: the chain is broken: %s", file, r.Problems[0]), "compare the log with a copy, or with CloudTrail, which has the same request ids")
}

// auditFailure gives the failures of reading a log their words.
func auditFailure(file string, err error) error {
	switch {
	case errors.Is(err, audit.ErrNoLog):
		return fail(errUsage, fmt.Sprintf("there is no audit log %s", file), "give the FILE of kmsfs mount --audit FILE")
	case errors.Is(err, audit.ErrFile):
		return fail(errUsage, err.Error(), "give the FILE of kmsfs mount --audit FILE")
	}
	return err
}

type auditShowOptions struct {
	file   string
	since  string
	until  string
	class  string
	key    string
	result string
	json   bool
}

func newAuditShowCommand(a *app) *cobra.Command {
	var o auditShowOptions
	cmd := &cobra.Command{
		Use:   "show FILE",
		Short: "Print the events of an audit log",
		Long: `Print the events of an audit log, oldest first. Times are RFC 3339, a date
(UTC), or a time span ago such as 24h. A log whose chain is broken is shown as
well, with a warning.`,
		Example: `  kmsfs audit show --since 2026-11-01 --class phi audit.log
  kmsfs audit show --result failed --json audit.log | jq -r '.events[].request'`,
		Args: operands("FILE"),
		RunE: func(_ *cobra.Command, args []string) error {
			o.file = args[0]
			return a.runAuditShow(o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.since, "since", "", "only events at or after `TIME`")
	f.StringVar(&o.until, "until", "", "only events before `TIME`")
	f.StringVar(&o.class, "class", "", "only events of this `CLASS`")
	f.StringVar(&o.key, "key", "", "only events of this `KEY`")
	f.StringVar(&o.result, "result", "", "only this `RESULT`: ok, failed, or a kind of failure such as key-denied")
	f.BoolVar(&o.json, "json", false, "print JSON")
	return cmd
}

// auditTime reads --since and --until; "" is the zero time.
func auditTime(flag, s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	for _, layout := range []string{time.RFC3339Nano, time.DateOnly} {
		if t, err := time.Parse(layout, s); err == nil {
			return t, nil
		}
	}
	if d, err := time.ParseDuration(s); err == nil && d >= 0 {
		return now.Add(-d), nil
	}
	return time.Time{}, usage(fmt.Sprintf("--%s %q is no time", flag, s), "give 2026-11-23T08:00:00Z, 2026-11-23, or a time span ago such as 24h")
}

// filter returns what the options let through.
func (o *auditShowOptions) filter(now time.Time) (func(*audit.Event) bool, error) {
	since, err := auditTime("since", o.since, now)
	if err != nil {
		return nil, err
	}
	until, err := auditTime("until", o.until, now)
	if err != nil {
		return nil, err
	}
	return func(e *audit.Event) bool {
		switch {
		case e.Time.Before(since), !until.IsZero() && !e.Time.Before(until),
			o.class != "" && e.Class != o.class, o.key != "" && e.Key != o.key:
			return false
		case o.result == "failed":
			return e.Failed()
		}
		return o.result == "" || e.Result == o.result
	}, nil
}

func (a *app) runAuditShow(o auditShowOptions) error {
	want, err := o.filter(time.Now())
	if err != nil {
		return err
	}
	shown := 0
	if o.json {
		a.printf("{\n  \"events\": [")
	}
	r, err := audit.Walk(o.file, func(e audit.Event) error {
		if !want(&e) {
			return nil
		}
		shown++
		if o.json {
			return a.showJSON(&e, shown)
		}
		a.showLine(&e)
		return a.outErr
	})
	if o.json {
		a.printf("\n  ]\n}\n")
	}
	if err != nil {
		return auditFailure(o.file, err)
	}
	if !r.OK() {
		a.warn("the chain is broken, see kmsfs audit verify %s", shellQuote(o.file))
	}
	return nil
}

// showJSON prints one element of the array, so that a log of any size can be
// shown.
func (a *app) showJSON(e *audit.Event, n int) error {
	b, err := json.Marshal(e)
	if err != nil {
		return err
	}
	comma := ","
	if n == 1 {
		comma = ""
	}
	a.printf("%s\n    %s", comma, b)
	return a.outErr
}

func (a *app) showLine(e *audit.Event) {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s", e.Time.Format("2006-01-02T15:04:05.000Z07:00"), e.Kind)
	word := func(name, value string) {
		if value != "" {
			fmt.Fprintf(&b, " %s%s", name, printable(value))
		}
	}
	word("", e.Op)
	word("class=", e.Class)
	word("key=", e.Key)
	word("file=", e.File)
	word("source=", e.Source)
	if e.Caller != nil {
		fmt.Fprintf(&b, " uid=%d pid=%d", e.UID, e.PID)
		word("program=", e.Program)
	}
	word("request=", e.Request)
	if e.Lost > 0 {
		fmt.Fprintf(&b, " lost=%d", e.Lost)
	}
	word("", e.Result)
	word("", e.Code)
	if e.Detail != "" {
		fmt.Fprintf(&b, " (%s)", e.Detail)
	}
	a.printf("%s\n", oneLine(b.String()))
}
