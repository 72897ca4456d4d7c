package envelope_test

import (
	"bytes"
	"encoding/hex"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/fault"
)

var update = flag.Bool("update", false, "write testdata/vectors anew from vectorgen_test.go")

const vectorDir = "testdata/vectors"

// vector is one file of testdata/vectors: "key: value" lines, an empty line,
// the header block in hexadecimal without its trailing zeros.
//
//	comment  what the vector shows
//	expect   ok, or the kind of the error of Parse or Check
//	size     length of the block; the payload is padded with zeros to it
//	dek      data key in hexadecimal; with it, the commitment is checked
//	prk      what store id, file id and dek derive to; goes with dek
//	branch   branch key of a shared key in hexadecimal, from which dek is
//	         unwrapped for the class of the first recipient; goes with dek
type vector struct {
	name, comment string
	expect        fault.Kind // None: ok
	dek, prk      []byte
	branch        []byte
	block         []byte
}

func parseVector(name string, text []byte) (*vector, error) {
	head, payload, found := strings.Cut(string(text), "\n\n")
	if !found {
		return nil, fmt.Errorf("%s: no empty line", name)
	}
	fields := map[string]string{}
	for line := range strings.Lines(head) {
		key, value, ok := strings.Cut(strings.TrimSuffix(line, "\n"), ": ")
		if _, twice := fields[key]; !ok || twice {
			return nil, fmt.Errorf("%s: bad or repeated line %q", name, line)
		}
		fields[key] = value
	}
	v := &vector{name: name}
	var size int
	for key, value := range fields {
		var err error
		switch key {
		case "comment":
			v.comment = value
		case "expect":
			if value != "ok" {
				var known bool
				if v.expect, known = fault.ParseKind(value); !known || v.expect == fault.None {
					err = fmt.Errorf("unknown kind")
				}
			}
		case "size":
			_, err = fmt.Sscanf(value, "%d", &size)
		case "dek":
			v.dek, err = hex.DecodeString(value)
		case "prk":
			v.prk, err = hex.DecodeString(value)
		case "branch":
			v.branch, err = hex.DecodeString(value)
		default:
			err = fmt.Errorf("unknown key")
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %s: %q: %w", name, key, value, err)
		}
	}
	if fields["expect"] == "" || fields["comment"] == "" || (v.dek == nil) != (v.prk == nil) || v.branch != nil && v.dek == nil {
		return nil, fmt.Errorf("%s: incomplete head", name)
	}
	block, err := hex.DecodeString(strings.Join(strings.Fields(payload), ""))
	if err != nil || len(block) > size || size > 1<<20 {
		return nil, fmt.Errorf("%s: payload of %d bytes for size %d: %v", name, len(block), size, err)
	}
	v.block = append(block, make([]byte, size-len(block))...)
	return v, nil
}

// format is the inverse of parseVector.
func (v *vector) format() []byte {
	var b bytes.Buffer
	expect := "ok"
	if v.expect != fault.None {
		expect = v.expect.String()
	}
	fmt.Fprintf(&b, "comment: %s\nexpect: %s\nsize: %d\n", v.comment, expect, len(v.block))
	if v.dek != nil {
		fmt.Fprintf(&b, "dek: %x\nprk: %x\n", v.dek, v.prk)
	}
	if v.branch != nil {
		fmt.Fprintf(&b, "branch: %x\n", v.branch)
	}
	b.WriteByte('\n')
	for line := range slices.Chunk(bytes.TrimRight(v.block, "\x00"), 32) {
		fmt.Fprintf(&b, "%x\n", line)
	}
	return b.Bytes()
}

// loadVectors fails on no file, and on a file that it does not understand whole.
func loadVectors(t testing.TB) []*vector {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(vectorDir, "*.txt"))
	if err != nil || len(paths) == 0 {
		t.Fatalf("no vectors in %s: %v", vectorDir, err)
	}
	var out []*vector
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		v, err := parseVector(filepath.Base(path), text)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, v)
	}
	return out
}

// F-12
func TestVectors(t *testing.T) {
	seen := map[fault.Kind]int{}
	for _, v := range loadVectors(t) {
		seen[v.expect]++
		t.Run(v.name, func(t *testing.T) {
			h, err := envelope.Parse(v.block)
			if err == nil && v.dek != nil {
				err = checkKey(t, v, h)
			}
			wantKind(t, v.comment, err, v.expect)
			if v.expect != fault.None {
				return
			}
			again, err := h.Encode(len(v.block))
			if err != nil || !bytes.Equal(again, v.block) {
				t.Errorf("encodes to %x, %v, want %x", again, err, v.block)
			}
		})
	}
	for _, k := range []fault.Kind{fault.None, fault.BadFormat, fault.Integrity} {
		if seen[k] == 0 {
			t.Errorf("no vector expects %v", k)
		}
	}
}

func checkKey(t *testing.T, v *vector, h *envelope.Header) error {
	k, err := envelope.NewFileKey(v.dek, h.Store, h.File)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Wipe()
	if v.branch != nil {
		k.Wipe()
		if k, err = envelope.Unseal(v.branch, h.Recipients[0].Class, h); err != nil {
			return err
		}
		defer k.Wipe()
	}
	if v.expect == fault.None && !bytes.Equal(k.PRK().Bytes(), v.prk) {
		t.Errorf("got PRK %x, want %x", k.PRK().Bytes(), v.prk)
	}
	return k.Check(h)
}

// TestVectorsAreCurrent keeps generator and files together; with -update it
// writes the files. Files that the generator does not make are left alone.
func TestVectorsAreCurrent(t *testing.T) {
	made := makeVectors(t)
	for _, name := range slices.Sorted(maps.Keys(made)) {
		path := filepath.Join(vectorDir, name)
		if *update {
			if err := os.WriteFile(path, made[name].format(), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		got, err := os.ReadFile(path)
		if err != nil || !bytes.Equal(got, made[name].format()) {
			t.Errorf("%s is not what the generator makes (%v); run with -update if the format is meant to change", name, err)
		}
	}
}

func TestVectorLoaderRefuses(t *testing.T) {
	good := "comment: c\nexpect: ok\nsize: 2\n\n0102\n"
	if _, err := parseVector("good", []byte(good)); err != nil {
		t.Errorf("good vector: %v", err)
	}
	for _, edit := range [][2]string{
		{"expect: ok", "expect: fine"}, {"expect: ok", "expect: none"}, {"expect: ok\n", ""}, {"comment: c\n", ""},
		{"size: 2", "size: 1"}, {"size: 2", "length: 2"}, {"size: 2", "size: 2\nsize: 2"}, {"size: 2", "size: 2\ndek: 00"}, {"size: 2", "size: 2\nbranch: 00"},
		{"0102", "010"}, {"\n\n", "\n"},
	} {
		if v, err := parseVector("bad", []byte(strings.Replace(good, edit[0], edit[1], 1))); err == nil {
			t.Errorf("%q for %q: got %+v, want an error", edit[1], edit[0], v)
		}
	}
}
