package audit

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestCrashAtEveryByte ends the log at every byte behind its head, as a crash
// can, and goes on.
func TestCrashAtEveryByte(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "whole.log")
	l := open(t, path, Options{Required: true, HeadInterval: time.Hour})
	if err := errors.Join(l.Write(use(0)), l.Sync()); err != nil { // the head is at line 1
		t.Fatal(err)
	}
	head, err := os.ReadFile(path + headSuffix)
	if err != nil {
		t.Fatal(err)
	}
	start := l.w.tape.size
	if err := errors.Join(l.Write(use(1)), l.Write(use(2)), l.Close()); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, tail := range []string{"", strings.Repeat("\x00", 100), "\n", "{}\n", strings.Repeat("\x00", firstWindow+100)} {
		step := 1
		if len(tail) > 0 {
			step = 211
		}
		for cut := int(start); cut <= len(whole); cut += step {
			path := filepath.Join(dir, "cut.log")
			for name, b := range map[string][]byte{path: append(bytes.Clone(whole[:cut]), tail...), path + headSuffix: head} {
				if err := os.WriteFile(name, b, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if r := verify(t, path); len(tail) == 0 && !r.OK() {
				t.Fatalf("cut at %d, before: problems %v", cut, r.Problems)
			}
			fill(t, path, 2, Options{})
			r := verify(t, path)
			if !r.OK() {
				t.Fatalf("cut at %d, tail %.10q: problems %v", cut, tail, r.Problems)
			}
			lines := uint64(bytes.Count(whole[:cut], []byte("\n"))) + 2
			if cut == len(whole)-1 || cut > 0 && whole[cut-1] == '}' { // whole but for the newline
				if len(tail) == 0 || tail[0] == '\n' {
					lines++
				}
			}
			if len(r.Warnings) > 0 {
				lines++ // the "torn" line
			}
			if r.Lines != lines {
				t.Fatalf("cut at %d, tail %.10q: got %d lines, want %d", cut, tail, r.Lines, lines)
			}
		}
	}
}

// TestShortWriteAtEveryByte: the disk is full after n bytes, several times in a
// row, and then is not.
func TestShortWriteAtEveryByte(t *testing.T) {
	for _, again := range []int{0, 1, 2, 60, 500} { // bytes that the second attempt gets in
		for n := 0; n <= 1000; n += 1 + 6*min(again, 1) {
			path := filepath.Join(t.TempDir(), "audit.log")
			p, err := openPlace(path)
			if err != nil {
				t.Fatal(err)
			}
			tp, err := openTape(p)
			if err != nil {
				t.Fatal(err)
			}
			room := 0
			tp.write = func(f *os.File, b []byte) (int, error) {
				if len(b) <= room {
					room -= len(b)
					return f.Write(b)
				}
				got, err := f.Write(b[:room])
				room = 0
				return got, errors.Join(err, syscall.ENOSPC)
			}
			wrote := uint64(0)
			add := func(bytes, events int) {
				room = bytes
				n, err := tp.append([]Event{use(1).bounded(), use(2).bounded()}[:events], time.Now())
				wrote += uint64(n)
				if err == nil && n != events {
					t.Fatalf("%d of %d events without an error", n, events)
				}
			}
			add(n, 2)
			add(again, 2)
			add(1<<20, 1)
			if err := errors.Join(tp.sync(time.Now()), tp.f.Close(), p.close()); err != nil {
				t.Fatal(err)
			}
			r := verify(t, path)
			uses := uint64(0)
			for _, e := range events(t, path) {
				if e.Kind == KindUse {
					uses++
				}
			}
			if !r.OK() || uses != wrote || tp.torn.n != 0 {
				t.Fatalf("room for %d, then %d bytes: %d uses, %d reported, problems %v", n, again, uses, wrote, r.Problems)
			}
		}
	}
}

const fullEnv = "KMSFS_AUDIT_TEST_FULL"

// TestFullDisk runs itself with a limit on file sizes (setrlimit(2),
// RLIMIT_FSIZE), which cuts writes short as a full disk does.
func TestFullDisk(t *testing.T) {
	for _, mode := range []string{"default", "required"} {
		t.Run(mode, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "audit.log")
			cmd := exec.Command(os.Args[0], "-test.run=^TestFullDiskChild$", "-test.count=1", "-test.v")
			cmd.Env = append(os.Environ(), fullEnv+"="+mode+":"+path)
			out, err := cmd.CombinedOutput()
			if err != nil || !strings.Contains(string(out), "--- PASS: TestFullDiskChild") {
				t.Fatalf("%v: %s", err, out)
			}
			r := verify(t, path)
			if !r.OK() || r.Lost == 0 {
				t.Errorf("%d lost, problems %v", r.Lost, r.Problems)
			}
			uses := uint64(0)
			for _, e := range events(t, path) {
				if e.Kind == KindUse {
					uses++
				}
			}
			if uses+r.Lost != 210 {
				t.Errorf("%d uses in the log and %d lost, want 210 together", uses, r.Lost)
			}
		})
	}
}

