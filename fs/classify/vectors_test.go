package classify_test

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/fs/classify"
)

var update = flag.Bool("update", false, "rewrite the heads of testdata/vectors from what Parse answers; texts stay, and the difference is for review")

// vector is one file of testdata/vectors: a policy text, and what Parse makes
// of it.
type vector struct {
	file      string
	comment   string
	expect    fault.Kind // None: it parses
	canonical string     // Marshal's answer
	line      int        // ParseError.Line
	field     string     // ParseError.Field
	problem   string     // ParseError.Problem
	policy    []byte
}

// loadVectors reads every vector. It fails on none, and on anything in a head
// that it does not know.
func loadVectors(t testing.TB) []vector {
	t.Helper()
	files, err := filepath.Glob("testdata/vectors/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no vectors (%v)", err)
	}
	var out []vector
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		v, err := parseVector(text)
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		v.file = file
		out = append(out, v)
	}
	return out
}

func parseVector(text []byte) (v vector, err error) {
	head, payload, ok := bytes.Cut(text, []byte("\n\n"))
	if !ok {
		return v, fmt.Errorf("no blank line")
	}
	v.policy = payload
	seen := map[string]bool{}
	for line := range strings.Lines(string(head)) {
		key, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ": ")
		if seen[key] {
			return v, fmt.Errorf("%s: twice", key)
		}
		seen[key] = true
		if err := v.set(key, value); err != nil {
			return v, fmt.Errorf("%s: %w", key, err)
		}
	}
	failure := seen["line"] && seen["field"] && seen["problem"]
	if !seen["comment"] || !seen["expect"] || seen["canonical"] != (v.expect == fault.None) || failure != (v.expect != fault.None) {
		return v, fmt.Errorf("the head lacks a key, or has one of the other outcome")
	}
	return v, nil
}

func (v *vector) set(key, value string) (err error) {
	ok := true
	switch key {
	case "comment":
		v.comment = value
	case "expect":
		if value != "ok" {
			v.expect, ok = fault.ParseKind(value)
			ok = ok && v.expect != fault.None
		}
	case "canonical":
		v.canonical = value
	case "line":
		v.line, err = strconv.Atoi(value)
	case "field":
		v.field = value
	case "problem":
		v.problem = value
	default:
		ok = false
	}
	if err == nil && !ok {
		return fmt.Errorf("unknown: %q", value)
	}
	return err
}

func (v *vector) text() []byte {
	b := fmt.Appendf(nil, "comment: %s\n", v.comment)
	if v.expect == fault.None {
		b = fmt.Appendf(b, "expect: ok\ncanonical: %s\n\n", v.canonical)
	} else {
		b = fmt.Appendf(b, "expect: %v\nline: %d\nfield: %s\nproblem: %s\n\n", v.expect, v.line, v.field, v.problem)
	}
	return append(b, v.policy...)
}

// regenerate fills in everything but comment, expected outcome and text.
func (v *vector) regenerate(t *testing.T) {
	p, err := classify.Parse(v.policy)
	var bad *classify.ParseError
	if errors.As(err, &bad) {
		v.line, v.field, v.problem = bad.Line, bad.Field, bad.Problem
	} else {
		v.canonical = string(p.Marshal())
	}
	if err := os.WriteFile(v.file, v.text(), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestVectors(t *testing.T) {
	kinds := map[fault.Kind]int{}
	for _, v := range loadVectors(t) {
		kinds[v.expect]++
		t.Run(strings.TrimSuffix(filepath.Base(v.file), ".txt"), func(t *testing.T) {
			p, err := classify.Parse(v.policy)
			if got := fault.Of(err); got != v.expect || (err == nil) != (v.expect == fault.None) {
				t.Fatalf("Parse: %v (%v), want %v", err, got, v.expect)
			}
			if *update {
				v.regenerate(t)
			}
			if err == nil {
				if got := string(p.Marshal()); got != v.canonical {
					t.Errorf("got  %s\nwant %s", got, v.canonical)
				}
				roundTrip(t, p)
				return
			}
			var bad *classify.ParseError
			if !errors.As(err, &bad) || bad.Line != v.line || bad.Field != v.field || bad.Problem != v.problem {
				t.Errorf("got  %#v\nwant line %d, field %s, problem %s", bad, v.line, v.field, v.problem)
			}
			if bad != nil && (bad.Hint == "" || !strings.HasSuffix(err.Error(), bad.Hint)) {
				t.Errorf("%q does not end in a hint", err)
			}
		})
	}
	for _, kind := range []fault.Kind{fault.None, fault.Invalid} {
		if kinds[kind] == 0 {
			t.Errorf("no vector expects %v", kind)
		}
	}
}

// TestVectorLoaderRefuses plants the mistakes that the loader exists to see.
func TestVectorLoaderRefuses(t *testing.T) {
	good := loadVectors(t)[0]
	text := string(good.text())
	if _, err := parseVector([]byte(text)); err != nil {
		t.Fatalf("a good vector: %v", err)
	}
	for what, bad := range map[string]string{
		"unknown key":    "colour: red\n" + text,
		"missing key":    text[strings.Index(text, "\n")+1:],
		"key twice":      "comment: x\n" + text,
		"unknown expect": strings.Replace(text, "expect: ", "expect: not-", 1),
		"no payload":     text[:strings.Index(text, "\n\n")],
	} {
		if _, err := parseVector([]byte(bad)); err == nil {
			t.Errorf("%s: accepted", what)
		}
	}
}
