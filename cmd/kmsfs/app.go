package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"unicode"

	"golang.org/x/term"
)

// app is what every command shares: the three streams and the global flags.
type app struct {
	stdin  io.Reader
	stdout io.Writer
	stderr io.Writer
	global globalOptions

	outErr error // first failure to write to stdout
}

// printf writes to standard output. A failure is kept and ends the command
// with an error, so that a full disk is not reported as success.
func (a *app) printf(format string, args ...any) {
	if _, err := fmt.Fprintf(a.stdout, format, args...); err != nil && a.outErr == nil {
		a.outErr = fmt.Errorf("standard output: %w", err)
	}
}

// printJSON writes v as indented JSON and a newline.
func (a *app) printJSON(v any) error {
	enc := json.NewEncoder(a.stdout)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return fmt.Errorf("standard output: %w", err)
	}
	return nil
}

// note and warn tell a person something that is no result: one line on
// standard error, so that scripts can read standard output.
func (a *app) note(format string, args ...any) { a.line("", format, args...) }
func (a *app) warn(format string, args ...any) { a.line("warning: ", format, args...) }

func (a *app) line(prefix, format string, args ...any) {
	// Standard error is the last resort: there is nowhere to tell its failure.
	_, _ = fmt.Fprintf(a.stderr, "kmsfs: %s%s\n", prefix, oneLine(fmt.Sprintf(format, args...)))
}

// finish prints err, if any, as one error line and at most one hint line, and
// returns the exit code.
func (a *app) finish(err error) int {
	if err == nil {
		err = a.outErr
	}
	if err == nil {
		return exitOK
	}
	code, text, hint := explain(err)
	_, _ = fmt.Fprintf(a.stderr, "kmsfs: error: %s\n", oneLine(text))
	if hint != "" {
		_, _ = fmt.Fprintf(a.stderr, "kmsfs: hint: %s\n", oneLine(hint))
	}
	return code
}

// oneLine makes text printable on one line: names on a disk may hold newlines
// and terminal escapes.
func oneLine(text string) string {
	text = strings.Join(strings.FieldsFunc(text, func(r rune) bool { return r == '\n' || r == '\r' }), "; ")
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, text)
}

// terminal returns the descriptor of s if s is a terminal.
func terminal(s any) (fd int, ok bool) {
	f, isFile := s.(*os.File)
	if !isFile {
		return 0, false
	}
	return int(f.Fd()), term.IsTerminal(int(f.Fd()))
}

// interactive reports whether a question can be asked and answered: standard
// input and standard error are both terminals.
func (a *app) interactive() bool {
	_, in := terminal(a.stdin)
	_, out := terminal(a.stderr)
	return in && out
}

// confirm asks a yes/no question on the terminal. Only "yes" or "y" is yes.
func (a *app) confirm(ctx context.Context, question string) (bool, error) {
	_, _ = fmt.Fprintf(a.stderr, "%s [y/N] ", question)
	answer, err := await(ctx, func() ([]byte, error) { return readLine(a.stdin, 16) })
	if err != nil {
		return false, fmt.Errorf("reading the answer: %w", err)
	}
	switch strings.ToLower(strings.TrimSpace(string(answer))) {
	case "y", "yes":
		return true, nil
	}
	return false, nil
}

// readLine reads up to a newline or the end of input, a byte at a time so that
// nothing after the line is consumed. The newline is not part of the result.
func readLine(r io.Reader, limit int) ([]byte, error) {
	line := make([]byte, 0, limit)
	var b [1]byte
	for {
		n, err := r.Read(b[:])
		if n == 1 {
			if b[0] == '\n' {
				return line, nil
			}
			if len(line) == limit {
				return nil, fmt.Errorf("line longer than %d bytes", limit)
			}
			line = append(line, b[0])
		}
		if err == io.EOF {
			return line, nil
		}
		if err != nil {
			return nil, err
		}
	}
}

// shellQuote returns s as one word of a POSIX shell.
func shellQuote(s string) string {
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("/._-+,:@%=", r)
	}
	if s != "" && strings.IndexFunc(s, func(r rune) bool { return !plain(r) }) < 0 {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
