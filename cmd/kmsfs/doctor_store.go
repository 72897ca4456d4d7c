package main

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/kmsfs/kmsfs/fs/doctor"
)

// storePlace is where a store is.
type storePlace struct {
	path    string // of the store, "" without one
	mounted bool
}

// findMounts looks at the mounts of the store, or at all if there is none, and
// finds out where the store is if a mountpoint was given.
func findMounts(ctx context.Context, store string) (storePlace, []doctor.Finding) {
	const check = "store.mounts"
	place := storePlace{path: store}
	all, err := kmsfsMounts()
	if err != nil {
		return place, []doctor.Finding{{Check: check, Level: doctor.Error, Text: err.Error(), Remedy: "mount /proc"}}
	}
	if store != "" {
		if at, err := mountpointPath(store); err == nil {
			if m := mountAt(all, at); m != nil {
				place.path = m.Source
			}
		}
		if real, err := realPath(place.path); err == nil {
			place.path = real
		}
	}
	var out []doctor.Finding
	for _, m := range all {
		if store == "" || m.Source == place.path {
			place.mounted = true
			out = append(out, mountFinding(ctx, m))
		}
	}
	if len(out) == 0 {
		out = append(out, doctor.Finding{Check: check, Level: doctor.OK, Subject: place.path, Text: "not mounted"})
	}
	return place, out
}

func mountFinding(ctx context.Context, m mountEntry) doctor.Finding {
	f := doctor.Finding{Check: "store.mounts", Level: doctor.OK, Subject: m.Mountpoint}
	s, err := readStatus(ctx, m.Mountpoint)
	if err != nil {
		f.Level, f.Text = doctor.Error, "does not answer: "+err.Error()
		f.Remedy = "kmsfs umount " + shellQuote(m.Mountpoint) + ", then mount again; as another user than who mounted, ask as that user"
		return f
	}
	f.Text = fmt.Sprintf("served by process %d", s.PID)
	var lost []string
	for _, c := range s.Classes {
		if !c.Available {
			lost = append(lost, c.Name)
		}
	}
	if len(lost) > 0 {
		f.Level, f.Text = doctor.Warning, f.Text+"; its classes are not all available: "+strings.Join(lost, ", ")
		f.Remedy = "the mount's log tells why; kmsfs status " + shellQuote(m.Mountpoint)
	}
	return f
}

// known compares the store with what this machine trusts, and decides which keys
// may be asked about: only those that are trusted are ever called.
func (e *examination) known() []doctor.Finding {
	f := doctor.Finding{Check: "store.known", Level: doctor.Error, Subject: e.path}
	file, err := e.app.global.knownStoresPath()
	var known *knownStores
	if err == nil {
		known, err = loadKnownStores(file)
	}
	if err != nil {
		_, f.Text, f.Remedy = explain(err)
		return []doctor.Finding{f}
	}
	facts := e.facts()
	v, before := judge(known, facts)
	accept := "compare the keys, then: kmsfs known-stores accept " + shellQuote(e.path)
	switch v {
	case storeKnown:
		f.Level, f.Text = doctor.OK, "known, with these keys"
		e.trusted = allKeys(facts.keys)
	case storeNew:
		f.Level, f.Text, f.Remedy = doctor.Warning, "new to this machine: its keys were not asked about", accept+", or give --trust"
		if e.options.trust {
			f.Text = "new to this machine; its keys are " + keyList(facts.keys)
			e.trusted = allKeys(facts.keys)
		}
	case storeChanged:
		f.Text = "its keys changed: trusted here " + keyList(before.Keys) + ", the store says " + keyList(facts.keys)
		f.Remedy = accept
	case storeSwapped:
		f.Text = "another store was here: " + before.ID + ", now " + facts.id
		f.Remedy = accept
	}
	return []doctor.Finding{f}
}

func (e *examination) facts() storeFacts {
	facts := storeFacts{id: e.store.ID.String(), path: e.path, keys: map[string][]string{}}
	for _, c := range e.store.Classes {
		facts.keys[c.Name] = append(append([]string{}, c.Keys...), c.Retired...)
	}
	return facts
}

// keyringFile looks at the file alone; whether a store needs it, used says.
func (e *examination) keyringFile(path string, used bool, err error, protected bool) doctor.Finding {
	f := doctor.Finding{Check: "keyring.file", Level: doctor.OK, Subject: path}
	switch {
	case err == nil && protected:
		f.Text = "under a passphrase, which opens it"
	case err == nil:
		f.Level, f.Text = doctor.Info, "for its owner only, without a passphrase"
		f.Remedy = "kmsfs keyring passphrase protects a copy that gets lost; back the file up, apart from the store"
	case !used && os.IsNotExist(statOf(path)):
		f.Level, f.Text = doctor.Info, "there is none"
	default:
		f.Level = doctor.Error
		_, f.Text, f.Remedy = explain(err)
	}
	return f
}

func statOf(path string) error {
	_, err := os.Stat(path)
	return err
}
