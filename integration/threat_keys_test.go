package integration

import (
	"bytes"
	"context"
	"encoding/binary"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// keyAttacks put in a data key that is not the file's.
func keyAttacks() []attack {
	return []attack{
		{name: "a file under a key of the attacker's", want: unix.EKEYREJECTED, kind: "key-rejected", do: func(s *victimStore, v, _ string) {
			s.forge(v, "general", "keyring:attacker")
		}},
		{name: "a file under the key of another class", want: unix.EKEYREJECTED, kind: "key-rejected", do: func(s *victimStore, v, _ string) {
			s.forge(v, "general", "keyring:phi")
		}},
		{name: "the attacker's recipient in place of the file's", want: unix.EKEYREJECTED, kind: "key-rejected", do: func(s *victimStore, v, _ string) {
			s.splice(v, func(own, foreign envelope.Recipient) []envelope.Recipient { return []envelope.Recipient{foreign} })
		}},
		{name: "the attacker's recipient before the file's", want: 0, do: func(s *victimStore, v, _ string) {
			s.splice(v, func(own, foreign envelope.Recipient) []envelope.Recipient { return []envelope.Recipient{foreign, own} })
		}},
		{name: "the file's key URI on the attacker's wrapped key", want: unix.EIO, kind: "integrity", do: func(s *victimStore, v, _ string) {
			s.splice(v, func(own, foreign envelope.Recipient) []envelope.Recipient {
				foreign.Wrapped.Key = own.Wrapped.Key
				return []envelope.Recipient{foreign}
			})
		}},
		{name: "another class in the recipient", want: unix.EIO, kind: "integrity", do: func(s *victimStore, v, _ string) {
			s.splice(v, func(own, _ envelope.Recipient) []envelope.Recipient {
				own.Class = "phi"
				return []envelope.Recipient{own}
			})
		}},
	}
}

// forge makes a file of the attacker's own in v's place, with v's store and file
// ids: chunks and commitment are right, under a key that the attacker may use.
func (s *victimStore) forge(v, class, key string) {
	s.t.Helper()
	victim, err := envelope.Parse(s.header(v))
	if err != nil {
		s.t.Fatal(err)
	}
	keys := envelope.NewManager(s.provider(), victim.Store, envelope.Options{})
	defer keys.Close()
	h, k, err := keys.Create(context.Background(), envelope.Class{Name: class, Keys: []string{key}, Allowed: []string{key}},
		keywrap.PurposeData, victim.Fixed, headerSize)
	if err != nil {
		s.t.Fatal(err)
	}
	defer k.Wipe()
	codec, err := dare.New(k.PRK(), dare.Suite(victim.Suite), victim.ChunkSize)
	if err != nil {
		s.t.Fatal(err)
	}
	defer codec.Wipe()
	chunk, err := codec.Seal(nil, []byte("transfer everything to the attacker"), 0, true)
	if err != nil {
		s.t.Fatal(err)
	}
	block, err := h.Encode(headerSize)
	if err != nil {
		s.t.Fatal(err)
	}
	s.put(v, block, chunk)
}

// splice changes the recipients of v's header. foreign is the same data key, as
// far as anybody can tell, wrapped under the attacker's key.
func (s *victimStore) splice(v string, f func(own, foreign envelope.Recipient) []envelope.Recipient) {
	s.t.Helper()
	h, err := envelope.Parse(s.header(v))
	if err != nil {
		s.t.Fatal(err)
	}
	ec := keywrap.Context{Store: h.Store.String(), Class: "general", Purpose: keywrap.PurposeData, ID: h.File.String()}
	dk, err := s.provider().GenerateDataKey(context.Background(), "keyring:attacker", ec)
	if err != nil {
		s.t.Fatal(err)
	}
	defer dk.Plain.Wipe()
	h.Recipients = f(h.Recipients[0], envelope.Recipient{Class: "general", Wrapped: dk.Wrapped})
	block, err := h.Encode(headerSize)
	if err != nil {
		s.t.Fatal(err)
	}
	s.setHeader(v, block)
}

// TestThreatMoved moves whole files where they do not belong: to another class,
// with and without its name in the header, and to another store of the same
// keys.
func TestThreatMoved(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		files := []string{"secret", "sub/secret", "patients/a", "patients/deep/b", "other/a", "other/deep/b", "open/a"}
		s := newVictim(t, p, files...)
		header, chunks := s.take("secret")
		relabel := func(class string) []byte {
			h, err := envelope.Parse(header)
			if err != nil {
				t.Fatal(err)
			}
			h.Recipients[0].Class = class
			b, err := h.Encode(headerSize)
			if err != nil {
				t.Fatal(err)
			}
			return b
		}
		s.put("patients/a", header, chunks)
		s.put("patients/deep/b", relabel("phi"), chunks)
		s.put("other/a", header, chunks)
		s.put("other/deep/b", relabel("other"), chunks) // the key is the same: only the context differs
		s.put("open/a", header, chunks)

		second := &victimStore{t: t, h: s.h, dir: filepath.Join(t.TempDir(), "T"), place: p, entries: map[string]string{}, plain: map[string][]byte{}}
		second.init()
		m := s.h.Mount(second.dir)
		m.Put("taken", bytes.Repeat([]byte("x"), threatSize))
		m.Put("renamed", bytes.Repeat([]byte("x"), threatSize))
		inos := map[uint64]string{inode(t, m.Path("taken")): "taken", inode(t, m.Path("renamed")): "renamed"}
		m.Unmount()
		second.locate(inos)
		own := second.header("taken")
		second.put("taken", header, chunks)
		moved := bytes.Clone(header)
		copy(moved[16:32], own[16:32]) // the other store's id
		second.put("renamed", moved, chunks)

		want := map[string]unix.Errno{"secret": 0, "sub/secret": 0, "patients/a": unix.EIO, "patients/deep/b": unix.EKEYREJECTED,
			"other/a": unix.EIO, "other/deep/b": unix.EIO, "open/a": unix.EIO}
		s.wantErrnos(want)
		second.wantErrnos(map[string]unix.Errno{"taken": unix.EIO, "renamed": unix.EIO})
	})
}

