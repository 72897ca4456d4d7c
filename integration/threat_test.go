package integration

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

// attack changes the store file of v. w is another file of the same directory,
// class and size.
type attack struct {
	name string
	do   func(s *victimStore, v, w string)
	want unix.Errno // at the mount; 0: the contents are as they were
	kind string     // of fsck's problem
}

// Where the fields of the header's fixed part are (docs/format.md).
var headerFields = map[string]int{
	"magic": 0, "version": 7, "suite": 8, "chunk size": 9, "flags": 10, "sparse flag": 11, "block size": 14,
	"store id": 16, "file id": 47, "commitment": 48, "end of the commitment": 79,
}

// edit returns an attack on the chunks: body is what follows the header.
func edit(name string, f func(s *victimStore, body []byte, w []byte) []byte) attack {
	return attack{name: name, want: unix.EIO, kind: "integrity", do: func(s *victimStore, v, w string) {
		s.setBody(v, f(s, s.body(v), s.body(w)))
	}}
}

func chunkAttacks() []attack {
	flip := func(i, at int) attack {
		return edit(fmt.Sprintf("flip a bit of chunk %d at %d", i, at), func(s *victimStore, b, _ []byte) []byte {
			slot := s.slot(b, i)
			slot[(at+len(slot))%len(slot)] ^= 0x10
			return b
		})
	}
	move := func(at int) attack {
		return edit(fmt.Sprintf("move chunk 1 to 0 and fix up its nonce at %d", at), func(s *victimStore, b, _ []byte) []byte {
			copy(s.slot(b, 0), s.slot(b, 1))
			s.slot(b, 0)[at] ^= 1 // the sequence number is XORed into the nonce
			return b
		})
	}
	out := []attack{
		move(12), move(15),
		edit("move chunk 1 to 0", func(s *victimStore, b, _ []byte) []byte { copy(s.slot(b, 0), s.slot(b, 1)); return b }),
		edit("swap chunks 1 and 2", func(s *victimStore, b, _ []byte) []byte {
			one := bytes.Clone(s.slot(b, 1))
			copy(s.slot(b, 1), s.slot(b, 2))
			copy(s.slot(b, 2), one)
			return b
		}),
		edit("chunk 1 of another file", func(s *victimStore, b, w []byte) []byte { copy(s.slot(b, 1), s.slot(w, 1)); return b }),
		edit("last chunk of another file", func(s *victimStore, b, w []byte) []byte { copy(s.slot(b, 5), s.slot(w, 5)); return b }),
		edit("drop chunk 1", func(s *victimStore, b, _ []byte) []byte {
			at := s.base() + threatSlot
			return append(b[:at:at], b[at+threatSlot:]...)
		}),
		edit("double chunk 1", func(s *victimStore, b, _ []byte) []byte {
			at := s.base() + 2*threatSlot
			return append(append(b[:at:at], s.slot(b, 1)...), b[at:]...)
		}),
		edit("zero chunk 1", func(s *victimStore, b, _ []byte) []byte { clear(s.slot(b, 1)); return b }),
		edit("zero the last chunk", func(s *victimStore, b, _ []byte) []byte { clear(s.slot(b, 5)); return b }),
		edit("append the last chunk again", func(s *victimStore, b, _ []byte) []byte { return append(b, s.slot(b, 5)...) }),
		edit("append zeros up to a slot", func(s *victimStore, b, _ []byte) []byte {
			return append(b, make([]byte, threatSlot-len(s.slot(b, 5)))...)
		}),
	}
	for _, i := range []int{0, 3, 5} {
		for _, at := range []int{0, 1, 2, 4, 8, 15, 16, 700, -16, -1} {
			out = append(out, flip(i, at))
		}
	}
	for _, n := range []int{1, 31, 32, 33, threatSlot} {
		out = append(out, edit(fmt.Sprintf("append %d bytes", n), func(_ *victimStore, b, _ []byte) []byte {
			return append(b, bytes.Repeat([]byte{0xa5}, n)...)
		}))
	}
	return append(out, cuts()...)
}

