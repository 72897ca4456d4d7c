package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/fs/cryptfs"
	"github.com/kmsfs/kmsfs/fs/salvage"
)

type salvageOptions struct {
	source, out string
	trust       bool
	json        bool
}

func newSalvageCommand(a *app) *cobra.Command {
	var o salvageOptions
	cmd := &cobra.Command{
		Use:   "salvage STORE OUT",
		Short: "Write whatever can still be read of a damaged store, or of copies of its files",
		Long: `Write whatever can still be read of STORE to the new directory OUT, decrypted.
STORE is a store, however damaged, a directory of copies of its files, or one
file; it is never changed. A file needs its header and its key, and nothing else.

Damaged parts of a file become zeros and are listed by offset and length. Files
whose names are lost go to OUT/` + salvage.LostDir + `, named by their file ids. What cannot be
read is listed with the reason.

Without the store record nothing in STORE tells which keys are its own: the keys
that this machine trusts for the store's id are used, or with --trust those that
the files name. Whoever could write there could then have put in files of their own.

Exit code 0: everything is whole. 4: something is damaged, lost or without its
name. 5: something could not be read for want of a key. Others as usual.`,
		Example: `  kmsfs salvage ~/store /mnt/rescue/plain
  kmsfs salvage --trust --json ./copies out | jq -r '.problems[] | select(.zeroed) | .out'`,
		Args: operands("STORE", "OUT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.source, o.out = args[0], args[1]
			return a.runSalvage(cmd.Context(), o)
		},
	}
	cmd.Flags().BoolVar(&o.json, "json", false, "print JSON")
	cmd.Flags().BoolVar(&o.trust, "trust", false, "accept stores that are new to this machine, with the keys they or their files name")
	return cmd
}

// salvageResult is what --json prints.
type salvageResult struct {
	Source   string `json:"source"`
	Out      string `json:"out"`
	Complete bool   `json:"complete"` // false: ended before everything was looked at
	*salvage.Report
}

func (a *app) runSalvage(ctx context.Context, o salvageOptions) error {
	s, err := salvage.Open(ctx, o.source)
	if err != nil {
		return hint(err, "give a store, a directory of copies of its files, or one file")
	}
	defer s.Close()
	keys, err := a.salvageKeys(ctx, s, o)
	if err != nil {
		return err
	}
	services, err := a.global.providerConfig()
	if err != nil {
		return err
	}
	var uris []string
	for _, classes := range keys {
		uris = append(uris, allKeys(classes)...)
	}
	p, err := openProviders(ctx, services, uris, a.passphraseSource(ctx), a.log())
	if err != nil {
		return err
	}
	defer p.Close()
	bar := a.newTotal("salvaging", cryptfs.FsckCount{Files: s.Files()}, true)
	report, err := s.Write(ctx, salvage.Config{Out: o.out, Provider: p, Keys: keys, SameKey: p.sameKey, Log: a.log(), Progress: bar.at})
	bar.finish()
	if errors.Is(err, salvage.ErrNotEmpty) || errors.Is(err, salvage.ErrInside) {
		return hint(err, "give a directory for OUT that does not exist")
	}
	if o.json {
		if jerr := a.printJSON(salvageResult{o.source, o.out, err == nil, report}); jerr != nil {
			return errors.Join(err, jerr)
		}
	} else {
		a.printSalvage(report)
	}
	if err != nil {
		a.note("ended early: %d files are in %s, each of them as the report says", report.Files, o.out)
		return err
	}
	return salvageVerdict(o, report)
}

// salvageKeys returns the keys that the source's files may be under, by store:
// those of a trusted store record, those pinned on this machine, or, if the user
// says so, those that the files name.
func (a *app) salvageKeys(ctx context.Context, s *salvage.Source, o salvageOptions) (map[envelope.ID]map[string][]string, error) {
	file, err := a.global.knownStoresPath()
	if err != nil {
		return nil, err
	}
	known, err := loadKnownStores(file)
	if err != nil {
		return nil, err
	}
	out := map[envelope.ID]map[string][]string{}
	for _, st := range s.Stores() {
		facts := storeFacts{id: st.ID.String(), path: st.Dir, keys: st.Keys}
		pinned := known.byID(facts.id)
		switch {
		case st.Recorded:
			if err := a.checkTrust(ctx, known, facts, o.trust); err != nil {
				return nil, err
			}
		case pinned != nil:
			a.warn("no store record of %s in %s: using the keys that this machine trusts for it", facts.id, o.source)
			facts.keys = pinned.Keys
		case !o.trust:
			return nil, fail(errNotTrusted,
				fmt.Sprintf("%s has files of store %s without its record, and this machine does not know the store; the files name %s", o.source, facts.id, keyList(facts.keys)),
				"if these are its keys, give --trust")
		default:
			a.warn("no store record of %s in %s: using the keys that its files name", facts.id, o.source)
		}
		out[st.ID] = facts.keys
	}
	return out, nil
}

func (a *app) printSalvage(r *salvage.Report) {
	for _, n := range r.Notes {
		a.printf("note: %s\n", oneLine(n))
	}
	for _, p := range r.Problems {
		line := printable(p.Source)
		if p.Out != "" {
			line += " -> " + printable(p.Out)
		}
		a.printf("%s: %s: %s\n", line, p.State, oneLine(p.What))
		for _, z := range p.Zeroed {
			a.printf("    zeros at %d, %d bytes\n", z.Offset, z.Length)
		}
	}
	a.printf("%d directories, %d files, %d others written; %d bytes authenticated; %d problems\n",
		r.Directories, r.Files, r.Others, r.Bytes, len(r.Problems))
}

func salvageVerdict(o salvageOptions, r *salvage.Report) error {
	text := fmt.Sprintf("%s: %d problems", o.source, len(r.Problems))
	switch {
	case r.Damaged():
		return fail(errDamage, text, "restore what is listed from a backup, if there is one")
	case r.KeysMissing():
		return fail(errKeysNotUsable, text, "make the keys named above available, and salvage once more")
	}
	return nil
}
