package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/integration/kmsd/kmsserver"
)

// TestMain lets scripts run this binary as kmsfs, and as mount(8)'s helper.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"kmsfs": main, "mount.fuse.kmsfs": main})
}

// TestScripts runs the sessions in testdata/script on the real program.
func TestScripts(t *testing.T) {
	server := kmsserver.StartT(t, kmsserver.Options{})
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Condition:           condition,
		Setup: func(env *testscript.Env) error {
			env.Vars = append(env.Vars, "HOME="+env.WorkDir+"/home", "KMSFS_LOG_LEVEL=warn",
				"GORACE=atexit_sleep_ms=0") // else every command of a race build takes a second more
			env.Vars = append(env.Vars, server.Env(kmsserver.DefaultPrincipal())...)
			env.Defer(func() { unmountBelow(t, env.WorkDir) })
			return os.Mkdir(env.WorkDir+"/home", 0o700)
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"code":    codeCmd,
			"newkey":  func(ts *testscript.TestScript, _ bool, args []string) { newKeyCmd(ts, server, args) },
			"outage":  func(ts *testscript.TestScript, _ bool, args []string) { outageCmd(ts, server, args) },
			"flipbit": func(ts *testscript.TestScript, _ bool, args []string) { flipBitCmd(ts, args) },
			"waitfor": func(ts *testscript.TestScript, neg bool, args []string) { waitForCmd(ts, neg, args) },
			"path":    func(ts *testscript.TestScript, _ bool, args []string) { pathCmd(ts, args) },
		},
	})
}

// condition knows [fuse]: this process may mount. Where mounts are required (in
// CI, or with REQUIRE_FUSE=1) not being able to is a failure, no skip.
func condition(cond string) (bool, error) {
	if cond != "fuse" {
		return false, fmt.Errorf("unknown condition %q", cond)
	}
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err == nil {
		err = f.Close()
	}
	if err == nil && os.Geteuid() != 0 {
		err = errors.New("not root")
	}
	if err != nil && (os.Getenv("CI") == "true" || os.Getenv("REQUIRE_FUSE") == "1") {
		return false, fmt.Errorf("mounts are required: %w", err)
	}
	return err == nil, nil
}

// unmountBelow takes away what a failed script left mounted.
func unmountBelow(t *testing.T, dir string) {
	mounts, err := readMounts()
	if err != nil {
		t.Error(err)
	}
	for _, m := range mounts {
		if strings.HasPrefix(m.Mountpoint, dir+"/") {
			t.Errorf("%s is still mounted", m.Mountpoint)
			if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		}
	}
}

// codeCmd is "code N PROGRAM ARG...": exec with an exact exit code.
func codeCmd(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: code N PROGRAM ARG...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		got = exit.ExitCode()
	} else if err != nil {
		ts.Fatalf("%v", err)
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

// newKeyCmd is "newkey VARIABLE ALIAS": a key at the KMS, its ARN in VARIABLE.
func newKeyCmd(ts *testscript.TestScript, s *kmsserver.Server, args []string) {
	arn, err := s.CreateKey(kmsserver.KeyOptions{Alias: args[1]})
	ts.Check(err)
	ts.Setenv(args[0], arn)
}

// outageCmd is "outage KIND"; KIND "none" ends it.
func outageCmd(ts *testscript.TestScript, s *kmsserver.Server, args []string) {
	var f kmsserver.Faults
	if args[0] != "none" {
		f.Outage = kmsserver.Outage(args[0])
	}
	ts.Check(s.SetFaults(f))
}

// flipBitCmd is "flipbit FILE OFFSET".
func flipBitCmd(ts *testscript.TestScript, args []string) {
	off, err := strconv.ParseInt(args[1], 10, 64)
	ts.Check(err)
	f, err := os.OpenFile(ts.MkAbs(args[0]), os.O_RDWR, 0)
	ts.Check(err)
	defer f.Close()
	var b [1]byte
	_, err = f.ReadAt(b[:], off)
	ts.Check(err)
	b[0] ^= 1
	_, err = f.WriteAt(b[:], off)
	ts.Check(err)
}

// waitForCmd is "[!] waitfor FILE": until it exists, or does not any more.
func waitForCmd(ts *testscript.TestScript, neg bool, args []string) {
	for range 1500 {
		_, err := os.Lstat(ts.MkAbs(args[0]))
		if (err != nil) == neg {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	ts.Fatalf("%s: waited in vain", args[0])
}

// pathCmd is "path VARIABLE PATTERN": the one file that matches.
func pathCmd(ts *testscript.TestScript, args []string) {
	found, err := filepath.Glob(ts.MkAbs(args[1]))
	ts.Check(err)
	if len(found) != 1 {
		ts.Fatalf("%s matches %d files: %q", args[1], len(found), found)
	}
	ts.Setenv(args[0], found[0])
}