// cuts cut a file at every chunk boundary, beside them, and at random places.
// To cut it to nothing is another matter, see TestNotDetected.
func cuts() []attack {
	cut := func(name string, to func(s *victimStore) int) attack {
		return edit("cut "+name, func(s *victimStore, b, _ []byte) []byte { return b[:to(s)] })
	}
	var out []attack
	for i := range 6 {
		for _, off := range []int{-1, 0, 1} {
			if i == 0 && off < 1 {
				continue
			}
			out = append(out, cut(fmt.Sprintf("at boundary %d%+d", i, off), func(s *victimStore) int { return s.base() + i*threatSlot + off }))
		}
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 5 {
		at := rnd.IntN(5*threatSlot) + 1
		out = append(out, cut(fmt.Sprintf("at %d", at), func(s *victimStore) int { return s.base() + at }))
	}
	return append(out, cut("in the header, or to one byte", func(s *victimStore) int { return s.base()/2 + 1 }),
		attack{name: "cut to the header", want: unix.EIO, kind: "integrity", do: func(s *victimStore, v, _ string) {
			// Where no header is in the file, this would be nothing at all.
			s.setBody(v, s.body(v)[:max(s.base(), 1)])
		}})
}

func headerAttacks() []attack {
	var out []attack
	for field, at := range headerFields {
		out = append(out, attack{name: "flip a bit of the header: " + field, want: unix.EIO, kind: "", do: func(s *victimStore, v, _ string) {
			h := s.header(v)
			h[at] ^= 1
			s.setHeader(v, h)
		}})
	}
	return append(out,
		attack{name: "another file's header", want: unix.EIO, kind: "integrity", do: func(s *victimStore, v, w string) { s.setHeader(v, s.header(w)) }},
		attack{name: "another file's wrapped key", want: unix.EIO, kind: "integrity", do: func(s *victimStore, v, w string) {
			h := s.header(v)
			copy(h[88:], s.header(w)[88:])
			s.setHeader(v, h)
		}},
		attack{name: "another file's commitment and wrapped key", want: unix.EIO, kind: "integrity", do: func(s *victimStore, v, w string) {
			h := s.header(v)
			copy(h[48:], s.header(w)[48:])
			s.setHeader(v, h)
		}},
		attack{name: "no header", want: unix.EIO, kind: "", do: func(s *victimStore, v, _ string) { s.removeHeader(v) }},
		attack{name: "zero a chunk and call the file sparse", want: unix.EIO, kind: "integrity", do: func(s *victimStore, v, _ string) {
			h := s.header(v)
			h[11] |= 1
			s.setHeader(v, h)
			b := s.body(v)
			clear(s.slot(b, 1))
			s.setBody(v, b)
		}},
	)
}

// TestThreatFiles does every attack to a file of its own in one store, mounts
// it, and wants the errno of the threat table at the mount and a finding of
// fsck.
func TestThreatFiles(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		attacks := append(append(chunkAttacks(), headerAttacks()...), keyAttacks()...)
		var files []string
		for i := range attacks {
			files = append(files, fmt.Sprintf("v%d", i), fmt.Sprintf("w%d", i))
		}
		s := newVictim(t, p, files...)
		for i, a := range attacks {
			before := s.stored(files[2*i])
			a.do(s, files[2*i], files[2*i+1])
			if bytes.Equal(before, s.stored(files[2*i])) {
				t.Fatalf("%s changed nothing", a.name)
			}
		}
		s.lookAtAll(attacks)
	})
}

func (s *victimStore) lookAtAll(attacks []attack) {
	s.t.Helper()
	t := s.t
	m := s.h.Mount(s.dir)
	for i, a := range attacks {
		v, w := fmt.Sprintf("v%d", i), fmt.Sprintf("w%d", i)
		got, errno := readAll(m.Path(v))
		if errno != a.want {
			t.Errorf("%s: %s, want %s", a.name, errnoName(errno), errnoName(a.want))
		}
		if !bytes.HasPrefix(s.plain[v], got) || errno == 0 && len(got) != threatSize {
			t.Errorf("%s: the mount served other bytes", a.name)
		}
		if _, err := unix.Getxattr(m.Path(v), "user.kmsfs.class", make([]byte, 64)); err != nil {
			t.Errorf("%s: class: %v", a.name, err)
		}
		var st unix.Stat_t
		if err := unix.Stat(m.Path(v), &st); err != nil {
			t.Errorf("%s: stat: %v", a.name, err)
		}
		if got, errno := readAll(m.Path(w)); errno != 0 || !bytes.Equal(got, s.plain[w]) {
			t.Errorf("%s: the untouched file beside it: %s", a.name, errnoName(errno))
		}
	}
	m.Unmount()
	report := s.fsck(4)
	for i, a := range attacks {
		kind := report.kind(s.entries[fmt.Sprintf("v%d", i)])
		wrong := kind != a.kind
		if a.kind == "" && a.want == unix.EIO { // either will do
			wrong = kind != "integrity" && kind != "bad-format"
		}
		if wrong {
			t.Errorf("%s: fsck says %q, want %q", a.name, kind, a.kind)
		}
		if kind := report.kind(s.entries[fmt.Sprintf("w%d", i)]); kind != "" {
			t.Errorf("%s: fsck says %q of the untouched file", a.name, kind)
		}
	}
	for i := 0; i < len(attacks); i += len(attacks) / 4 {
		if res := s.h.Try("cat", s.dir, fmt.Sprintf("v%d", i)); res.Code != 4 {
			t.Errorf("%s: cat exits with %d, want 4: %s", attacks[i].name, res.Code, res.Stderr)
		}
	}
}

