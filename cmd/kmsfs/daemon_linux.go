package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
)

// A mount in the background is this program started again in a session of its
// own. Two pipes connect the two: descriptor 3 brings the plan and the
// passphrase (never an argument or a variable, which others can read), and
// descriptor 4 takes back one report, when the mount is usable or has failed.
const (
	planFD   = 3
	reportFD = 4
	maxPlan  = 4 << 20
)

// daemonReport is what the background process says when it is ready or fails.
type daemonReport struct {
	Failure  *remoteError `json:"failure,omitempty"`
	Warnings []string     `json:"warnings,omitempty"`
}

// startDaemon starts the background process and waits for its report.
func (a *app) startDaemon(ctx context.Context, p *mountPlan, logFile string, pass []byte) error {
	if logFile == "" {
		dir, err := stateDir()
		if err != nil {
			return err
		}
		logFile = filepath.Join(dir, p.ID+".log")
	}
	log, err := openLog(logFile)
	if err != nil {
		return err
	}
	defer log.Close()
	planRead, planWrite, err := os.Pipe()
	if err != nil {
		return err
	}
	defer planWrite.Close()
	reportRead, reportWrite, err := os.Pipe()
	if err != nil {
		return errors.Join(err, planRead.Close())
	}
	defer reportRead.Close()

	cmd := exec.Command("/proc/self/exe", "daemon", p.Store, p.Mountpoint)
	cmd.Args[0] = "kmsfs"
	cmd.Dir = "/" // no directory is kept busy
	cmd.Env = withoutKmsfs(os.Environ())
	cmd.Stderr = log // for what the runtime itself has to say
	cmd.ExtraFiles = []*os.File{planRead, reportWrite}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	runtime.LockOSThread() // which the process inherits the slack of
	relaxTimers()
	err = cmd.Start()
	runtime.UnlockOSThread()
	_, _ = planRead.Close(), reportWrite.Close() // the child has its own
	if err != nil {
		return fmt.Errorf("starting the mount's process: %w", err)
	}
	if err := sendPlan(planWrite, p, pass); err != nil {
		// The child ends when its plan is short; its report says more.
		a.warn("the mount's process did not take its options: %v", err)
	}
	_ = planWrite.Close()
	return a.awaitReport(ctx, cmd, reportRead, logFile)
}

// slowMount is the time after which whoever waits for a mount is told where to
// look: it may wait for another machine's sign of life, or a key service.
const slowMount = 4 * time.Second

// awaitReport waits until the mount is usable, has failed, or ctx ends.
func (a *app) awaitReport(ctx context.Context, cmd *exec.Cmd, from io.Reader, logFile string) error {
	text, err := a.readReport(ctx, from, logFile)
	if err != nil {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
		return fmt.Errorf("mount: %w", err)
	}
	var r daemonReport
	if err := json.Unmarshal(text, &r); err != nil {
		_ = cmd.Process.Kill()
		return fail(cmd.Wait(), "the mount's process died before the mount was usable", "see "+logFile)
	}
	for _, w := range r.Warnings {
		a.warn("%s", w)
	}
	if r.Failure != nil {
		_ = cmd.Wait()
		return r.Failure
	}
	return cmd.Process.Release()
}

// readReport reads all of a report, and says so if it is long in coming.
func (a *app) readReport(ctx context.Context, from io.Reader, logFile string) ([]byte, error) {
	var text []byte
	var err error
	read := make(chan struct{})
	go func() {
		defer close(read)
		text, err = io.ReadAll(io.LimitReader(from, maxPlan))
	}()
	slow := time.NewTimer(slowMount)
	defer slow.Stop()
	for {
		select {
		case <-read:
			return text, err
		case <-slow.C:
			a.note("still waiting until the mount is usable; %s says for what", logFile)
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// sendPlan writes the plan's length (4 bytes, big-endian), the plan, and the
// passphrase up to the end.
func sendPlan(w io.Writer, p *mountPlan, pass []byte) error {
	plan, err := json.Marshal(p)
	if err != nil {
		return err
	}
	for _, part := range [][]byte{binary.BigEndian.AppendUint32(nil, uint32(len(plan))), plan, pass} {
		if _, err := w.Write(part); err != nil {
			return err
		}
	}
	return nil
}

// receivePlan reads what sendPlan wrote. The caller wipes pass.
func receivePlan(r io.Reader) (p *mountPlan, pass []byte, err error) {
	var length [4]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return nil, nil, err
	}
	n := binary.BigEndian.Uint32(length[:])
	if n > maxPlan {
		return nil, nil, fmt.Errorf("plan of %d bytes", n)
	}
	plan := make([]byte, n)
	if _, err := io.ReadFull(r, plan); err != nil {
		return nil, nil, err
	}
	p = &mountPlan{}
	if err := json.Unmarshal(plan, p); err != nil {
		return nil, nil, err
	}
	// Room for all of it at once: growing would leave copies behind.
	pass = make([]byte, maxPassphrase)
	n2, err := io.ReadFull(r, pass)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, nil, err
	}
	return p, pass[:n2], nil
}

func newDaemonCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:    "daemon STORE MOUNTPOINT",
		Short:  "Serve a mount for kmsfs mount, which starts this",
		Hidden: true,
		Args:   operands("STORE", "MOUNTPOINT"), // for ps(1); the plan has the same
		RunE:   func(cmd *cobra.Command, _ []string) error { return a.runDaemon(cmd.Context()) },
	}
}

func (a *app) runDaemon(ctx context.Context) error {
	planFile, reportFile := os.NewFile(planFD, "plan"), os.NewFile(reportFD, "report")
	p, pass, err := receivePlan(planFile)
	if err != nil {
		return usage(fmt.Sprintf("no mount plan: %v", err), "use kmsfs mount")
	}
	_ = planFile.Close()
	syscall.CloseOnExec(reportFD)
	reported := false
	report := func(r daemonReport) error {
		reported = true
		return errors.Join(json.NewEncoder(reportFile).Encode(r), reportFile.Close())
	}
	log := newLogger(a.stderr, p.LogFormat, p.LogLevel)
	err = serveMount(ctx, p, p.passphraseSource(pass), log, func(warnings []string) error {
		return report(daemonReport{Warnings: warnings})
	})
	if err == nil {
		return nil
	}
	code, text, hint := explain(err)
	log.Error("the mount failed", "err", text)
	if !reported {
		if err := report(daemonReport{Failure: &remoteError{Code: code, Text: text, Hint: hint}}); err != nil {
			log.Error("nobody took the report", "err", err)
		}
	}
	return err
}

// withoutKmsfs drops the variables that stand for flags: the plan has them.
func withoutKmsfs(env []string) []string {
	out := make([]string, 0, len(env))
	for _, e := range env {
		if !strings.HasPrefix(e, envPrefix) {
			out = append(out, e)
		}
	}
	return out
}

// maxLog is the size beyond which a mount begins a new log file and keeps the
// old one as FILE.1.
const maxLog = 16 << 20

// openLog opens a log file for appending, for the owner only.
func openLog(path string) (*os.File, error) {
	const elsewhere = "give a --log-file that can be written"
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, hint(fmt.Errorf("log file: %w", err), elsewhere)
	}
	if st, err := os.Stat(path); err == nil && st.Mode().IsRegular() && st.Size() > maxLog {
		if err := os.Rename(path, path+".1"); err != nil {
			return nil, hint(fmt.Errorf("log file: %w", err), elsewhere)
		}
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, hint(fmt.Errorf("log file: %w", err), elsewhere)
	}
	return f, nil
}
