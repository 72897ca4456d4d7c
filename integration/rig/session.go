package rig

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"syscall"
)

// Session is a program that reads statements from its input and answers in
// lines: sqlite3, psql. One goroutine uses it at a time.
type Session struct {
	cmd    *exec.Cmd
	in     io.WriteCloser
	out    *bufio.Reader
	stderr bytes.Buffer
}

// StartSession starts the program. Its standard output must not be buffered:
// see LineBuffered.
func StartSession(cmd *exec.Cmd) (*Session, error) {
	s := &Session{cmd: cmd}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if s.in, err = cmd.StdinPipe(); err != nil {
		return nil, err
	}
	cmd.Stderr = &s.stderr
	s.out = bufio.NewReaderSize(out, 1<<16)
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return s, nil
}

// LineBuffered makes a program of the C library write out each line at once.
func LineBuffered(name string, args ...string) *exec.Cmd {
	return exec.Command("stdbuf", append([]string{"-oL", name}, args...)...)
}

// Ask sends statements, the last of which must make the program print the line
// end, and returns the lines before that one. An error means that the program
// has ended.
func (s *Session) Ask(statements, end string) ([]string, error) {
	if _, err := io.WriteString(s.in, statements+"\n"); err != nil {
		return nil, s.ended(err)
	}
	var lines []string
	for {
		line, err := s.out.ReadString('\n')
		if err != nil {
			return lines, s.ended(err)
		}
		if line = strings.TrimSuffix(line, "\n"); line == end {
			return lines, nil
		}
		lines = append(lines, line)
	}
}

func (s *Session) ended(cause error) error {
	_ = s.in.Close()
	err := s.cmd.Wait()
	if err == nil {
		err = cause
	}
	return fmt.Errorf("%s: %w: %s", s.cmd.Path, err, bytes.TrimSpace(s.stderr.Bytes()))
}

// Close ends the program in order.
func (s *Session) Close() error {
	_ = s.in.Close()
	_, _ = io.Copy(io.Discard, s.out)
	if err := s.cmd.Wait(); err != nil {
		return s.ended(err)
	}
	return nil
}

// Kill ends the program with SIGKILL. It may have ended before.
func (s *Session) Kill() {
	_ = s.cmd.Process.Signal(syscall.SIGKILL)
	_ = s.in.Close()
	_ = s.cmd.Wait()
}
