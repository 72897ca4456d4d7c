package rig

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"
)

// Postgres is a PostgreSQL server with a data directory of its own. It runs as
// an unprivileged user: it refuses to run as root.
type Postgres struct {
	Data   string   // data directory
	Flags  []string // of the server, at the next Start
	socket string
	log    string
	bin    string
	uid    uint32
	gid    uint32
	cmd    *exec.Cmd
}

// PostgresBin returns the directory of PostgreSQL's server programs, which
// Debian keeps out of PATH.
func PostgresBin() (string, error) {
	if p, err := exec.LookPath("initdb"); err == nil {
		if p, err = filepath.EvalSymlinks(p); err == nil { // the others lie beside it
			return filepath.Dir(p), nil
		}
	}
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if len(found) == 0 {
		return "", errors.New("no initdb")
	}
	slices.Sort(found)
	return filepath.Dir(found[len(found)-1]), nil
}

// NewPostgres prepares a server over the directory data, which Init makes. The
// user postgres, or else nobody, must be able to reach it.
func NewPostgres(t testing.TB, data string, flags ...string) *Postgres {
	t.Helper()
	Need(t, "root", "postgres", "stdbuf")
	bin, err := PostgresBin()
	if err != nil {
		t.Fatal(err)
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		if u, err = user.Lookup("nobody"); err != nil {
			t.Fatal(err)
		}
	}
	p := &Postgres{Data: data, Flags: flags, bin: bin}
	for id, to := range map[string]*uint32{u.Uid: &p.uid, u.Gid: &p.gid} {
		n, err := strconv.ParseUint(id, 10, 32)
		if err != nil {
			t.Fatal(err)
		}
		*to = uint32(n)
	}
	// Not below t.TempDir(): the path of a socket is short, and others must be let through.
	dir, err := os.MkdirTemp("", "pg-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Quit(); _ = os.RemoveAll(dir) })
	if err := errors.Join(os.Chmod(dir, 0o711), os.Mkdir(filepath.Join(dir, "s"), 0o755), os.Chown(filepath.Join(dir, "s"), int(p.uid), int(p.gid))); err != nil {
		t.Fatal(err)
	}
	p.socket, p.log = filepath.Join(dir, "s"), filepath.Join(dir, "log")
	return p
}

// Command returns one of PostgreSQL's programs, to be run as the server's user
// and as its client.
func (p *Postgres) Command(name string, args ...string) *exec.Cmd {
	return p.asUser(exec.Command(filepath.Join(p.bin, name), args...))
}

func (p *Postgres) asUser(cmd *exec.Cmd) *exec.Cmd {
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), "PGHOST="+p.socket, "PGUSER=postgres", "PGDATABASE=postgres", "LC_ALL=C", "PGCONNECT_TIMEOUT=60")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: p.uid, Gid: p.gid}}
	return cmd
}

// Run runs one of the programs to its end.
func (p *Postgres) Run(name string, args ...string) (string, error) {
	out, err := p.Command(name, args...).CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("%s %q: %w: %s", name, args, err, tail(string(out)))
	}
	return string(out), nil
}

// Init makes the data directory, with checksums and small WAL segments.
func (p *Postgres) Init() error {
	if err := errors.Join(os.Mkdir(p.Data, 0o700), os.Chown(p.Data, int(p.uid), int(p.gid))); err != nil {
		return err
	}
	_, err := p.Run("initdb", "-D", p.Data, "-U", "postgres", "-A", "trust", "--data-checksums", "--wal-segsize=1", "--no-instructions")
	return err
}

// Start starts the server and waits until it has recovered and takes
// connections.
func (p *Postgres) Start() error {
	log, err := os.OpenFile(p.log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := p.Command("postgres", append([]string{"-D", p.Data, "-k", p.socket, "-c", "listen_addresses="}, p.Flags...)...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return err
	}
	p.cmd = cmd
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	var notYet error
	for range 1200 {
		if _, notYet = p.Run("pg_isready"); notYet == nil {
			return nil
		}
		select {
		case err := <-ended:
			p.cmd = nil
			return fmt.Errorf("postgres: %v\n%s", err, p.Log())
		case <-time.After(50 * time.Millisecond):
		}
	}
	return fmt.Errorf("postgres takes no connections: %w\n%s", notYet, p.Log())
}

// Log returns the end of the server's log.
func (p *Postgres) Log() string {
	b, _ := os.ReadFile(p.log)
	return tail(string(b))
}

// Psql starts a session, in which each answer is a line, and an error the end.
func (p *Postgres) Psql() (*Session, error) {
	cmd := LineBuffered(filepath.Join(p.bin, "psql"), "-qAtX", "-v", "ON_ERROR_STOP=1")
	return StartSession(p.asUser(cmd))
}

// Query runs SQL in a session of its own and returns what it printed.
func (p *Postgres) Query(sql string) (string, error) {
	return p.Run("psql", "-qAtX", "-v", "ON_ERROR_STOP=1", "-c", sql)
}

// Stop shuts the server down in order: its clients are cut off.
func (p *Postgres) Stop() error { return p.signal(syscall.SIGINT) }

// Quit ends the server without a checkpoint, as a crash does. It may have
// ended by itself, or never have begun.
func (p *Postgres) Quit() { _ = p.signal(syscall.SIGQUIT) }

// Kill ends the server as the kernel does for want of memory: its first process
// cleans nothing up, and the others end when they notice.
func (p *Postgres) Kill() { _ = p.signal(syscall.SIGKILL) }

func (p *Postgres) signal(sig syscall.Signal) error {
	if p.cmd == nil {
		return nil
	}
	pid := p.cmd.Process.Pid
	p.cmd = nil
	if err := syscall.Kill(pid, sig); err != nil {
		return nil // it has ended
	}
	for range 6000 {
		if zombie(pid) {
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	_ = syscall.Kill(pid, syscall.SIGKILL)
	return fmt.Errorf("postgres does not end\n%s", p.Log())
}
