package record_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/fs/record"
)

// TestBodiesAreWhatMACsCover: every byte of a record but its MAC is signed.
func TestBodiesAreWhatMACsCover(t *testing.T) {
	d := testDir("phi")
	if got := append(d.Body(), d.MAC[:]...); !bytes.Equal(got, d.Encode()) {
		t.Errorf("directory: body and MAC are %x, want %x", got, d.Encode())
	}
	s := testStore()
	signed, err := s.Signed()
	if err != nil {
		t.Fatal(err)
	}
	s.MAC, s.Keys = [32]byte{}, record.StoreKeys{}
	if again, err := s.Signed(); err != nil || !bytes.Equal(again, signed) {
		t.Errorf("the signed part depends on the MAC or the wrapped keys: %v", err)
	}
}

func TestStoreTooLarge(t *testing.T) {
	s := testStore()
	s.Keys.Names["general"] = make([]byte, record.MaxStore)
	if _, err := s.Encode(); !errors.Is(err, record.ErrTooLarge) {
		t.Errorf("encode: %v", err)
	}
	b := append([]byte("kmsfs store 1\n"), make([]byte, record.MaxStore)...)
	if _, err := record.ParseStore(b); !errors.Is(err, record.ErrFormat) {
		t.Errorf("parse: %v", err)
	}
	many := "kmsfs store 1\n" + strings.Repeat("\n", record.MaxStore/2)
	if _, err := record.ParseStore([]byte(many)); !errors.Is(err, record.ErrFormat) {
		t.Errorf("parse of many lines: %v", err)
	}
}

func TestEncodeRefusesWhatIsNoJSON(t *testing.T) {
	s := testStore()
	s.Body.Policy = []byte("{")
	if _, err := s.Encode(); err == nil {
		t.Error("a policy that is no JSON is encoded")
	}
}

// TestLayoutKind: whatever is wrong with a record on the disk is BadFormat, not
// the kind that the same value has as an argument.
func TestLayoutKind(t *testing.T) {
	for name, change := range map[string]func(*record.StoreBody){
		"id":        func(b *record.StoreBody) { b.ID = "x" },
		"placement": func(b *record.StoreBody) { b.Placement = "x" },
		"suite":     func(b *record.StoreBody) { b.Suite = "x" },
		"policy":    func(b *record.StoreBody) { b.Policy = []byte(`{}`) },
		"size":      func(b *record.StoreBody) { b.HeaderSize = 0 },
		"keys":      func(b *record.StoreBody) { b.Keys = nil },
	} {
		s := testStore()
		change(&s.Body)
		if _, err := s.Layout(); fault.Of(err) != fault.BadFormat || !errors.Is(err, record.ErrFormat) {
			t.Errorf("%s: %v (%v)", name, err, fault.Of(err))
		}
	}
}

func TestHeaderSizeOK(t *testing.T) {
	for n, want := range map[int]bool{
		-512: false, 0: false, 256: false, 511: false, 512: true, 513: false, 768: false, 1024: true, 8192: true, 16384: false,
	} {
		if got := record.HeaderSizeOK(n); got != want {
			t.Errorf("HeaderSizeOK(%d) = %v, want %v", n, got, want)
		}
	}
}
