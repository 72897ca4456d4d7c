package main

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsfs/kmsfs/crypto/audit"
	"github.com/kmsfs/kmsfs/fs/classify"
	"github.com/kmsfs/kmsfs/fs/report"
	"github.com/kmsfs/kmsfs/fs/rewrap"
)

type auditReportOptions struct {
	openOptions
	html string
	log  string
}

func newAuditReportCommand(a *app) *cobra.Command {
	var o auditReportOptions
	cmd := &cobra.Command{
		Use:   "report --html FILE [--log AUDITLOG] STORE",
		Short: "Write a page about a store's keys that an auditor can read",
		Long: `Write one HTML page about a store, mounted or not: classes and keys with states
and ages, files and bytes under each key, what depends on keys pending deletion,
and from the audit log key use over time, denials, integrity events, and whether
the log's chain is whole. The page loads nothing from anywhere. No key is used;
the key services are asked about their keys. FILE "-" is standard output.`,
		Example: `  kmsfs audit report --html report.html --log /var/log/kmsfs/audit.log ~/store`,
		Args:    operands("STORE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.store = args[0]
			return a.runAuditReport(cmd.Context(), o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.html, "html", "", "write the page to `FILE`")
	f.StringVar(&o.log, "log", "", "the store's audit log `FILE`")
	addTrustFlag(cmd, &o.trust)
	return cmd
}

func (a *app) runAuditReport(ctx context.Context, o auditReportOptions) error {
	if o.html == "" {
		return usage("--html FILE is missing", "name the file for the page, or - for standard output")
	}
	info, facts, err := inspectStore(o.store)
	if err != nil {
		return err
	}
	d := &report.Data{StoreID: facts.id, Store: facts.path, Made: time.Now(), Version: version, Classes: reportClasses(info.Policy, info.Keys, info.Retired)}
	var events report.Collector
	if o.log != "" {
		if d.Log, err = reportLog(o.log, facts.id, &events); err != nil {
			return auditFailure(o.log, err)
		}
		d.Activity = events.Activity()
	}
	if err := a.reportKeys(ctx, o, d, &events); err != nil {
		return err
	}
	var page bytes.Buffer
	if err := report.Render(&page, d); err != nil {
		return err
	}
	if o.html == "-" {
		a.printf("%s", page.Bytes())
		return a.outErr
	}
	if err := replaceFile(o.html, page.Bytes(), 0o600); err != nil {
		return err
	}
	if d.Log != nil && len(d.Log.Problems) > 0 {
		a.warn("the audit log's chain is broken, see kmsfs audit verify %s", shellQuote(o.log))
	}
	a.printf("%s\n", printable(o.html))
	return nil
}

func reportClasses(policy *classify.Policy, keys, retired map[string][]string) (out []report.Class) {
	for _, name := range slices.Sorted(maps.Keys(keys)) {
		c := report.Class{Name: name, Retired: retired[name]}
		for _, key := range keys[name] {
			if !slices.Contains(retired[name], key) {
				c.Keys = append(c.Keys, key)
			}
		}
		if p, ok := policy.Classes[name]; ok {
			c.Names, c.Cache, c.DataKeys = string(p.Names), p.Cache, "per-file"
			if p.Shared {
				c.DataKeys = "shared"
			}
		}
		out = append(out, c)
	}
	return out
}

// reportLog verifies the log and counts its events of the store.
func reportLog(path, store string, events *report.Collector) (*report.Log, error) {
	r, err := audit.Walk(path, func(e audit.Event) error {
		if e.Store == "" || e.Store == store {
			events.Add(&e)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	full, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	out := &report.Log{Path: full, Files: len(r.Files), Lines: r.Lines, First: r.First, Last: r.Last, Head: r.Head, From: r.From, To: r.To, Lost: r.Lost,
		Problems: findings(r.Problems), Warnings: findings(r.Warnings)}
	if r.More > 0 {
		out.Warnings = append(out.Warnings, fmt.Sprintf("and %d more findings", r.More))
	}
	return out, nil
}

// shownFindings is how many findings of a kind the page lists.
const shownFindings = 50

func findings(list []audit.Finding) (out []string) {
	for i, f := range list {
		if i == shownFindings {
			return append(out, fmt.Sprintf("and %d more: kmsfs audit verify lists them", len(list)-i))
		}
		out = append(out, f.String())
	}
	return out
}

// reportKeys fills in what the store and the key services tell of the keys.
func (a *app) reportKeys(ctx context.Context, o auditReportOptions, d *report.Data, events *report.Collector) error {
	s, p, err := a.openRaw(ctx, o.openOptions, 0)
	if err != nil {
		return err
	}
	defer p.Close()
	defer s.Close()
	bar := a.newProgress("looking", "files")
	inv, err := s.Inventory(ctx, bar.at)
	bar.finish()
	if err != nil {
		return err
	}
	used, err := s.LastUsed()
	if err != nil {
		return err
	}
	d.Counted, d.Uncounted = true, uint64(len(inv.Problems))
	for _, k := range inv.Keys {
		if t := events.LastUsed(k.Key); t.After(used[k.Key]) {
			used[k.Key] = t
		}
		d.Keys = append(d.Keys, reportKey(describeKey(ctx, p, k, rewrap.Verdict{}, used)))
	}
	return nil
}

func reportKey(r *keyReport) report.Key {
	at := func(t *time.Time) time.Time {
		if t == nil {
			return time.Time{}
		}
		return *t
	}
	k := report.Key{URI: r.Key, State: r.State, Error: r.Error, Created: at(r.Created), Rotation: r.Rotation, Rotated: at(r.Rotated),
		DeletionAt: at(r.DeletionAt), LastUsed: at(r.LastUsed), NameKeys: r.NameKeys, StoreKeys: r.StoreKeys}
	if r.Error != "" {
		k.State = ""
	}
	for _, class := range slices.Sorted(maps.Keys(r.Classes)) {
		c := r.Classes[class]
		k.Uses = append(k.Uses, report.Dependence{Class: class, Files: c.Sole.Files + c.Several.Files, Bytes: c.Sole.Bytes + c.Several.Bytes,
			OnlyFiles: c.Sole.Files, OnlyBytes: c.Sole.Bytes})
	}
	for _, id := range slices.Sorted(maps.Keys(r.Materials)) {
		m := r.Materials[id]
		k.Materials = append(k.Materials, report.Material{ID: id, Files: m.Sole.Files + m.Several.Files, Bytes: m.Sole.Bytes + m.Several.Bytes})
	}
	return k
}