// TestFullDiskChild is the other half of TestFullDisk; alone it checks the same
// without a limit.
func TestFullDiskChild(t *testing.T) {
	mode, path, limited := strings.Cut(os.Getenv(fullEnv), ":")
	if !limited {
		mode, path = "default", filepath.Join(t.TempDir(), "audit.log")
	}
	required := mode == "required"
	l := open(t, path, Options{Required: required, HeadInterval: time.Hour})
	var before syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &before); err != nil {
		t.Fatal(err)
	}
	setLimit := func(bytes uint64) {
		if limited {
			if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: bytes, Max: before.Max}); err != nil {
				t.Fatal(err)
			}
		}
	}
	write := func(n int) (failed int) {
		for i := range n {
			err := l.Write(use(i))
			if err != nil && (!required || !errors.Is(err, ErrNotLogged) || !errors.Is(err, syscall.EFBIG)) {
				t.Fatalf("got %v", err)
			}
			if err != nil {
				failed++
			}
		}
		return failed
	}
	setLimit(20_011)
	failed := write(200)
	_ = l.Sync() // fails: the "torn" line has no room
	setLimit(before.Cur)
	s := l.Stats()
	if limited && (s.Lost == 0 || !s.Failing || s.Error == "" || required && uint64(failed) != s.Lost) {
		t.Errorf("%d writes failed, stats %+v", failed, s)
	}
	if n := write(10); n > 0 {
		t.Errorf("%d writes failed with room", n)
	}
	if err := l.Sync(); err != nil {
		t.Fatal(err)
	}
	if after := l.Stats(); after.Failing || after.Written+after.Lost != 210 {
		t.Errorf("stats %+v", after)
	}
}

// TestQueueOverflow: the disk hangs; nobody waits, and what had no room is told.
func TestQueueOverflow(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	p, err := openPlace(path)
	if err != nil {
		t.Fatal(err)
	}
	hang := make(chan struct{})
	l := openWith(t, p, Options{Queue: 10}, func(f *os.File, b []byte) (int, error) { <-hang; return f.Write(b) })
	for i := range 100 {
		if err := l.Write(use(i)); err != nil {
			t.Fatal(err)
		}
	}
	close(hang)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	r := verify(t, path)
	if !r.OK() || r.Lost < 70 {
		t.Errorf("%d lost, problems %v", r.Lost, r.Problems)
	}
	if s := l.Stats(); s.Lost != r.Lost || s.Written+s.Lost != 100 {
		t.Errorf("stats %+v, %d lost in the log", s, r.Lost)
	}
}

// openWith is Open with a write(2) of its own.
func openWith(t *testing.T, p *place, o Options, write func(*os.File, []byte) (int, error)) *Log {
	t.Helper()
	lock, err := p.lock()
	if err != nil {
		t.Fatal(err)
	}
	tp, err := openTape(p)
	if err != nil {
		t.Fatal(err)
	}
	tp.write = write
	l := newLog(p, lock, tp, o)
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func BenchmarkWrite(b *testing.B) {
	for _, o := range []Options{{}, {Required: true}} {
		b.Run(fmt.Sprintf("required=%v", o.Required), func(b *testing.B) {
			l, err := Open(filepath.Join(b.TempDir(), "audit.log"), o)
			if err != nil {
				b.Fatal(err)
			}
			e := use(1)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if err := l.Write(e); err != nil {
						b.Error(err)
					}
				}
			})
			if err := l.Close(); err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(float64(l.Stats().Lost), "lost")
		})
	}
}
