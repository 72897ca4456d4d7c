package nameenc_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/nameenc"
)

// seeds adds the stored bytes of every vector.
func seeds(f *testing.F, add func(v vector)) {
	for _, v := range loadVectors(f) {
		add(v)
	}
}

// FuzzDecryptName: nothing panics, and what opens is what EncryptName makes.
func FuzzDecryptName(f *testing.F) {
	seeds(f, func(v vector) { f.Add(string(v.stored), v.dir[:]) })
	c := newCipher(f, 1)
	f.Fuzz(func(t *testing.T, enc string, id []byte) {
		var dir nameenc.DirID
		copy(dir[:], id)
		if name, err := c.DecryptName(dir, enc); err == nil {
			if again, err := c.EncryptName(dir, name); err != nil || again != enc {
				t.Errorf("%q opens to %q, which encrypts to %q (%v)", enc, name, again, err)
			}
		} else if !errors.Is(err, nameenc.ErrAuth) || name != "" {
			t.Errorf("DecryptName = %q, %v", name, err)
		}
		if name, err := c.DecryptAttrName(enc); err == nil {
			if again, err := c.EncryptAttrName(name); err != nil || again != enc {
				t.Errorf("%q opens to %q, which encrypts to %q (%v)", enc, name, again, err)
			}
		} else if !errors.Is(err, nameenc.ErrAuth) || name != "" {
			t.Errorf("DecryptAttrName = %q, %v", name, err)
		}
	})
}

// FuzzDecryptTarget: the same for targets and attribute values.
func FuzzDecryptTarget(f *testing.F) {
	seeds(f, func(v vector) { f.Add(v.stored, v.attr) })
	c := newCipher(f, 1)
	f.Fuzz(func(t *testing.T, enc []byte, attr string) {
		if target, err := c.DecryptTarget(string(enc)); err == nil {
			if n, ok := nameenc.TargetLen(len(enc)); target == "" || !ok || n != len(target) {
				t.Errorf("%d characters open to a target of %d bytes, TargetLen = %d, %v", len(enc), len(target), n, ok)
			}
		} else if !errors.Is(err, nameenc.ErrAuth) || target != "" {
			t.Errorf("DecryptTarget = %q, %v", target, err)
		}
		if value, err := c.DecryptAttrValue(attr, enc); err == nil {
			if n, ok := nameenc.AttrValueLen(len(enc)); !ok || n != len(value) {
				t.Errorf("%d bytes open to a value of %d bytes, AttrValueLen = %d, %v", len(enc), len(value), n, ok)
			}
		} else if !errors.Is(err, nameenc.ErrAuth) || value != nil {
			t.Errorf("DecryptAttrValue = %q, %v", value, err)
		}
	})
}

// FuzzRoundTrip: whatever is accepted comes back, in its own place only.
func FuzzRoundTrip(f *testing.F) {
	for _, name := range names {
		f.Add(name, []byte(name))
	}
	f.Add("", []byte{})
	f.Add(strings.Repeat("t", nameenc.MaxTarget), []byte("longest"))
	f.Add("a\x00b", []byte("/"))
	c, other := newCipher(f, 1), newCipher(f, 2)
	f.Fuzz(func(t *testing.T, s string, value []byte) {
		if enc, err := c.EncryptName(dirA, s); err != nil {
			if !errors.Is(err, nameenc.ErrName) && !errors.Is(err, nameenc.ErrTooLong) || nameenc.CheckName(s) == nil {
				t.Errorf("EncryptName(%q): %v", s, err)
			}
		} else {
			if got, err := c.DecryptName(dirA, enc); err != nil || got != s {
				t.Errorf("name %q comes back as %q, %v", s, got, err)
			}
			nameFails(t, c, dirB, enc, "other directory")
			nameFails(t, other, dirA, enc, "other class")
		}
		if enc, err := c.EncryptTarget(s); err == nil {
			if got, err := c.DecryptTarget(enc); err != nil || got != s || len(enc) > nameenc.MaxStoredTarget {
				t.Errorf("target %q comes back as %q, %v", s, got, err)
			}
		}
		if enc, err := c.EncryptAttrName(s); err == nil {
			if got, err := c.DecryptAttrName(enc); err != nil || got != s {
				t.Errorf("attribute %q comes back as %q, %v", s, got, err)
			}
		}
		if enc, err := c.EncryptAttrValue(s, value); err == nil {
			if got, err := c.DecryptAttrValue(s, enc); err != nil || !bytes.Equal(got, value) {
				t.Errorf("value %q comes back as %q, %v", value, got, err)
			}
		}
	})
}
