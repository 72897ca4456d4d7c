package audit

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// readLines returns the lines of a file without their newlines.
func readLines(t *testing.T, path string) [][]byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Split(bytes.TrimSuffix(b, []byte("\n")), []byte("\n"))
}

func writeLines(t *testing.T, path string, lines [][]byte) {
	t.Helper()
	if err := os.WriteFile(path, append(bytes.Join(lines, []byte("\n")), '\n'), 0o600); err != nil {
		t.Fatal(err)
	}
}

// reseal gives a changed line a right hash of its own, as somebody who knows
// the format can.
func reseal(t *testing.T, line []byte, change func(*Event)) []byte {
	t.Helper()
	p, err := parseLine(line)
	if err != nil {
		t.Fatal(err)
	}
	change(&p.Event)
	p.Hash = ""
	prev, ok := parseHash(p.Prev)
	if !ok {
		t.Fatal("prev")
	}
	out, _, err := appendNumbered(nil, link{hash: prev}, p.Event)
	if err != nil {
		t.Fatal(err)
	}
	return out[:len(out)-1]
}

// rewrite gives all lines from i on new hashes that fit.
func rewrite(t *testing.T, lines [][]byte, i int) [][]byte {
	t.Helper()
	end := link{}
	if i > 0 {
		p, err := parseLine(lines[i-1])
		if err != nil {
			t.Fatal(err)
		}
		end = p.link
	}
	for j := i; j < len(lines); j++ {
		var e Event
		if err := json.Unmarshal(lines[j], &e); err != nil {
			t.Fatal(err)
		}
		out, next, err := appendLine(nil, end, e)
		if err != nil {
			t.Fatal(err)
		}
		lines[j], end = out[:len(out)-1], next
	}
	return lines
}

func TestTampering(t *testing.T) {
	deny := func(e *Event) { e.Result = "ok"; e.Class = "general" }
	for _, tc := range []struct {
		name string
		do   func(t *testing.T, lines [][]byte) [][]byte
		want string // part of the first problem
	}{
		{"line changed", func(_ *testing.T, l [][]byte) [][]byte {
			l[4] = bytes.Replace(l[4], []byte(`"phi"`), []byte(`"pci"`), 1)
			return l
		}, "not a line of the log, or changed"},
		{"one bit of a hash", func(_ *testing.T, l [][]byte) [][]byte { l[4][len(l[4])-4] ^= 1; return l }, "not a line of the log, or changed"},
		{"white space", func(_ *testing.T, l [][]byte) [][]byte { l[4] = append(l[4], ' '); return l }, "not a line of the log, or changed"},
		{"changed with its hash", func(t *testing.T, l [][]byte) [][]byte { l[4] = reseal(t, l[4], deny); return l }, "one of them was replaced"},
		{"removed", func(_ *testing.T, l [][]byte) [][]byte { return slices.Delete(l, 4, 5) }, "lines 5 to 5 are missing"},
		{"two removed", func(_ *testing.T, l [][]byte) [][]byte { return slices.Delete(l, 4, 6) }, "lines 5 to 6 are missing"},
		{"removed, renumbered", func(t *testing.T, l [][]byte) [][]byte {
			l = slices.Delete(l, 4, 5)
			l[4] = reseal(t, l[4], func(e *Event) { e.Seq-- })
			return l
		}, "one of them was replaced"},
		{"swapped", func(_ *testing.T, l [][]byte) [][]byte { l[4], l[5] = l[5], l[4]; return l }, "missing"},
		{"doubled", func(_ *testing.T, l [][]byte) [][]byte { return slices.Insert(l, 5, l[4]) }, "moved, or put in"},
		{"put in", func(t *testing.T, l [][]byte) [][]byte { return slices.Insert(l, 5, reseal(t, l[4], deny)) }, "moved, or put in"},
		{"blank line", func(_ *testing.T, l [][]byte) [][]byte { return slices.Insert(l, 5, nil) }, "not a line of the log"},
		{"long line", func(_ *testing.T, l [][]byte) [][]byte {
			return slices.Insert(l, 5, bytes.Repeat([]byte("x"), 3*MaxLine))
		}, "not a line of the log"},
		{"beginning cut off", func(_ *testing.T, l [][]byte) [][]byte { return l[3:] }, "the beginning is missing"},
		{"end cut off", func(_ *testing.T, l [][]byte) [][]byte { return l[:7] }, "the end is cut off"},
		{"all cut off", func(_ *testing.T, l [][]byte) [][]byte { return nil }, "the end is cut off"},
		{"last line in half", func(_ *testing.T, l [][]byte) [][]byte { l[9] = l[9][:50]; return l }, "the end is cut off"},
		{"torn line for a real one", func(t *testing.T, l [][]byte) [][]byte {
			var g garbage
			g.add(l[5])
			l[6] = reseal(t, l[6], func(e *Event) { e.Kind, e.Torn = KindTorn, g.torn() })
			l[5] = l[5][:20]
			return l
		}, "not what the \"torn\" line"},
		{"torn line without one", func(t *testing.T, l [][]byte) [][]byte {
			l[6] = reseal(t, l[6], func(e *Event) { e.Kind, e.Torn = KindTorn, new(garbage).torn() })
			return l
		}, "without an incomplete write"},
		{"rewritten to the end", func(t *testing.T, l [][]byte) [][]byte {
			return rewrite(t, slices.Delete(l, 4, 5), 4)
		}, "the end is cut off"},
		{"rewritten with as many lines", func(t *testing.T, l [][]byte) [][]byte {
			l[4] = bytes.Replace(l[4], []byte(`"phi"`), []byte(`"pci"`), 1)
			return rewrite(t, l, 4)
		}, "not the one that the head file names"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "audit.log")
			fill(t, path, 10, Options{})
			noted := clean(t, path, 10).Head
			writeLines(t, path, tc.do(t, readLines(t, path)))
			r := verify(t, path)
			if r.OK() || !strings.Contains(r.Problems[0].Text, tc.want) {
				t.Errorf("problems %v, want %q", r.Problems, tc.want)
			}
			// With the head file changed as well, a noted head still shows it.
			end := [32]byte{}
			if r.Head != "" {
				end, _ = parseHash(r.Head)
			}
			b, _ := json.Marshal(head{r.Last, hex.EncodeToString(end[:]), r.To})
			if err := os.WriteFile(path+headSuffix, b, 0o600); err != nil {
				t.Fatal(err)
			}
			if r := verify(t, path, noted); r.OK() {
				t.Error("with the head file changed too, nothing shows although the head was noted")
			}
		})
	}
}

