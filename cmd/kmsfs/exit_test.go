package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/crypto/keywrap/keyring"
	"github.com/kmsfs/kmsfs/fs/cryptfs"
	"github.com/kmsfs/kmsfs/fs/fusefs"
)

func TestEveryKindHasAnOutcome(t *testing.T) {
	for _, kind := range fault.Kinds() {
		o, ok := kindOutcomes[kind]
		if !ok || o.code == exitOK {
			t.Errorf("kind %v has no exit code", kind)
		}
		code, _, _ := explain(fmt.Errorf("open: %w", fault.New(kind, "x: y")))
		if code != o.code {
			t.Errorf("kind %v: exit code %d, want %d", kind, code, o.code)
		}
	}
	if len(kindOutcomes) != len(fault.Kinds()) {
		t.Errorf("%d rows for %d kinds", len(kindOutcomes), len(fault.Kinds()))
	}
}

func TestExitCodes(t *testing.T) {
	call := func(err error) error {
		return &keywrap.CallError{Op: "Decrypt", Key: "keyring:x", Err: err, Hint: "own hint"}
	}
	for _, tc := range []struct {
		err  error
		code int
		hint string // part of it
	}{
		{usage("bad", "do this"), exitUsage, "do this"},
		{fmt.Errorf("x: %w", cryptfs.ErrNoStore), exitNoStore, "kmsfs init"},
		{fmt.Errorf("x: %w", cryptfs.ErrNewerFormat), exitNoStore, "newer"},
		{fmt.Errorf("x: %w", cryptfs.ErrLocked), exitBusy, "--read-only"},
		{fmt.Errorf("x: %w", cryptfs.ErrKeysChanged), exitUntrusted, "known-stores"},
		{fmt.Errorf("x: %w", cryptfs.ErrRecord), exitDamage, "backup"},
		{fmt.Errorf("x: %w", cryptfs.ErrNotEmpty), exitFailure, "empty directory"},
		{fmt.Errorf("x: %w", cryptfs.ErrClassMismatch), exitFailure, "policy"},
		{call(keywrap.ErrDenied), exitKeys, "own hint"},
		{call(keywrap.ErrThrottled), exitKeys, "own hint"},
		{call(keywrap.ErrCiphertext), exitDamage, "own hint"},
		{hint(call(keywrap.ErrPending), "better hint"), exitKeys, "better hint"},
		{keyring.ErrPassphrase, exitKeys, "passphrase"},
		{keyring.ErrNoFile, exitKeys, "--keyring"},
		{keyring.ErrLocked, exitBusy, "again"},
		{keyring.ErrPermissions, exitKeys, "chmod 600"},
		{fusefs.ErrNoFuse, exitNoFUSE, "fuse3"},
		{fusefs.ErrBusy, exitBusy, ""},
		{fusefs.ErrOption, exitUsage, "-o"},
		{&fs.PathError{Op: "write", Path: "/x", Err: syscall.ENOSPC}, exitFull, "room"},
		{&fs.PathError{Op: "write", Path: "/x", Err: syscall.EDQUOT}, exitFull, "quota"},
		{&fs.PathError{Op: "open", Path: "/x", Err: syscall.ENOENT}, exitFailure, ""},
		{&fs.PathError{Op: "open", Path: "/x", Err: syscall.ENOKEY}, exitKeys, "log"},
		{&fs.PathError{Op: "open", Path: "/x", Err: syscall.EKEYREJECTED}, exitUntrusted, "log"},
		{fmt.Errorf("ls: %w", context.Canceled), exitInterrupted, ""},
		{&remoteError{Code: exitNoFUSE, Text: "t", Hint: "h"}, exitNoFUSE, "h"},
		{errors.New("anything"), exitFailure, ""},
	} {
		code, text, hint := explain(tc.err)
		if code != tc.code || !strings.Contains(hint, tc.hint) {
			t.Errorf("%v: exit code %d with hint %q, want %d with %q", tc.err, code, hint, tc.code, tc.hint)
		}
		if text == "" {
			t.Errorf("%#v: no text", tc.err)
		}
	}
}

func TestFinishPrintsOneLineEach(t *testing.T) {
	var out bytes.Buffer
	a := &app{stderr: &out}
	if code := a.finish(fail(errUsage, "first\nsecond \x1b[31mred", "do\r\nthis")); code != exitUsage {
		t.Errorf("exit code %d", code)
	}
	want := "kmsfs: error: first; second \ufffd[31mred\nkmsfs: hint: do; this\n"
	if got := out.String(); got != want {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	out.Reset()
	if code := a.finish(nil); code != exitOK || out.Len() != 0 {
		t.Errorf("no error: code %d, output %q", code, out.String())
	}
}

type fullWriter struct{}

func (fullWriter) Write([]byte) (int, error) { return 0, syscall.ENOSPC }

func TestFailingOutputIsAFailure(t *testing.T) {
	var errOut bytes.Buffer
	code := run(t.Context(), []string{"kmsfs", "version"}, strings.NewReader(""), fullWriter{}, &errOut)
	if code != exitFull {
		t.Errorf("exit code %d, want %d: %s", code, exitFull, errOut.String())
	}
}

func TestMountHelperCodes(t *testing.T) {
	for code, want := range map[int]int{exitOK: 0, exitUsage: 1, exitInterrupted: 8, exitKeys: 32, exitFailure: 32} {
		if got := mountHelperCode(code); got != want {
			t.Errorf("mountHelperCode(%d) = %d, want %d", code, got, want)
		}
	}
}

// TestExitCodesAreDocumented compares the table in docs/cli.md with the
// constants.
func TestExitCodesAreDocumented(t *testing.T) {
	text, err := os.ReadFile("../../docs/cli.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := map[int]bool{}
	for _, m := range regexp.MustCompile(`(?m)^\| (\d+) \|`).FindAllStringSubmatch(string(text), -1) {
		n, _ := strconv.Atoi(m[1])
		documented[n] = true
	}
	codes := []int{exitOK, exitFailure, exitUsage, exitNoStore, exitDamage, exitKeys, exitBusy, exitUntrusted, exitNoFUSE, exitFull, exitUnwell, exitKeyNeeded, exitInterrupted}
	for _, code := range codes {
		if !documented[code] {
			t.Errorf("docs/cli.md has no row for exit code %d", code)
		}
	}
	if len(documented) != len(codes) {
		t.Errorf("docs/cli.md has %d exit codes, the program %d", len(documented), len(codes))
	}
}
