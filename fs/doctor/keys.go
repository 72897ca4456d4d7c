package doctor

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// Service is a key service that can be asked without effect.
type Service interface {
	keywrap.Provider
	keywrap.Checker
}

// Use is something that a store needs its keys for.
type Use string

// The uses.
const (
	Mounts  Use = "mount"  // opens the store's record
	Lists   Use = "list"   // opens the class's names
	Reads   Use = "read"   // opens files
	Creates Use = "create" // makes files
	Rewraps Use = "rewrap" // gives files other recipients
	Looks   Use = "look"   // sees a key's state
)

// uses are what Check asks about each class, in order.
var uses = []Use{Mounts, Lists, Reads, Creates, Rewraps}

// Needs says what this host is to do with the store: a use that does not work is
// an error if it is needed, else only worth knowing. Nil is a host that reads
// and writes, of which each may be missing on purpose: a warning.
type Needs map[Use]bool

func (n Needs) level(u Use) Level {
	switch {
	case n[u]:
		return Error
	case n != nil || u == Rewraps || u == Looks:
		return Info
	case u == Reads || u == Creates:
		return Warning
	}
	return Error
}

// KeyChecks returns a check for each of the given keys of the store, and one for
// each class and use, asked of s. The keys are those that this machine trusts;
// no other is called.
func (st *Store) KeyChecks(s Service, keys []string, needs Needs) []Check {
	var out []Check
	for _, key := range st.Keys() {
		if slices.Contains(keys, key) {
			out = append(out, Check{"key.state", func(ctx context.Context) []Finding { return keyState(ctx, s, key, needs) }})
		}
	}
	for _, c := range st.Classes {
		own := c
		own.Keys, own.Retired = intersect(c.Keys, keys), intersect(c.Retired, keys)
		if len(own.all()) == 0 {
			continue
		}
		for _, u := range uses {
			out = append(out, Check{"class." + string(u), func(ctx context.Context) []Finding { return st.try(ctx, s, own, u, needs) }})
		}
	}
	return out
}

func intersect(list, with []string) []string {
	var out []string
	for _, s := range list {
		if slices.Contains(with, s) {
			out = append(out, s)
		}
	}
	return out
}

// keyState asks for a key's description.
func keyState(ctx context.Context, s Service, key string, needs Needs) []Finding {
	d, err := s.Describe(ctx, key)
	if errors.Is(err, keywrap.ErrDenied) {
		return one("key.state", needs.level(Looks), key, "its state may not be looked at", "kms:DescribeKey allows it; nothing but kmsfs doctor, keys and init needs it")
	}
	if err != nil {
		return one("key.state", Error, key, reason(err), remedyOf(err))
	}
	return append(stateFinding(d, key), rotationFinding(d, key, time.Now())...)
}

func stateFinding(d keywrap.Description, key string) []Finding {
	const check = "key.state"
	switch d.State {
	case keywrap.Enabled:
		return one(check, OK, key, "enabled", "")
	case keywrap.Disabled:
		return one(check, Error, key, "disabled", enableRemedy(key))
	case keywrap.PendingDeletion:
		text := "pending deletion: whatever has no other recipient is lost with it"
		if !d.DeletionAt.IsZero() {
			text = fmt.Sprintf("pending deletion on %s: whatever has no other recipient is lost then", d.DeletionAt.UTC().Format(time.DateTime+" MST"))
		}
		return one(check, Error, key, text, cancelRemedy(key))
	}
	return one(check, Error, key, "not usable: "+string(d.State), "aws kms describe-key --key-id "+key+" tells why")
}

func enableRemedy(key string) string {
	if name, ok := strings.CutPrefix(key, "keyring:"); ok {
		return "kmsfs keyring enable " + name
	}
	return "aws kms enable-key --key-id " + key
}

func cancelRemedy(key string) string {
	if name, ok := strings.CutPrefix(key, "keyring:"); ok {
		return "kmsfs keyring cancel-deletion " + name + ", then kmsfs keyring enable " + name
	}
	return "aws kms cancel-key-deletion --key-id " + key + ", then enable-key"
}

func rotationFinding(d keywrap.Description, key string, now time.Time) []Finding {
	const check = "key.rotation"
	if d.State != keywrap.Enabled || keywrap.Scheme(key) != "aws" {
		return nil // other services rotate on demand only
	}
	if !d.Rotation {
		return one(check, Info, key, "automatic rotation is off, or may not be looked at", "aws kms enable-key-rotation --key-id "+key)
	}
	text := "automatic rotation is on"
	if last := d.Rotated; !last.IsZero() {
		text += fmt.Sprintf("; the material is %d days old", int(now.Sub(last).Hours()/24))
	}
	return one(check, OK, key, text, "")
}

