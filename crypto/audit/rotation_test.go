package audit

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestRotation(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	l := open(t, path, Options{Required: true, MaxSize: 4 << 10})
	for i := range 100 {
		if err := l.Write(use(i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Reopen(); err != nil {
		t.Fatal(err)
	}
	if err := l.Reopen(); err != nil { // nothing was written since
		t.Fatal(err)
	}
	// As logrotate does: move it away, then tell.
	if err := l.Write(use(100)); err != nil {
		t.Fatal(err)
	}
	for _, move := range [][2]string{{path, path + ".0"}} {
		if err := os.Rename(move[0], move[1]); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Write(use(101)); err != nil { // still in the old one
		t.Fatal(err)
	}
	if err := l.Reopen(); err != nil {
		t.Fatal(err)
	}
	if err := l.Write(use(102)); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if r := verify(t, path); r.OK() || !strings.Contains(r.Problems[0].Text, "missing before") {
		t.Errorf("FILE.0 is no part of the log: got %v", r.Problems)
	}
	shiftUp(t, path)
	if err := os.Rename(path+".0", path+".1"); err != nil {
		t.Fatal(err)
	}
	r := verify(t, path)
	if !r.OK() || len(r.Files) < 10 || len(r.Warnings) > 0 {
		t.Fatalf("%d files, problems %v, warnings %v", len(r.Files), r.Problems, r.Warnings)
	}
	uses, rotates := 0, 0
	for i, e := range events(t, path) {
		if e.Seq != uint64(i+1) {
			t.Fatalf("event %d has number %d", i, e.Seq)
		}
		switch e.Kind {
		case KindUse:
			uses++
		case KindRotate:
			rotates++
		}
	}
	if uses != 103 || rotates != len(r.Files)-1 {
		t.Errorf("%d uses and %d rotations in %d files", uses, rotates, len(r.Files))
	}
	// Old files that are put away are told, and are no problem.
	oldest := r.Files[0].Name
	if err := os.Remove(oldest); err != nil {
		t.Fatal(err)
	}
	if r := verify(t, path); !r.OK() || len(r.Warnings) != 1 || !strings.Contains(r.Warnings[0].Text, "older files") {
		t.Errorf("without %s: problems %v, warnings %v", oldest, r.Problems, r.Warnings)
	}
	// One in the middle is a problem.
	if err := os.Remove(path + ".3"); err != nil {
		t.Fatal(err)
	}
	if r := verify(t, path); r.OK() {
		t.Error("a missing file in the middle does not show")
	}
}

// shiftUp renames FILE.N to FILE.N+1 for all N.
func shiftUp(t *testing.T, path string) {
	t.Helper()
	p, err := openPlace(path)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	numbers, err := p.archives()
	if err != nil {
		t.Fatal(err)
	}
	for i := len(numbers) - 1; i >= 0; i-- {
		if err := os.Rename(fmt.Sprintf("%s.%d", path, numbers[i]), fmt.Sprintf("%s.%d", path, numbers[i]+1)); err != nil {
			t.Fatal(err)
		}
	}
}

// TestRotationLeftHalfDone opens a log in each state that a crash during a
// rotation can leave.
func TestRotationLeftHalfDone(t *testing.T) {
	for _, tc := range []struct {
		name  string
		leave func(t *testing.T, path string)
	}{
		{"renamed", func(t *testing.T, path string) { rename(t, path, path+".1") }},
		{"renamed, empty file", func(t *testing.T, path string) {
			rename(t, path, path+".1")
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}},
		{"some renamed", func(t *testing.T, path string) { // 3 → 4 done, 2 → 3 not
			rename(t, path+".1", path+".2")
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "audit.log")
			if strings.HasPrefix(tc.name, "some") {
				l := open(t, path, Options{Required: true})
				_ = l.Write(use(0))
				if err := errors.Join(l.Reopen(), l.Close()); err != nil {
					t.Fatal(err)
				}
			}
			fill(t, path, 3, Options{})
			tc.leave(t, path)
			fill(t, path, 3, Options{})
			r := verify(t, path)
			if !r.OK() || len(r.Warnings) > 0 {
				t.Errorf("problems %v, warnings %v", r.Problems, r.Warnings)
			}
			l := open(t, path, Options{})
			if err := errors.Join(l.Write(use(9)), l.Reopen(), l.Write(use(10)), l.Close()); err != nil {
				t.Fatal(err)
			}
			if r := verify(t, path); !r.OK() || len(r.Warnings) > 0 {
				t.Errorf("after another rotation: problems %v, warnings %v", r.Problems, r.Warnings)
			}
		})
	}
}

func rename(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

// TestMovedWhileClosed: the chain goes on although the whole log was put away.
func TestMovedWhileClosed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	fill(t, path, 5, Options{})
	rename(t, path, path+".old")
	fill(t, path, 2, Options{})
	r := verify(t, path)
	if !r.OK() || r.First != 6 || r.Last != 8 || len(r.Warnings) != 1 {
		t.Errorf("lines %d to %d, problems %v, warnings %v", r.First, r.Last, r.Problems, r.Warnings)
	}
	rename(t, path+".old", path+".1")
	clean(t, path, 8)
}

// TestGoesOnInTheOldFile: a rotation that fails stops nothing.
func TestGoesOnInTheOldFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	var text bytes.Buffer
	l := open(t, path, Options{Required: true, MaxSize: 1 << 10, HeadInterval: time.Hour, Log: slog.New(slog.NewTextHandler(&text, nil))})
	_ = l.Write(use(0))
	// A foreign file takes the name, as a logrotate with "create" could do it.
	rename(t, path, path+".1")
	if err := os.WriteFile(path, []byte("foreign\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		if err := l.Write(use(i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Reopen(); !errors.Is(err, ErrFile) {
		t.Errorf("got %v, want ErrFile", err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(l.Reopen(), l.Write(use(21)), l.Close()); err != nil {
		t.Fatal(err)
	}
	clean(t, path, 23)
	if n := strings.Count(text.String(), "could not be rotated"); n != 1 {
		t.Errorf("told %d times: %s", n, text.String())
	}
}
