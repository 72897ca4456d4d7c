package envelope_test

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

func sampleHeader(size int) *envelope.Header {
	h := &envelope.Header{Fixed: envelope.Fixed{Suite: 1, ChunkSize: 65536, BlockSize: size}}
	for i := range h.Store {
		h.Store[i], h.File[i] = byte(i), byte(0xf0+i)
	}
	for i := range h.Commitment {
		h.Commitment[i] = byte(0x40 + i)
	}
	h.Recipients = []envelope.Recipient{{Class: "general", Wrapped: keywrap.Wrapped{
		Key: "keyring:general", Blob: []byte{1, 2, 3}, Material: "v1"}}}
	return h
}

func TestParseCopiesWhatItKeeps(t *testing.T) {
	block, err := sampleHeader(512).Encode(512)
	if err != nil {
		t.Fatal(err)
	}
	h, err := envelope.Parse(block)
	if err != nil {
		t.Fatal(err)
	}
	for i := range block {
		block[i] = 0xff
	}
	again, err := h.Encode(512)
	if err != nil {
		t.Fatal(err)
	}
	if want, _ := sampleHeader(512).Encode(512); !bytes.Equal(again, want) {
		t.Errorf("header changed with the block it was parsed from")
	}
	_ = append(h.Recipients[0].Wrapped.Blob, 9) // must not reach the material behind it
	if got := h.Recipients[0].Wrapped.Material; got != "v1" {
		t.Errorf("got material %q, want v1", got)
	}
}

func TestEncodeRefuses(t *testing.T) {
	for _, tt := range []struct {
		name string
		size int
		edit func(h *envelope.Header)
		want error
	}{
		{"size not the committed one", 1024, func(h *envelope.Header) { h.BlockSize = 512 }, envelope.ErrInvalid},
		{"size no power of two", 600, func(*envelope.Header) {}, envelope.ErrInvalid},
		{"size too small", 256, func(*envelope.Header) {}, envelope.ErrInvalid},
		{"size too large", 16384, func(*envelope.Header) {}, envelope.ErrInvalid},
		{"chunk size", 512, func(h *envelope.Header) { h.ChunkSize = 4097 }, envelope.ErrInvalid},
		{"chunk size without suite", 512, func(h *envelope.Header) { h.Suite = 0 }, envelope.ErrInvalid},
		{"shared without contents", 512, func(h *envelope.Header) { h.Suite, h.ChunkSize, h.Shared, h.Branch = 0, 0, true, h.File }, envelope.ErrInvalid},
		{"shared without a branch", 512, func(h *envelope.Header) { h.Shared = true }, envelope.ErrInvalid},
		{"branch of a key that is not shared", 512, func(h *envelope.Header) { h.Branch = h.File }, envelope.ErrInvalid},
		{"wrapped data key that is not shared", 512, func(h *envelope.Header) { h.Sealed[39] = 1 }, envelope.ErrInvalid},
		{"shared, one byte too many", 512, func(h *envelope.Header) {
			h.Shared, h.Branch = true, h.File
			h.Recipients[0].Wrapped.Blob = make([]byte, 512-84-6-len("general")-len("keyring:general")-len("v1")-56+1)
		}, envelope.ErrDoesNotFit},
		{"sparse without contents", 512, func(h *envelope.Header) { h.Suite, h.ChunkSize, h.Sparse = 0, 0, true }, envelope.ErrInvalid},
		{"no recipient", 512, func(h *envelope.Header) { h.Recipients = nil }, envelope.ErrInvalid},
		{"no class", 512, func(h *envelope.Header) { h.Recipients[0].Class = "" }, envelope.ErrInvalid},
		{"control character", 512, func(h *envelope.Header) { h.Recipients[0].Class = "a\x1b[2J" }, envelope.ErrInvalid},
		{"no UTF-8", 512, func(h *envelope.Header) { h.Recipients[0].Wrapped.Key = "keyring:\xff" }, envelope.ErrInvalid},
		{"no blob", 512, func(h *envelope.Header) { h.Recipients[0].Wrapped.Blob = nil }, envelope.ErrInvalid},
		{"long class", 8192, func(h *envelope.Header) { h.Recipients[0].Class = strings.Repeat("c", 256) }, envelope.ErrDoesNotFit},
		{"long URI", 8192, func(h *envelope.Header) { h.Recipients[0].Wrapped.Key = strings.Repeat("k", 2049) }, envelope.ErrDoesNotFit},
		{"long blob", 8192, func(h *envelope.Header) { h.Recipients[0].Wrapped.Blob = make([]byte, 6145) }, envelope.ErrDoesNotFit},
		{"long material", 8192, func(h *envelope.Header) { h.Recipients[0].Wrapped.Material = strings.Repeat("m", 256) }, envelope.ErrDoesNotFit},
		{"one byte too many", 512, func(h *envelope.Header) {
			h.Recipients[0].Wrapped.Blob = make([]byte, 512-84-6-len("general")-len("keyring:general")-len("v1")+1)
		}, envelope.ErrDoesNotFit},
	} {
		h := sampleHeader(tt.size)
		tt.edit(h)
		block, err := h.Encode(tt.size)
		wantErr(t, tt.name, err, tt.want)
		if block != nil {
			t.Errorf("%s: got a block beside the error", tt.name)
		}
	}
}

