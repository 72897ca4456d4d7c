package audit

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/kmsfs/kmsfs/crypto/fault"
)

const testARN = "arn:aws:kms:us-east-1:111122223333:key/0d1f"

func use(i int) Event {
	return Event{Kind: KindUse, Op: "open", Class: "phi", Key: testARN, File: fmt.Sprintf("%032x", i), Purpose: "data",
		Requests: []string{"r1", "r2"}, Request: "r2", Source: "call", Result: OK, Caller: &Caller{UID: 1000, GID: 100, PID: uint32(os.Getpid())}}
}

func open(t *testing.T, path string, o Options) *Log {
	t.Helper()
	l, err := Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return l
}

// fill makes a log of n uses at path.
func fill(t *testing.T, path string, n int, o Options) {
	t.Helper()
	l := open(t, path, o)
	for i := range n {
		if err := l.Write(use(i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

func verify(t *testing.T, path string, heads ...string) Report {
	t.Helper()
	r, err := Verify(path, heads...)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func clean(t *testing.T, path string, lines uint64) Report {
	t.Helper()
	r := verify(t, path)
	if !r.OK() || len(r.Warnings) > 0 || r.Lines != lines {
		t.Fatalf("got %d lines, problems %v, warnings %v; want %d lines and nothing else", r.Lines, r.Problems, r.Warnings, lines)
	}
	return r
}

func events(t *testing.T, path string) (out []Event) {
	t.Helper()
	if _, err := Walk(path, func(e Event) error { out = append(out, e); return nil }); err != nil {
		t.Fatal(err)
	}
	return out
}

func TestRoundTrip(t *testing.T) {
	for _, o := range []Options{{}, {Required: true}, {Required: true, Sync: true}} {
		path := filepath.Join(t.TempDir(), "audit.log")
		o.Mount, o.Store = "/mnt/plain", "00ff"
		fill(t, path, 10, o)
		clean(t, path, 10)
		fill(t, path, 5, o) // goes on
		clean(t, path, 15)
		got := events(t, path)
		if len(got) != 15 {
			t.Fatalf("got %d events, want 15", len(got))
		}
		e := got[3]
		if e.Seq != 4 || e.Caller == nil || e.Program == "" || e.UID != 1000 || e.Mount != "/mnt/plain" || e.Store != "00ff" || e.Time.Location() != time.UTC || time.Since(e.Time) > time.Hour {
			t.Errorf("got %+v", e)
		}
		if e.Key != testARN || len(e.Requests) != 2 || e.Request != "r2" || e.Source != "call" || e.Failed() {
			t.Errorf("got %+v", e)
		}
		for name, mode := range map[string]os.FileMode{path: 0o600, path + headSuffix: 0o600} {
			if st, err := os.Stat(name); err != nil || st.Mode().Perm() != mode {
				t.Errorf("%s: %v, %v; want mode %v", name, st.Mode(), err, mode)
			}
		}
	}
}

// TestLineShape pins what a verifier in another language relies on.
func TestLineShape(t *testing.T) {
	e := Event{Time: time.Date(2026, 11, 23, 1, 2, 3, 4, time.UTC), Kind: KindUse, Class: "phi", Result: OK, Caller: &Caller{UID: 1, GID: 2, PID: 3, Program: "cat"}}
	line, end, err := appendLine(nil, link{}, e)
	if err != nil {
		t.Fatal(err)
	}
	bare := `{"seq":1,"time":"2026-11-23T01:02:03.000000004Z","kind":"use","uid":1,"gid":2,"pid":3,"program":"cat","class":"phi","result":"ok","prev":"` + strings.Repeat("0", 64)
	sum := lineHash([32]byte{}, []byte(bare+`"}`))
	if want := fmt.Sprintf("%s\",\"hash\":\"%x\"}\n", bare, sum); string(line) != want {
		t.Errorf("got  %s\nwant %s", line, want)
	}
	if end.seq != 1 || end.hash != sum {
		t.Errorf("got end %v", end)
	}
}

func TestLinesAreBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	long := strings.Repeat("\x01", 1<<20)
	var many []string
	for range 1000 {
		many = append(many, long)
	}
	fill(t, path, 0, Options{})
	l := open(t, path, Options{Required: true, Mount: long, Store: long})
	e := Event{Kind: Kind(long), Mount: long, Store: long, Op: long, File: long, Branch: long, Class: long, Key: long, Purpose: long, Request: long, Source: long,
		Result: long, Code: long, Detail: long, Requests: many, Caller: &Caller{Program: long}}
	if err := l.Write(e); err != nil {
		t.Fatal(err)
	}
	if err := l.Write(Event{Kind: KindUse, Detail: "a\nb\xff", Class: strings.Repeat("é", 200)}); err != nil {
		t.Fatal(err)
	}
	if len(many) != 1000 || many[0] != long {
		t.Error("Write changed its argument")
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	clean(t, path, 2)
	got := events(t, path)
	if d := got[1].Detail; d != "a b?" {
		t.Errorf("detail %q", d)
	}
	if c := got[1].Class; c != strings.Repeat("é", 128) {
		t.Errorf("class has %d bytes", len(c))
	}
}

func TestConcurrentWriters(t *testing.T) {
	for _, o := range []Options{{}, {Required: true, Sync: true}, {Required: true, Queue: 3}, {MaxSize: 8 << 10}} {
		path := filepath.Join(t.TempDir(), "audit.log")
		l := open(t, path, o)
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for i := range 200 {
					if err := l.Write(use(i)); err != nil {
						t.Error(err)
					}
					if i%50 == 0 {
						if err := l.Sync(); err != nil {
							t.Error(err)
						}
						if r, err := Verify(path); err != nil || !r.OK() { // beside the writer
							t.Errorf("Verify while writing: %v, %v", r.Problems, err)
						}
					}
				}
			})
		}
		wg.Wait()
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		r := verify(t, path)
		if !r.OK() || len(r.Warnings) > 0 || r.Lines < 1600 {
			t.Errorf("%+v: %d lines, problems %v, warnings %v", o, r.Lines, r.Problems, r.Warnings)
		}
		if s := l.Stats(); s.Written != 1600 || s.Lost != 0 || s.Failing {
			t.Errorf("%+v: got %+v", o, s)
		}
	}
}

func TestOneWriter(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	l := open(t, path, Options{})
	if _, err := Open(path, Options{}); !errors.Is(err, ErrLocked) {
		t.Errorf("got %v, want ErrLocked", err)
	}
	if err := l.Reopen(); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path, Options{}); !errors.Is(err, ErrLocked) {
		t.Errorf("after a rotation: got %v, want ErrLocked", err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	open(t, path, Options{})
}

func TestBadFiles(t *testing.T) {
	dir := t.TempDir()
	target := filepath.Join(dir, "target")
	if err := os.WriteFile(target, []byte("keep"), 0o600); err != nil {
		t.Fatal(err)
	}
	check := func(what, path string, want error) {
		t.Helper()
		if l, err := Open(path, Options{}); !errors.Is(err, want) {
			if l != nil {
				_ = l.Close()
			}
			t.Errorf("%s: got %v, want %v", what, err, want)
		}
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(target, link); err != nil {
		t.Fatal(err)
	}
	check("symbolic link", link, ErrFile)
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	check("fifo", fifo, ErrFile)
	check("directory", dir, syscall.EISDIR)
	check("no directory", filepath.Join(dir, "none", "log"), os.ErrNotExist)
	shared := filepath.Join(dir, "shared")
	if err := os.WriteFile(shared, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(shared, 0o666); err != nil {
		t.Fatal(err)
	}
	check("writable by others", shared, ErrFile)
	evil := filepath.Join(dir, "evil")
	if err := os.Symlink(target, evil+headSuffix); err != nil {
		t.Fatal(err)
	}
	check("head is a symbolic link", evil, ErrFile)
	if b, err := os.ReadFile(target); err != nil || string(b) != "keep" {
		t.Errorf("the target holds %q, %v", b, err)
	}
	if _, err := Verify(filepath.Join(dir, "nothing")); !errors.Is(err, ErrNoLog) {
		t.Errorf("Verify of nothing: got %v", err)
	}
}

func TestClosed(t *testing.T) {
	for _, required := range []bool{false, true} {
		l := open(t, filepath.Join(t.TempDir(), "audit.log"), Options{Required: required})
		if err := errors.Join(l.Close(), l.Close()); err != nil {
			t.Fatal(err)
		}
		err := l.Write(use(1))
		if required && (!errors.Is(err, ErrClosed) || !errors.Is(err, ErrNotLogged)) || !required && err != nil {
			t.Errorf("required %v: Write after Close: %v", required, err)
		}
		if err := l.Sync(); !errors.Is(err, ErrClosed) {
			t.Errorf("Sync after Close: %v", err)
		}
		if err := l.Reopen(); !errors.Is(err, ErrClosed) {
			t.Errorf("Reopen after Close: %v", err)
		}
	}
}

// TestHeadFollows: without any call, the head reaches the disk.
func TestHeadFollows(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	l := open(t, path, Options{HeadInterval: 10 * time.Millisecond})
	for i := range 3 {
		_ = l.Write(use(i))
		for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			var h head
			if b, err := os.ReadFile(path + headSuffix); err == nil && json.Unmarshal(b, &h) == nil && h.Seq == uint64(i+1) {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("no head for line %d", i+1)
			}
		}
	}
}

func TestCaller(t *testing.T) {
	if _, ok := CallerOf(context.Background()); ok {
		t.Error("a caller out of nothing")
	}
	c := Caller{UID: 1, GID: 2, PID: uint32(os.Getpid())}
	got, ok := CallerOf(WithCaller(context.Background(), c))
	if !ok || got != c {
		t.Errorf("got %v, %v", got, ok)
	}
	if p := c.withProgram().Program; p == "" || strings.ContainsAny(p, "\n/") {
		t.Errorf("program %q", p)
	}
	if p := (Caller{PID: 1 << 30}).withProgram().Program; p != "" {
		t.Errorf("program of no process: %q", p)
	}
}

func TestFailure(t *testing.T) {
	secret := &os.PathError{Op: "open", Path: "/patients/smith", Err: syscall.ENOSPC}
	for _, tc := range []struct {
		err            error
		result, detail string
	}{
		{nil, OK, ""},
		{fmt.Errorf("smith: %w", fault.New(fault.KeyDenied, "x: denied")), "key-denied", "x: denied"},
		{secret, "error", "no space left on device"},
		{errors.New("smith"), "error", ""},
	} {
		if result, detail := Failure(tc.err); result != tc.result || detail != tc.detail {
			t.Errorf("%v: got %q, %q; want %q, %q", tc.err, result, detail, tc.result, tc.detail)
		}
	}
}