func TestTamperingWithTheHead(t *testing.T) {
	for _, tc := range []struct {
		name string
		do   func(path string) error
		want string
	}{
		{"removed", func(p string) error { return os.Remove(p + headSuffix) }, "there is no head file"},
		{"garbage", func(p string) error { return os.WriteFile(p+headSuffix, []byte("{}"), 0o600) }, "damaged"},
		{"huge", func(p string) error {
			return os.WriteFile(p+headSuffix, bytes.Repeat([]byte(" "), 1<<20), 0o600)
		}, "damaged"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "audit.log")
			fill(t, path, 10, Options{})
			noted := verify(t, path).Head
			if err := tc.do(path); err != nil {
				t.Fatal(err)
			}
			if r := verify(t, path); r.OK() || !strings.Contains(r.Problems[0].Text, tc.want) {
				t.Errorf("problems %v, want %q", r.Problems, tc.want)
			}
			if r := verify(t, path, noted); tc.name == "removed" && (!r.OK() || len(r.Warnings) != 1) {
				t.Errorf("with the noted head: problems %v, warnings %v", r.Problems, r.Warnings)
			}
			// The next writer must not make it look whole.
			fill(t, path, 1, Options{})
			if r := verify(t, path); r.OK() || !strings.Contains(r.Problems[0].Text, "when the log was opened") {
				t.Errorf("opened again: problems %v", r.Problems)
			}
		})
	}
}

// TestReopeningHidesNothing: a mount after the tampering would replace the head
// file, so it notes first what does not fit.
func TestReopeningHidesNothing(t *testing.T) {
	for _, n := range []int{0, 1} { // events of the next mount
		path := filepath.Join(t.TempDir(), "audit.log")
		fill(t, path, 10, Options{})
		writeLines(t, path, readLines(t, path)[:7])
		fill(t, path, n, Options{})
		r := verify(t, path)
		if len(r.Problems) != 1 || !strings.Contains(r.Problems[0].Text, "says 10 lines, the log ends at 7") || r.Last != uint64(11+n) {
			t.Errorf("cut, then %d events: last %d, problems %v", n, r.Last, r.Problems)
		}
		fill(t, path, 1, Options{}) // and it stays so, once
		if r := verify(t, path); len(r.Problems) != 1 {
			t.Errorf("problems %v", r.Problems)
		}

		path = filepath.Join(t.TempDir(), "audit.log")
		fill(t, path, 10, Options{})
		lines := readLines(t, path)
		lines[9] = reseal(t, lines[9], func(e *Event) { e.Class = "general" })
		writeLines(t, path, lines)
		fill(t, path, n, Options{})
		if r := verify(t, path); len(r.Problems) != 1 || !strings.Contains(r.Problems[0].Text, "line 10 is not the one") {
			t.Errorf("changed, then %d events: problems %v", n, r.Problems)
		}
	}
}

// TestManyFindings: the lists are bounded.
func TestManyFindings(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	fill(t, path, 3, Options{})
	lines := readLines(t, path)
	var all [][]byte
	for range 2 * maxFindings {
		all = append(all, lines...)
	}
	writeLines(t, path, all)
	if r := verify(t, path); len(r.Problems) != maxFindings || r.More == 0 {
		t.Errorf("%d problems, %d more", len(r.Problems), r.More)
	}
}
