package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// storeFacts is what a store says about itself before any key was used: its
// record is read, not verified.
type storeFacts struct {
	id   string
	path string
	keys map[string][]string
}

// verdict says how a store's facts compare with the known-stores file.
type verdict int

const (
	storeKnown   verdict = iota // same keys as trusted before
	storeNew                    // never seen
	storeChanged                // known, but with other keys
	storeSwapped                // another store was at this path
)

// judge compares facts with what is known.
func judge(k *knownStores, facts storeFacts) (verdict, *knownStore) {
	if there := k.byPath(facts.path); there != nil && there.ID != facts.id {
		return storeSwapped, there
	}
	known := k.byID(facts.id)
	switch {
	case known == nil:
		return storeNew, nil
	case !sameKeys(known.Keys, facts.keys):
		return storeChanged, known
	}
	return storeKnown, known
}

// sameKeys compares class by class; the order of keys does not matter for
// trust, since every one of them may unwrap.
func sameKeys(a, b map[string][]string) bool {
	return maps.EqualFunc(a, b, func(x, y []string) bool {
		x, y = slices.Clone(x), slices.Clone(y)
		slices.Sort(x)
		slices.Sort(y)
		return slices.Equal(slices.Compact(x), slices.Compact(y))
	})
}

// keyList prints a key set on one line, classes in order.
func keyList(keys map[string][]string) string {
	return "{" + strings.Join(classLines(keys), "; ") + "}"
}

// classLines returns "class: key key" for every class, in order.
func classLines(keys map[string][]string) []string {
	out := make([]string, 0, len(keys))
	for _, class := range slices.Sorted(maps.Keys(keys)) {
		out = append(out, class+": "+strings.Join(keys[class], " "))
	}
	return out
}

// checkTrust decides whether a store may be opened with the keys it names. A
// store that is new here is accepted with trust, or by the answer on a
// terminal. A changed key set, and a path at which another store was before,
// are never accepted here: kmsfs known-stores accept is the one way.
func (a *app) checkTrust(ctx context.Context, k *knownStores, facts storeFacts, trust bool) error {
	v, known := judge(k, facts)
	switch v {
	case storeKnown:
		return nil
	case storeChanged:
		return fail(errNotTrusted,
			fmt.Sprintf("the keys of store %s (%s) changed: trusted here %s, the store says %s", facts.path, facts.id, keyList(known.Keys), keyList(facts.keys)),
			"if you know why they changed: kmsfs known-stores accept "+facts.path)
	case storeSwapped:
		return fail(errNotTrusted,
			fmt.Sprintf("%s was store %s and is now store %s with keys %s", facts.path, known.ID, facts.id, keyList(facts.keys)),
			"if you put another store there: kmsfs known-stores accept "+facts.path)
	}
	if trust {
		return nil
	}
	if !a.interactive() {
		return fail(errNotTrusted,
			fmt.Sprintf("store %s (%s) is new to this machine; its keys are %s", facts.path, facts.id, keyList(facts.keys)),
			"if these are its keys, give --trust")
	}
	a.describeStore(facts)
	yes, err := a.confirm(ctx, "Trust this store with these keys?")
	if err != nil {
		return err
	}
	if !yes {
		return fail(errNotTrusted, "store "+facts.path+" was not trusted", "nothing was changed")
	}
	return nil
}

// describeStore shows on standard error what a question is about.
func (a *app) describeStore(facts storeFacts) {
	a.note("store %s", facts.path)
	a.note("id    %s", facts.id)
	for _, line := range classLines(facts.keys) {
		a.note("class %s", line)
	}
}

// pinStore records that facts are trusted from now on. A store that is known
// with these keys only has its path brought up to date; one that changed since
// it was checked is refused, unless force says that the user accepted it.
func pinStore(path string, facts storeFacts, force bool) error {
	return updateKnownStores(path, func(k *knownStores) (bool, error) {
		v, known := judge(k, facts)
		if v == storeKnown && known.Path == facts.path {
			return false, nil
		}
		if !force && (v == storeChanged || v == storeSwapped) {
			return false, fail(errNotTrusted, "what this machine trusts about "+facts.path+" changed meanwhile", "try again")
		}
		entry := knownStore{ID: facts.id, Keys: facts.keys, Path: facts.path, Time: time.Now().UTC().Truncate(time.Second)}
		if v == storeKnown {
			entry.Time = known.Time
		}
		k.put(entry)
		return true, nil
	})
}
