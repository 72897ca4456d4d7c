package record_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/fs/record"
)

// Each target holds its parser to: no panic, its own errors only, bounds kept,
// and one encoding per record.

func FuzzDir(f *testing.F) {
	for _, v := range seeds(f, "directory") {
		f.Add(v.bytes)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := record.ParseDir(b)
		if err != nil {
			if d != nil || !errors.Is(err, record.ErrFormat) && !errors.Is(err, record.ErrNewer) {
				t.Errorf("got %v, %v", d, err)
			}
			return
		}
		if n := len(d.Class); n < 1 || n > 32 || len(b) > record.MaxDir {
			t.Errorf("class of %d bytes in %d", n, len(b))
		}
		if again := d.Encode(); !bytes.Equal(again, b) {
			t.Errorf("encodes to %x, want %x", again, b)
		}
	})
}

func FuzzStore(f *testing.F) {
	for _, v := range seeds(f, "store") {
		f.Add(v.bytes)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := record.ParseStore(b)
		if err != nil {
			if s != nil || !errors.Is(err, record.ErrFormat) && !errors.Is(err, record.ErrNewer) && !errors.Is(err, record.ErrNoStore) {
				t.Errorf("got %v, %v", s, err)
			}
			return
		}
		again, err := s.Encode()
		if err != nil || !bytes.Equal(again, b) {
			t.Errorf("encodes to %q, %v, want %q", again, err, b)
		}
		if signed, err := s.Signed(); err != nil || !bytes.HasPrefix(b, signed) {
			t.Errorf("signed = %q, %v, want the beginning of %q", signed, err, b)
		}
		l, err := s.Layout()
		if err != nil {
			if l != nil || fault.Of(err) != fault.BadFormat {
				t.Errorf("layout: %v, %v", l, err)
			}
			return
		}
		if !record.HeaderSizeOK(l.HeaderSize) || l.ID.IsZero() || l.Policy == nil {
			t.Errorf("layout: %+v", l)
		}
	})
}

func FuzzRewrap(f *testing.F) {
	for _, v := range seeds(f, "rewrap") {
		f.Add(v.bytes[:max(0, len(v.bytes)-32)])
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		sum := sha256.Sum256(body)
		b := append(bytes.Clone(body), sum[:]...)
		files, err := record.ParseRewrap(b)
		if err != nil {
			if files != nil || !errors.Is(err, record.ErrFormat) && !errors.Is(err, record.ErrNewer) {
				t.Errorf("got %v, %v", files, err)
			}
			return
		}
		if again := record.EncodeRewrap(files); !bytes.Equal(again, b) || !record.FitsRewrap(files) {
			t.Errorf("%+v encodes to %x, want %x", files, again, b)
		}
	})
}
