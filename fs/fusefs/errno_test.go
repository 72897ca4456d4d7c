package fusefs

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

// S-42
func TestEveryKindHasARow(t *testing.T) {
	for _, kind := range fault.Kinds() {
		r, ok := rows[kind]
		if !ok {
			t.Errorf("kind %v has no row", kind)
			continue
		}
		got, gotRow := translate(fmt.Errorf("reading: %w", fault.New(kind, "test: "+kind.String())))
		if got != kind || gotRow != r {
			t.Errorf("translate(%v) = %v %v, want row %v", kind, got, gotRow, r)
		}
		if r.errno == unix.ENOENT || r.errno == 0 {
			t.Errorf("kind %v looks like a missing file: %v", kind, r.errno)
		}
	}
	if got, want := len(rows), len(fault.Kinds()); got != want {
		t.Errorf("%d rows, want %d", got, want)
	}
}

// S-42
func TestTranslate(t *testing.T) {
	unreachable := &keywrap.CallError{Op: "Decrypt", Key: "keyring:k",
		Err: errors.Join(keywrap.ErrUnavailable, syscall.ECONNREFUSED)}
	for _, test := range []struct {
		name string
		err  error
		want syscall.Errno
	}{
		{"plain errno", unix.ENOENT, unix.ENOENT},
		{"wrapped errno", fmt.Errorf("chunk 3: %w", &fs.PathError{Op: "pread", Path: "x", Err: unix.ENOSPC}), unix.ENOSPC},
		{"joined errno", errors.Join(errors.New("x"), unix.ENOTEMPTY), unix.ENOTEMPTY},
		{"ENOSYS from below", fmt.Errorf("fallocate: %w", unix.ENOSYS), unix.EOPNOTSUPP},
		{"cancelled", fmt.Errorf("open: %w", context.Canceled), unix.EINTR},
		{"deadline", fmt.Errorf("open: %w", context.DeadlineExceeded), unix.ETIMEDOUT},
		{"kind before errno", fmt.Errorf("open: %w", unreachable), unix.ETIMEDOUT},
		{"refined by the policy's own errno", errors.Join(unix.EBUSY, fault.New(fault.Forbidden, "x: fixed")), unix.EBUSY},
		{"never ENOSYS", errors.Join(unix.ENOSYS, fault.New(fault.Forbidden, "x: fixed")), unix.EOPNOTSUPP},
		{"kind before cancellation", errors.Join(keywrap.ErrDenied, context.Canceled), unix.EACCES},
		{"no errno at all", errors.New("surprise"), unix.EIO},
		{"errno zero", syscall.Errno(0), unix.EIO},
		{"errno that the kernel refuses", syscall.Errno(maxErrno), unix.EIO},
		{"a missing file of the daemon's own", fmt.Errorf("x: %w", fs.ErrNotExist), unix.EIO},
	} {
		if _, got := translate(test.err); got.errno != test.want {
			t.Errorf("%s: got %v, want %v", test.name, unix.ErrnoName(got.errno), unix.ErrnoName(test.want))
		}
	}
}

// logged returns the log lines that ending an operation with err leaves.
func logged(t *testing.T, err error) []map[string]any {
	t.Helper()
	var out bytes.Buffer
	f := &fileSystem{log: slog.New(slog.NewJSONHandler(&out, nil)), nodes: newNodeTable[*cryptfs.Node]()}
	f.status("open", &fuse.InHeader{NodeId: 42, Caller: fuse.Caller{Owner: fuse.Owner{Uid: 7}, Pid: 9}}, err)
	var lines []map[string]any
	decoder := json.NewDecoder(&out)
	for decoder.More() {
		var line map[string]any
		if err := decoder.Decode(&line); err != nil {
			t.Fatal(err)
		}
		lines = append(lines, line)
	}
	return lines
}

func TestLogging(t *testing.T) {
	for _, err := range []error{nil, unix.ENOENT, unix.EEXIST, unix.ENOSPC, unix.EACCES, context.Canceled,
		fault.New(fault.CrossClass, "x: other class")} {
		if got := logged(t, err); len(got) != 0 {
			t.Errorf("%v is logged: %v", err, got)
		}
	}
	for _, err := range []error{errors.New("surprise"), fmt.Errorf("pread: %w", unix.EIO), context.DeadlineExceeded} {
		got := logged(t, err)
		if len(got) != 1 || got[0]["inode"] != 42.0 || got[0]["op"] != "open" || got[0]["err"] != err.Error() {
			t.Errorf("%v: logged %v", err, got)
		}
	}

	got := logged(t, fmt.Errorf("chunk 2: %w", fault.New(fault.Integrity, "dare: forged")))
	if len(got) != 1 || got[0]["level"] != "ERROR" || got[0]["audit"] != true || got[0]["uid"] != 7.0 ||
		got[0]["pid"] != 9.0 || got[0]["kind"] != "integrity" || got[0]["errno"] != "EIO" {
		t.Errorf("integrity failure: logged %v", got)
	}

	got = logged(t, fmt.Errorf("open: %w", &keywrap.CallError{Op: "Decrypt", Key: "keyring:phi",
		RequestID: "r-1", Hint: "enable the key", Err: keywrap.ErrDisabled}))
	if len(got) != 1 || got[0]["key"] != "keyring:phi" || got[0]["request_id"] != "r-1" ||
		got[0]["hint"] != "enable the key" || got[0]["errno"] != "ENOKEY" || got[0]["audit"] != nil {
		t.Errorf("key failure: logged %v", got)
	}
}

// TestOneTranslation keeps errno.go the only way from an error to a status.
func TestOneTranslation(t *testing.T) {
	files, err := filepath.Glob("*.go")
	if err != nil || len(files) == 0 {
		t.Fatalf("no files: %v", err)
	}
	seen := 0
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, word := range []string{"ENOSYS", "ToErrno", "ToStatus"} {
			switch found := bytes.Contains(text, []byte(word)); {
			case found && file != "errno.go":
				t.Errorf("%s mentions %s", file, word)
			case found:
				seen++
			}
		}
	}
	if seen == 0 {
		t.Error("errno.go mentions none of the words: the check looks at the wrong files")
	}
}
