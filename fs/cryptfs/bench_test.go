package cryptfs

import (
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/crypto/keywrap/keyring"
	"github.com/kmsfs/kmsfs/fs/classify"
)

func benchVolume(b *testing.B) *Volume {
	k, err := keyring.Create(b.TempDir()+"/keyring", nil)
	if err != nil {
		b.Fatal(err)
	}
	if err := k.CreateKey("general"); err != nil {
		b.Fatal(err)
	}
	prov := keywrap.Mux{Keyring: k}
	dir := b.TempDir() + "/s"
	info, err := Init(b.Context(), InitConfig{Store: dir, Policy: classify.Single("general", "keyring:general"),
		Placement: envelope.Prefix, HeaderSize: 1024, Suite: dare.AES256GCM, Provider: prov})
	if err != nil {
		b.Fatal(err)
	}
	v, err := Open(b.Context(), Config{Store: dir, Provider: prov, Keys: info.Keys})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = v.Close() })
	return v
}

// BenchmarkCreate makes files of 1 kB; BenchmarkOpen reads them back.
func BenchmarkCreate(b *testing.B) {
	v := benchVolume(b)
	data := make([]byte, 1000)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		n, h, _, err := v.Create(b.Context(), v.Root(), fmt.Sprint(i), unix.O_RDWR, 0o644, Caller{})
		if err != nil {
			b.Fatal(err)
		}
		if _, err := h.WriteAt(data, 0, false); err != nil {
			b.Fatal(err)
		}
		if err := h.Flush(); err != nil {
			b.Fatal(err)
		}
		h.Release()
		v.Forget(n, 1)
	}
}

func BenchmarkOpen(b *testing.B) {
	v := benchVolume(b)
	n, h, _, err := v.Create(b.Context(), v.Root(), "f", unix.O_RDWR, 0o644, Caller{})
	if err != nil {
		b.Fatal(err)
	}
	if _, err := h.WriteAt(make([]byte, 1000), 0, false); err != nil {
		b.Fatal(err)
	}
	h.Release()
	buf := make([]byte, 4096)
	b.ReportAllocs()
	for b.Loop() {
		h, err := v.Open(b.Context(), n, unix.O_RDONLY, false)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := h.ReadAt(buf, 0); err != nil {
			b.Fatal(err)
		}
		h.Release()
	}
}