func TestParseBlockSizes(t *testing.T) {
	for _, n := range []int{0, 1, 83, 84, 256, 511, 513, 768, 16384} {
		_, err := envelope.Parse(make([]byte, n))
		wantErr(t, "Parse", err, envelope.ErrFormat)
	}
	// A block cut or extended to another valid size is not the committed one.
	block, err := sampleHeader(1024).Encode(1024)
	if err != nil {
		t.Fatal(err)
	}
	_, err = envelope.Parse(block[:512])
	wantErr(t, "cut block", err, envelope.ErrFormat)
	_, err = envelope.Parse(append(block, make([]byte, 1024)...))
	wantErr(t, "extended block", err, envelope.ErrFormat)
}

func TestID(t *testing.T) {
	id := envelope.NewID()
	if id.IsZero() || id == envelope.NewID() {
		t.Errorf("NewID: got %v", id)
	}
	if got, err := envelope.ParseID(id.String()); err != nil || got != id {
		t.Errorf("ParseID(%v): got %v, %v", id, got, err)
	}
	for _, s := range []string{"", "00", strings.Repeat("0", 31), strings.Repeat("0", 33), strings.Repeat("A", 32), strings.Repeat("g", 32)} {
		_, err := envelope.ParseID(s)
		wantErr(t, "ParseID "+s, err, envelope.ErrInvalid)
	}
	if !(envelope.ID{}).IsZero() {
		t.Errorf("zero ID: IsZero is false")
	}
}

func TestPlacement(t *testing.T) {
	for _, tt := range []struct {
		p    envelope.Placement
		name string
		base int64
	}{{envelope.Prefix, "header", 1024}, {envelope.Xattr, "xattr", 0}, {envelope.Sidecar, "sidecar", 16}} {
		if got, err := envelope.ParsePlacement(tt.name); err != nil || got != tt.p {
			t.Errorf("ParsePlacement(%q): got %v, %v", tt.name, got, err)
		}
		if tt.p.String() != tt.name || !tt.p.Valid() || tt.p.Base(1024) != tt.base {
			t.Errorf("placement %d: got %q, valid %v, base %d", tt.p, tt.p, tt.p.Valid(), tt.p.Base(1024))
		}
	}
	for _, name := range []string{"", "prefix", "Header", "unknown"} {
		_, err := envelope.ParsePlacement(name)
		wantErr(t, name, err, envelope.ErrInvalid)
	}
	for _, p := range []envelope.Placement{0, 4, 255} {
		if p.Valid() || p.String() != "unknown" {
			t.Errorf("placement %d: got valid %v, %q", uint8(p), p.Valid(), p)
		}
		if _, err := p.MarshalText(); err == nil {
			t.Errorf("placement %d: got no error from MarshalText", uint8(p))
		}
	}
}

func TestValuesInJSON(t *testing.T) {
	type record struct {
		ID        envelope.ID
		Placement envelope.Placement
	}
	in := record{sampleHeader(512).File, envelope.Sidecar}
	text, err := json.Marshal(in)
	if want := `{"ID":"f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff","Placement":"sidecar"}`; err != nil || string(text) != want {
		t.Errorf("Marshal: got %s, %v, want %s", text, err, want)
	}
	var out record
	if err := json.Unmarshal(text, &out); err != nil || out != in {
		t.Errorf("Unmarshal: got %v, %v, want %v", out, err, in)
	}
	for _, bad := range []string{`{"ID":"F0"}`, `{"Placement":"there"}`} {
		out := record{}
		if err := json.Unmarshal([]byte(bad), &out); err == nil || out != (record{}) {
			t.Errorf("Unmarshal(%s): got %v, %v, want an error and nothing set", bad, out, err)
		}
	}
	if got, want := envelope.SidecarName(in.ID), ".kmsfs.h.f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"; got != want {
		t.Errorf("SidecarName: got %s, want %s", got, want)
	}
}