// try asks whether a class's keys can be used. One key that opens is enough; to
// create, all must work.
func (st *Store) try(ctx context.Context, s Service, c Class, u Use, needs Needs) []Finding {
	check := "class." + string(u)
	asks := st.asks(c, u)
	errs := make([]error, len(asks))
	done := make(chan int, len(asks))
	for i, a := range asks {
		go func() { errs[i] = s.Check(ctx, a); done <- i }()
	}
	for range asks {
		<-done
	}
	var good, bad []string
	var first error
	for i, err := range errs {
		if err == nil {
			good = append(good, asks[i].KeyURI())
			continue
		}
		bad = append(bad, fmt.Sprintf("%s of %s: %s", asks[i].Op, asks[i].KeyURI(), reason(err)))
		if first == nil || errors.Is(first, keywrap.ErrDenied) {
			first = err
		}
	}
	all := u == Creates || u == Rewraps
	switch {
	case len(asks) == 0:
		return nil
	case len(bad) == 0:
		return one(check, OK, c.Name, "works", "")
	case len(good) > 0 && !all:
		return one(check, spare(errs), c.Name, "works with "+strings.Join(good, ", ")+", not with the others: "+strings.Join(bad, "; "), remedyOf(first))
	}
	level := needs.level(u)
	if fault.Of(first) != fault.KeyDenied && u != Rewraps && (needs == nil || needs[u]) {
		level = Error // nobody's policy
	}
	return one(check, level, c.Name, strings.Join(bad, "; "), remedyOf(first))
}

// spare is the level of a class that works with some of its keys: others that
// are denied are someone's recovery keys, others that fail are a loss.
func spare(errs []error) Level {
	for _, err := range errs {
		if err != nil && !errors.Is(err, keywrap.ErrDenied) {
			return Warning
		}
	}
	return Info
}

// asks are the calls that a use makes, one for each key.
func (st *Store) asks(c Class, u Use) []keywrap.Check {
	ec := keywrap.Context{Store: st.ID.String(), Class: c.Name, ID: st.ID.String()}
	var out []keywrap.Check
	opens := func(p keywrap.Purpose, id string, have []keywrap.Wrapped) {
		ec.Purpose, ec.ID = p, id
		for _, key := range c.all() {
			w := keywrap.Wrapped{Key: key} // without a blob the right alone is checked
			if i := slices.IndexFunc(have, func(w keywrap.Wrapped) bool { return w.Key == key }); i >= 0 {
				w = have[i]
			}
			out = append(out, keywrap.Check{Op: keywrap.OpDecrypt, Key: key, Wrapped: w, Context: ec})
		}
	}
	switch u {
	case Mounts:
		opens(keywrap.PurposeStore, st.ID.String(), c.StoreKey)
	case Lists:
		opens(keywrap.PurposeNames, c.NameID, c.NameKey)
	case Reads:
		opens(keywrap.PurposeData, st.ID.String(), nil)
	case Creates:
		ec.Purpose = keywrap.PurposeData
		for i, key := range c.Keys {
			op := keywrap.OpEncrypt
			if i == 0 {
				op = keywrap.OpGenerate
			}
			out = append(out, keywrap.Check{Op: op, Key: key, Context: ec})
		}
	case Rewraps:
		// The two ends are judged apart: every key once as source, every one that
		// wraps once as target.
		ec.Purpose = keywrap.PurposeData
		moves := func(from, to string) {
			out = append(out, keywrap.Check{Op: keywrap.OpReEncrypt, Key: from, Wrapped: keywrap.Wrapped{Key: from}, Context: ec, ToKey: to, ToContext: ec})
		}
		for i, key := range c.all() {
			if len(c.Keys) > 0 {
				moves(key, c.Keys[0])
			}
			if i > 0 && i < len(c.Keys) {
				moves(c.Keys[0], key)
			}
		}
	}
	return out
}

// reason is what a person reads of a failed call: the service's words without
// the key, which is the finding's subject.
func reason(err error) string {
	var call *keywrap.CallError
	if errors.As(err, &call) {
		return call.Err.Error()
	}
	return err.Error()
}

func remedyOf(err error) string {
	var call *keywrap.CallError
	if errors.As(err, &call) {
		return call.Hint
	}
	return ""
}
