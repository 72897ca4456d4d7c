package pkcs11

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// maxVersions bounds the objects of one key, and so the work that a URI can
// cause.
const maxVersions = 256

// version is one object of a key.
type version struct {
	attributes
	object object
	form   form // in which it wraps, 0 if in none
}

// wraps reports whether the version may be used to wrap in form f; opens is
// about unwrapping.
func (v *version) wraps(f form) bool { return f == formGCM && v.Encrypt || f != formGCM && v.Wrap }
func (v *version) opens(f form) bool { return f == formGCM && v.Decrypt || f != formGCM && v.Unwrap }

// expired reports whether the last day of the version is over; its dates are in
// UTC.
func (v *version) expired(now time.Time) bool {
	return !v.End.IsZero() && !now.Before(v.End.AddDate(0, 0, 1))
}

func (v *version) started(now time.Time) bool { return !now.Before(v.Start) }

// older orders versions: by start date, then by id as a number.
func older(a, b *version) int {
	if c := a.Start.Compare(b.Start); c != 0 {
		return c
	}
	x, y := strings.TrimLeft(a.ID, "\x00"), strings.TrimLeft(b.ID, "\x00")
	if len(x) != len(y) {
		return len(x) - len(y)
	}
	if c := strings.Compare(x, y); c != 0 {
		return c
	}
	return len(a.ID) - len(b.ID)
}

// versions finds the objects of a key, oldest first. forms are what the token
// can do, by preference.
func (u *use) versions(key URI, forms []form) ([]*version, error) {
	objects, err := u.lib.Find(u.session, key.Object, key.ID, maxVersions+1)
	if err != nil {
		return nil, err
	}
	if len(objects) == 0 {
		return nil, keywrap.ErrNotFound
	}
	if len(objects) > maxVersions {
		return nil, fmt.Errorf("%w: more than %d objects match", keywrap.ErrUnsupported, maxVersions)
	}
	var out []*version
	for _, o := range objects {
		a, err := u.lib.Attributes(u.session, o)
		if is(err, rvObjectHandleInvalid) {
			continue // deleted meanwhile
		}
		if err != nil {
			return nil, err
		}
		if !a.AES || len(a.ID) > maxID {
			continue
		}
		v := &version{attributes: a, object: o}
		for _, f := range slices.Backward(forms) {
			if v.wraps(f) {
				v.form = f
			}
		}
		out = append(out, v)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%w: no AES key with an id of at most %d bytes matches", keywrap.ErrUnsupported, maxID)
	}
	slices.SortFunc(out, older)
	return out, nil
}

// newest returns the version that wraps: the error says why there is none.
func newest(list []*version, now time.Time) (*version, error) {
	err := keywrap.ErrDisabled
	for _, v := range slices.Backward(list) {
		switch {
		case v.expired(now):
			err = keywrap.ErrExpired
		case v.form != 0 && v.started(now):
			if err := unique(list, v); err != nil {
				return nil, err
			}
			return v, nil
		}
	}
	return nil, err
}

// unique refuses a version whose id another one has: which of the two wrapped a
// data key would be a guess.
func unique(list []*version, v *version) error {
	for _, o := range list {
		if o != v && o.ID == v.ID {
			return fmt.Errorf("%w: two objects of this key have the id %s", keywrap.ErrUnsupported, material(v.ID))
		}
	}
	return nil
}

// opener returns the version that wrapped w.
func opener(list []*version, w *wrappedKey, now time.Time) (*version, error) {
	i := slices.IndexFunc(list, func(v *version) bool { return v.ID == w.id })
	if i < 0 {
		return nil, fmt.Errorf("%w: no version %s", keywrap.ErrWrongKey, material(w.id))
	}
	v := list[i]
	switch {
	case v.expired(now):
		return nil, keywrap.ErrExpired
	case !v.opens(w.form):
		return nil, keywrap.ErrDisabled
	}
	return v, unique(list, v)
}