// TestThreatEveryBit flips every bit of a header's fixed part, and a bit of
// every byte that follows, of a small file; and bits here and there of a larger
// one. In this process, for speed.
func TestThreatEveryBit(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		s := newVictim(t, p, "small", "large")
		v := s.open()
		flipFixed(t, s, v)
		flipRest(t, s, v)
		rnd := rand.New(rand.NewPCG(3, 4))
		for _, name := range []string{"small", "large"} {
			body := s.body(name)
			from := s.base()
			if p == envelope.Sidecar {
				from = 0 // the file id is not in the header's block here
			}
			count, at := len(body)-from, func(i int) int { return from + i }
			if name == "large" {
				count, at = 300, func(int) int { return from + rnd.IntN(len(body)-from) }
			}
			for i := range count {
				b, off := bytes.Clone(body), at(i)
				b[off] ^= 1 << rnd.IntN(8)
				s.setBody(name, b)
				wantDamage(t, v, name, fmt.Sprintf("%s, byte %d", name, off))
			}
			s.setBody(name, body)
			if got, err := cat(v, name); err != nil || !bytes.Equal(got, s.plain[name]) {
				t.Fatalf("%s does not read after its bytes were put back: %v", name, err)
			}
		}
	})
}

func wantDamage(t *testing.T, v *cryptfs.Volume, name, what string) {
	t.Helper()
	_, err := cat(v, name)
	if k := fault.Of(err); k != fault.Integrity && k != fault.BadFormat {
		t.Errorf("%s: %v (%v), want %v", what, k, err, fault.Integrity)
	}
}

func flipFixed(t *testing.T, s *victimStore, v *cryptfs.Volume) {
	header := s.header("small")
	defer s.setHeader("small", header)
	for at := range 88 {
		for bit := range 8 {
			h := bytes.Clone(header)
			h[at] ^= 1 << bit
			if s.place == envelope.Sidecar {
				s.write(s.sidecar("small"), h)
			} else {
				s.setHeader("small", h)
			}
			wantDamage(t, v, "small", fmt.Sprintf("header byte %d, bit %d", at, bit))
		}
	}
}

// flipRest flips bits of the recipients, which the commitment does not cover.
// What the header says of the key's material is for information only, and is
// the one thing that may change without notice.
func flipRest(t *testing.T, s *victimStore, v *cryptfs.Volume) {
	header := s.header("small")
	defer s.setHeader("small", header)
	parsed, err := envelope.Parse(header)
	if err != nil {
		t.Fatal(err)
	}
	w := parsed.Recipients[0].Wrapped
	end := bytes.Index(header, w.Blob) + len(w.Blob) + 1 + len(w.Material)
	material := end - len(w.Material)
	for at := 88; at < headerSize; at++ {
		h := bytes.Clone(header)
		h[at] ^= 1 << (at % 7)
		s.setHeader("small", h)
		got, err := cat(v, "small")
		switch k := fault.Of(err); {
		case err == nil && at >= material && at < end && bytes.Equal(got, s.plain["small"]):
		case k == fault.Integrity, k == fault.BadFormat, k == fault.KeyRejected:
		default:
			t.Errorf("recipients, byte %d: %v (%v)", at, k, err)
		}
	}
}