// wantErrnos mounts, reads each file, and wants fsck to agree.
func (s *victimStore) wantErrnos(want map[string]unix.Errno) {
	s.t.Helper()
	m := s.h.Mount(s.dir)
	for name, errno := range want {
		got, e := readAll(m.Path(name))
		if e != errno {
			s.t.Errorf("%s: %s, want %s", name, errnoName(e), errnoName(errno))
		}
		if errno == 0 && !bytes.Equal(got, s.plain[name]) {
			s.t.Errorf("%s: other contents", name)
		}
	}
	m.Unmount()
	report := s.fsck(4)
	for name, errno := range want {
		kind := report.kind(s.entries[name])
		if (kind != "") != (errno != 0) {
			s.t.Errorf("%s: fsck says %q, and the mount %s", name, kind, errnoName(errno))
		}
	}
}

// TestThreatForeignKeyAlone wants fsck's code for a store in which nothing but a
// key is wrong.
func TestThreatForeignKeyAlone(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		s := newVictim(t, p, "a", "b")
		s.forge("a", "general", "keyring:attacker")
		if kind := s.fsck(5).kind(s.entries["a"]); kind != "key-rejected" {
			t.Errorf("fsck says %q, want key-rejected", kind)
		}
		if res := s.h.Try("cat", s.dir, "a"); res.Code != 7 || res.Stdout != "" {
			t.Errorf("cat: exit %d, want 7; %q", res.Code, res.Stdout)
		}
	})
}

// TestThreatManyRecipients: a header that names many wrapped keys must not cause
// many calls (CVE-2024-23680).
func TestThreatManyRecipients(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		s := newVictim(t, p, "a")
		h := s.header("a")
		const counts, first = 88, 92 // of version 3
		one := bytes.Clone(h[first : first+binary.BigEndian.Uint16(h[counts+2:])])
		grow := func(count int) {
			copy(h[first+(count-1)*len(one):], one)
			h[counts] = byte(count)
			binary.BigEndian.PutUint16(h[counts+2:], uint16(count*len(one)))
			s.setHeader("a", h)
		}
		for count := 2; count <= envelope.MaxRecipients; count++ {
			grow(count)
		}
		v := s.open()
		if got, err := cat(v, "a"); err != nil || !bytes.Equal(got, s.plain["a"]) {
			t.Errorf("%d recipients: %v", envelope.MaxRecipients, err)
		}
		grow(envelope.MaxRecipients + 1)
		wantDamage(t, v, "a", "one recipient too many")
		h[counts] = 200
		s.setHeader("a", h)
		wantDamage(t, v, "a", "200 recipients")
	})
}
