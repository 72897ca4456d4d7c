package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"golang.org/x/term"
)

const maxPassphrase = 1024 // bytes

// passphraseSource returns where the keyring's passphrase comes from: the file
// or descriptor that was given, else the terminal, else nowhere. The result is
// called only when a passphrase is needed, and may be called again.
func (a *app) passphraseSource(ctx context.Context) func() ([]byte, error) {
	g := &a.global
	switch {
	case g.passphraseFile != "":
		return func() ([]byte, error) { return passphraseFromFile(g.passphraseFile) }
	case g.passphraseFD >= 0:
		return once(func() ([]byte, error) { return passphraseFromFD(g.passphraseFD) })
	case a.interactive():
		return func() ([]byte, error) { return a.promptPassphrase(ctx, "Keyring passphrase: ") }
	}
	return func() ([]byte, error) {
		return nil, fail(errNeedPassphrase, "the keyring is protected by a passphrase, and there is no terminal to ask on",
			"give --passphrase-file FILE (KMSFS_PASSPHRASE_FILE) or --passphrase-fd N")
	}
}

// newPassphrase returns a passphrase to protect a keyring with: from the given
// file ("" is none), the descriptor, or asked for twice on the terminal.
func (a *app) newPassphrase(ctx context.Context, file string, fd int) ([]byte, error) {
	switch {
	case file != "":
		return passphraseFromFile(file)
	case fd >= 0:
		return passphraseFromFD(fd)
	case !a.interactive():
		return nil, fail(errNeedPassphrase, "a new passphrase is needed, and there is no terminal to ask on",
			"give it in a file; --help names the option")
	}
	first, err := a.promptPassphrase(ctx, "New keyring passphrase: ")
	if err != nil {
		return nil, err
	}
	second, err := a.promptPassphrase(ctx, "The same again: ")
	defer clear(second)
	if err == nil && string(first) != string(second) {
		err = usage("the two passphrases differ", "try again")
	}
	if err != nil {
		clear(first)
		return nil, err
	}
	return first, nil
}

// passphraseFromFile returns the first line of the file. Others must not be
// able to read it, unless it is no regular file (a credential of systemd, a
// process substitution).
func passphraseFromFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, hint(fmt.Errorf("passphrase file: %w", err), "give a file whose first line is the passphrase")
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if st.Mode().IsRegular() && st.Mode().Perm()&0o077 != 0 {
		return nil, fail(errNeedPassphrase, fmt.Sprintf("passphrase file %s is open to others (mode %04o)", path, st.Mode().Perm()),
			"chmod 600 "+path)
	}
	return readPassphrase(f, "passphrase file "+path)
}

func passphraseFromFD(fd int) ([]byte, error) {
	f := os.NewFile(uintptr(fd), fmt.Sprintf("descriptor %d", fd))
	defer f.Close()
	return readPassphrase(f, f.Name())
}

func readPassphrase(r io.Reader, from string) ([]byte, error) {
	pass, err := readLine(r, maxPassphrase)
	if errors.Is(err, os.ErrInvalid) || errors.Is(err, syscall.EBADF) {
		return nil, usage(from+" is not open", "for example: --passphrase-fd 3 3<FILE")
	}
	if err != nil {
		clear(pass)
		return nil, fail(errNeedPassphrase, fmt.Sprintf("%s: %v", from, err), "its first line must be the passphrase")
	}
	if len(pass) == 0 {
		return nil, fail(errNeedPassphrase, from+" holds no passphrase", "its first line must be the passphrase")
	}
	return pass, nil
}

// promptPassphrase asks on the terminal without echo. It ends when ctx does,
// with the terminal as it was.
func (a *app) promptPassphrase(ctx context.Context, prompt string) ([]byte, error) {
	fd, ok := terminal(a.stdin)
	if !ok {
		return nil, fail(errNeedPassphrase, "there is no terminal to ask on", "give --passphrase-file FILE")
	}
	before, err := term.GetState(fd)
	if err != nil {
		return nil, fmt.Errorf("terminal: %w", err)
	}
	defer func() { _ = term.Restore(fd, before) }()
	// Before the prompt: whoever types as soon as it shows must not be echoed.
	if err := echoOff(fd); err != nil {
		return nil, fmt.Errorf("terminal: %w", err)
	}
	_, _ = fmt.Fprint(a.stderr, prompt)
	pass, err := await(ctx, func() ([]byte, error) { return term.ReadPassword(fd) })
	_, _ = fmt.Fprintln(a.stderr)
	if err != nil {
		return nil, fmt.Errorf("reading the passphrase: %w", err)
	}
	if len(pass) == 0 {
		return nil, fail(errNeedPassphrase, "no passphrase was given", "try again")
	}
	return pass, nil
}

// await runs f, which blocks on the terminal, and returns early when ctx ends.
// f then goes on; the program is about to exit.
func await[T any](ctx context.Context, f func() (T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	go func() {
		v, err := f()
		done <- result{v, err}
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
		var none T
		return none, ctx.Err()
	}
}

// passphraseFailure returns err, or, where a source of a passphrase failed, that
// failure in its own words: the keyring only knows that it was given none.
func passphraseFailure(err error) error {
	var own *cliError
	if errors.As(err, &own) {
		return own
	}
	return err
}

var errGivenOnce = errors.New("the passphrase was given once and is not kept")

// once makes f answer its first call only: a descriptor can be read once.
func once(f func() ([]byte, error)) func() ([]byte, error) {
	used := false
	return func() ([]byte, error) {
		if used {
			return nil, errGivenOnce
		}
		used = true
		return f()
	}
}
