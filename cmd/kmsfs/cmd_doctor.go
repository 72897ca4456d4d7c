package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsfs/kmsfs/crypto/keywrap/keypolicy"
	"github.com/kmsfs/kmsfs/fs/doctor"
)

type doctorOptions struct {
	store      string
	role       string
	policy     string
	principals []string
	classes    []string
	forKey     string
	json       bool
	trust      bool
	timeout    time.Duration
}

func newDoctorCommand(a *app) *cobra.Command {
	var o doctorOptions
	cmd := &cobra.Command{
		Use:   "doctor [STORE]",
		Short: "Find out what keeps a store from working, or write key policies for it",
		Long: `Look at FUSE, memory, the clock, credentials and the way to the key service, and
with STORE at its file system, its record, and each of its keys: state, rotation,
and whether it may be used for what. Nothing is changed and no key is unwrapped;
AWS KMS is asked with DryRun, which CloudTrail shows. Each finding comes with a
remedy. The exit code is 10 if there is an error among them.

With --policy, print the AWS key policy that gives a role what it needs of the
store's keys and no more: reader, writer (brings files in, opens none), user
(both), names (lists only), rewrapper, or auditor.`,
		Example: `  kmsfs doctor
  kmsfs doctor --role reader --json /srv/store
  kmsfs doctor --policy writer --principal arn:aws:iam::111122223333:role/ingest /srv/store`,
		Args: operands("[STORE]"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				o.store = args[0]
			}
			return a.runDoctor(cmd.Context(), o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.role, "role", "", "what this host is to do, so that nothing else is an error: a `ROLE` as with --policy")
	f.StringVar(&o.policy, "policy", "", "print the key policy of `ROLE`: reader, writer, user, names, rewrapper or auditor")
	f.StringArrayVar(&o.principals, "principal", nil, "with --policy: `ARN` of the IAM role or user; repeat for more (default role/kmsfs-ROLE of the key's account)")
	f.StringArrayVar(&o.classes, "class", nil, "with --policy: only this `CLASS`; repeat for more")
	f.StringVar(&o.forKey, "for", "", "with --policy: only for this `KEY`")
	f.BoolVar(&o.trust, "trust", false, "ask about the keys of a store that is new to this machine, which stays new")
	f.BoolVar(&o.json, "json", false, "print JSON")
	f.DurationVar(&o.timeout, "timeout", 5*time.Second, "how long each check may take")
	return cmd
}

func (a *app) runDoctor(ctx context.Context, o doctorOptions) error {
	if o.policy != "" {
		return a.runDoctorPolicy(ctx, o)
	}
	switch {
	case len(o.principals) > 0 || len(o.classes) > 0 || o.forKey != "":
		return usage("--principal, --class and --for belong to --policy", "kmsfs doctor --policy ROLE STORE prints a key policy")
	case o.timeout < 100*time.Millisecond || o.timeout > time.Hour:
		return usage(fmt.Sprintf("--timeout %v is out of range", o.timeout), "give 100ms to 1h, such as 5s")
	}
	needs, err := needsOf(o.role)
	if err != nil {
		return err
	}
	e := &examination{app: a, options: o, needs: needs}
	e.run(ctx)
	if err := ctx.Err(); err != nil {
		return err
	}
	errs, warnings := doctor.Count(e.findings, doctor.Error), doctor.Count(e.findings, doctor.Warning)
	if o.json {
		err = a.printJSON(map[string]any{"store": e.path, "findings": e.findings, "errors": errs, "warnings": warnings})
	} else {
		a.printFindings(e.findings)
	}
	if err == nil && errs > 0 {
		err = fail(errUnwell, fmt.Sprintf("%s found, %s", count(errs, "error"), count(warnings, "warning")), "do what the remedies above say")
	}
	return err
}

func count(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return fmt.Sprintf("%d %s", n, what)
}

// printFindings prints a line for each finding, and its remedy on a line below.
func (a *app) printFindings(findings []doctor.Finding) {
	width := 0
	for _, f := range findings {
		width = max(width, len(f.Check))
	}
	for _, f := range findings {
		text := oneLine(f.Text)
		if f.Subject != "" {
			text = printable(f.Subject) + ": " + text
		}
		a.printf("%-7s  %-*s  %s\n", f.Level, width, f.Check, text)
		if f.Remedy != "" {
			a.printf("%-7s  %*s  -> %s\n", "", width, "", oneLine(f.Remedy))
		}
	}
	a.printf("%s, %s\n", count(doctor.Count(findings, doctor.Error), "error"), count(doctor.Count(findings, doctor.Warning), "warning"))
}

// needsOf says what a host in a role has to be able to do; "" is no role.
func needsOf(role string) (doctor.Needs, error) {
	if role == "" {
		return nil, nil
	}
	r, err := parseRole("--role", role)
	if err != nil {
		return nil, err
	}
	needs := doctor.Needs{}
	for _, u := range map[keypolicy.Role][]doctor.Use{
		keypolicy.Reader:    {doctor.Mounts, doctor.Lists, doctor.Reads},
		keypolicy.Writer:    {doctor.Mounts, doctor.Lists, doctor.Creates},
		keypolicy.User:      {doctor.Mounts, doctor.Lists, doctor.Reads, doctor.Creates},
		keypolicy.Names:     {doctor.Mounts, doctor.Lists},
		keypolicy.Rewrapper: {doctor.Rewraps, doctor.Looks},
		keypolicy.Auditor:   {doctor.Looks},
	}[r] {
		needs[u] = true
	}
	return needs, nil
}

func parseRole(flag, role string) (keypolicy.Role, error) {
	r, err := keypolicy.ParseRole(role)
	if err != nil {
		var names []string
		for _, r := range keypolicy.Roles() {
			names = append(names, string(r))
		}
		return "", usage(fmt.Sprintf("%s %q is no role", flag, role), "the roles are "+strings.Join(names, ", "))
	}
	return r, nil
}

// examination is one run of kmsfs doctor.
type examination struct {
	app      *app
	options  doctorOptions
	needs    doctor.Needs
	path     string // of the store, "" without one
	store    *doctor.Store
	trusted  []string // keys that may be asked about
	mounted  bool
	findings []doctor.Finding
}

func (e *examination) check(ctx context.Context, checks ...doctor.Check) {
	e.findings = append(e.findings, doctor.Run(ctx, e.options.timeout, checks...)...)
}

// run looks at one thing after another where the second makes no sense without
// the first, and at everything else at once.
func (e *examination) run(ctx context.Context) {
	checks := doctor.Host{UID: os.Geteuid()}.Checks()
	// A check that hangs is left behind and may end at any time: what it finds for
	// the others goes through a pointer that is read once.
	var place atomic.Pointer[storePlace]
	e.check(ctx, doctor.Check{Name: "store.mounts", Run: func(ctx context.Context) []doctor.Finding {
		p, findings := findMounts(ctx, e.options.store)
		place.Store(&p)
		return findings
	}})
	e.path = e.options.store
	if p := place.Load(); p != nil {
		e.path, e.mounted = p.path, p.mounted
	}
	if e.options.store != "" {
		var store atomic.Pointer[doctor.Store]
		e.check(ctx, doctor.Check{Name: "store.record", Run: func(context.Context) []doctor.Finding {
			s, findings := doctor.ReadStore(e.path)
			store.Store(s)
			return findings
		}})
		e.store = store.Load()
	}
	if e.store != nil {
		e.findings = append(e.findings, e.known()...)
		checks = append(checks, e.store.Checks(e.mounted)...)
	}
	e.check(ctx, checks...)
	e.services(ctx)
}
