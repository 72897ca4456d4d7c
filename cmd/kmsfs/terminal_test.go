package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// openTerminal returns both ends of a pseudo-terminal: what a person types and
// sees, and what the program has as its standard streams.
func openTerminal(t *testing.T) (person, program *os.File) {
	t.Helper()
	person, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = person.Close() })
	if err := unix.IoctlSetPointerInt(int(person.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(person.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	program, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = program.Close() })
	return person, program
}

// session runs the program on a terminal. For each pair it waits for the
// question and types the answer. It returns the exit code and all that shows.
func session(t *testing.T, args []string, dialogue ...string) (int, string) {
	t.Helper()
	person, program := openTerminal(t)
	code := make(chan int, 1)
	go func() {
		var out bytes.Buffer
		code <- run(t.Context(), args, program, &out, program)
		_, _ = program.WriteString(endMark)
	}()
	var seen strings.Builder
	r := bufio.NewReader(person)
	until := func(mark string) {
		for !strings.HasSuffix(seen.String(), mark) {
			b, err := r.ReadByte()
			if err != nil {
				t.Fatalf("waiting for %q: %v; so far %q", mark, err, seen.String())
			}
			seen.WriteByte(b)
		}
	}
	for i := 0; i+1 < len(dialogue); i += 2 {
		until(dialogue[i])
		if _, err := person.WriteString(dialogue[i+1]); err != nil {
			t.Fatal(err)
		}
	}
	until(endMark)
	return <-code, seen.String()
}

const endMark = "\x04end"

func testHome(t *testing.T) string {
	t.Helper()
	home := t.TempDir()
	t.Setenv("HOME", home)
	t.Setenv("XDG_CONFIG_HOME", "")
	return home
}

func TestPassphraseOnATerminal(t *testing.T) {
	home := testHome(t)
	store := filepath.Join(home, "s")
	code, seen := session(t, []string{"kmsfs", "init", "--passphrase", store},
		"New keyring passphrase: ", "open sesame\n", "The same again: ", "open sesame\n", "Keyring passphrase: ", "open sesame\n")
	if code != exitOK || strings.Contains(seen, "sesame") {
		t.Errorf("init: exit code %d, shown %q", code, seen)
	}
	code, seen = session(t, []string{"kmsfs", "ls", store}, "Keyring passphrase: ", "open sesame\n")
	if code != exitOK || strings.Contains(seen, "sesame") {
		t.Errorf("ls: exit code %d, shown %q", code, seen)
	}
	if code, seen = session(t, []string{"kmsfs", "ls", store}, "Keyring passphrase: ", "open says me\n"); code != exitKeys {
		t.Errorf("wrong passphrase: exit code %d, shown %q", code, seen)
	}
	if code, seen = session(t, []string{"kmsfs", "ls", store}, "Keyring passphrase: ", "\n"); code != exitKeys {
		t.Errorf("no passphrase: exit code %d, shown %q", code, seen)
	}
	code, seen = session(t, []string{"kmsfs", "keyring", "passphrase"},
		"Keyring passphrase: ", "open sesame\n", "New keyring passphrase: ", "one\n", "The same again: ", "other\n")
	if code != exitUsage || !strings.Contains(seen, "differ") {
		t.Errorf("two passphrases: exit code %d, shown %q", code, seen)
	}
}

func TestTrustOnATerminal(t *testing.T) {
	home := testHome(t)
	store := filepath.Join(home, "s")
	var errOut bytes.Buffer
	if code := run(t.Context(), []string{"kmsfs", "init", store}, strings.NewReader(""), io.Discard, &errOut); code != exitOK {
		t.Fatal(errOut.String())
	}
	known := filepath.Join(home, "other-machine")
	ls := []string{"kmsfs", "ls", "--known-stores", known, store}
	const question = "Trust this store with these keys? [y/N] "
	for _, no := range []string{"\n", "no\n", "yess\n"} {
		code, seen := session(t, ls, question, no)
		if code != exitUntrusted || !strings.Contains(seen, "class general: keyring:general") {
			t.Errorf("answer %q: exit code %d, shown %q", no, code, seen)
		}
	}
	if _, err := os.Stat(known); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a refused store is known: %v", err)
	}
	if code, seen := session(t, ls, question, "yes\n"); code != exitOK {
		t.Errorf("yes: exit code %d, shown %q", code, seen)
	}
	if code, seen := session(t, ls); code != exitOK || strings.Contains(seen, "Trust") {
		t.Errorf("the second time: exit code %d, shown %q", code, seen)
	}
}

func TestInterruptedQuestionGivesTheTerminalBack(t *testing.T) {
	person, program := openTerminal(t)
	before, err := unix.IoctlGetTermios(int(program.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	a := &app{stdin: program, stderr: program}
	done := make(chan error, 1)
	go func() {
		_, err := a.promptPassphrase(ctx, "Passphrase: ")
		done <- err
	}()
	// Wait for the prompt's echo to be off before interrupting.
	for {
		now, err := unix.IoctlGetTermios(int(program.Fd()), unix.TCGETS)
		if err != nil {
			t.Fatal(err)
		}
		if now.Lflag&unix.ECHO == 0 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
	after, err := unix.IoctlGetTermios(int(program.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	if *after != *before {
		t.Errorf("the terminal's modes are %+v, were %+v", after, before)
	}
	_, _ = person.WriteString("\n") // ends the read that goes on
}
