package powercut

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// step is what a program does with the mount. Paths are relative to it.
type step struct {
	Op   string
	Path string
	To   string // rename, link, symlink: the new name
	Off  int64
	Len  int64 // bytes; the data follow from Seed
	Seed uint64
	Sync bool // and then syncs the file that it has open
}

func (s step) String() string {
	b, _ := json.Marshal(s)
	return string(b)
}

// bytes is what a write step writes: never zeros, and never the same.
func (s step) bytes() []byte {
	out := make([]byte, s.Len)
	r := rand.NewChaCha8([32]byte{byte(s.Seed), byte(s.Seed >> 8), byte(s.Seed >> 16), 1})
	_, _ = r.Read(out) // never fails
	for i := range out {
		out[i] |= 1
	}
	return out
}

const clientEnv = "POWERCUT_CLIENT"

// TestMain: the program that uses the mount is a process of its own. Page faults
// of this one could not be served while its garbage is collected.
func TestMain(m *testing.M) {
	unix.Umask(0) // as a mount's server does
	if os.Getenv(clientEnv) == "" {
		os.Exit(m.Run())
	}
	unix.Umask(0o22)
	held := map[string]*os.File{}
	in := bufio.NewScanner(os.Stdin)
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		var c clientCall
		err := json.Unmarshal(in.Bytes(), &c)
		if err == nil {
			err = c.Step.do(c.Mount, held)
		}
		if err != nil {
			fmt.Printf("%s: %v\n", c.Step, err)
		} else {
			fmt.Println("ok")
		}
	}
}

type clientCall struct {
	Mount string
	Step  step
}

// client does steps on mounts, one after the other.
type client struct {
	in  io.WriteCloser
	out *bufio.Scanner
}

func newClient(t testing.TB) *client {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), clientEnv+"=1")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("client: %v", err)
		}
	})
	return &client{in, bufio.NewScanner(out)}
}

func (c *client) do(mount string, s step) error {
	if err := json.NewEncoder(c.in).Encode(clientCall{mount, s}); err != nil {
		return err
	}
	if !c.out.Scan() {
		return fmt.Errorf("the client is gone: %w", errors.Join(c.out.Err(), io.ErrUnexpectedEOF))
	}
	if got := c.out.Text(); got != "ok" {
		return errors.New(got)
	}
	return nil
}

// do does the step with system calls. held are files that are kept open.
func (s step) do(mount string, held map[string]*os.File) error {
	path, to := filepath.Join(mount, s.Path), filepath.Join(mount, s.To)
	switch s.Op {
	case "mkdir":
		return os.Mkdir(path, 0o755)
	case "rmdir":
		return unix.Rmdir(path)
	case "unlink":
		return unix.Unlink(path)
	case "rename":
		return unix.Rename(path, to)
	case "exchange":
		return unix.Renameat2(unix.AT_FDCWD, path, unix.AT_FDCWD, to, unix.RENAME_EXCHANGE)
	case "link":
		return os.Link(path, to)
	case "symlink":
		return os.Symlink(s.To, path)
	case "chmod":
		return s.open(path, unix.O_RDONLY, func(fd int) error { return unix.Fchmod(fd, uint32(s.Off)) })
	case "fsyncdir":
		return s.open(path, unix.O_RDONLY|unix.O_DIRECTORY, unix.Fsync)
	case "tmpfile":
		return s.unnamed(path)
	case "hold":
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		held[path] = f
		return err
	case "poke": // a write that no close follows
		_, err := held[path].WriteAt(s.bytes(), s.Off)
		return err
	case "let":
		f := held[path]
		delete(held, path)
		return f.Close()
	}
	flags, ok := map[string]int{"create": unix.O_RDWR | unix.O_CREAT | unix.O_EXCL, "rewrite": unix.O_RDWR | unix.O_TRUNC}[s.Op]
	if !ok {
		flags = unix.O_RDWR
	}
	return s.open(path, flags, s.use)
}

func (s step) open(path string, flags int, f func(fd int) error) error {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return err
	}
	err = f(fd)
	if err == nil && s.Sync {
		err = unix.Fsync(fd)
	}
	return errors.Join(err, unix.Close(fd))
}

// unnamed makes a file with O_TMPFILE, which gets its name with its contents.
func (s step) unnamed(path string) error {
	fd, err := unix.Open(filepath.Dir(path), unix.O_RDWR|unix.O_TMPFILE|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return err
	}
	err = s.use(fd)
	if err == nil {
		err = unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW)
	}
	if err == nil && s.Sync {
		err = unix.Fsync(fd)
	}
	return errors.Join(err, unix.Close(fd))
}

func (s step) use(fd int) error {
	switch s.Op {
	case "create", "tmpfile", "rewrite", "write":
		if s.Len == 0 {
			return nil
		}
		n, err := unix.Pwrite(fd, s.bytes(), s.Off)
		if err == nil && n < int(s.Len) {
			err = io.ErrShortWrite
		}
		return err
	case "truncate":
		return unix.Ftruncate(fd, s.Off)
	case "allocate":
		return unix.Fallocate(fd, 0, s.Off, s.Len)
	case "zero":
		return unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE, s.Off, s.Len)
	case "punch":
		return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, s.Off, s.Len)
	case "mmap":
		return s.mapped(fd)
	case "setxattr":
		return unix.Fsetxattr(fd, "user.k", s.bytes(), 0)
	case "rmxattr":
		return unix.Fremovexattr(fd, "user.k")
	case "fsync":
		return unix.Fsync(fd)
	case "fdatasync":
		return unix.Fdatasync(fd)
	}
	return fmt.Errorf("no such step")
}

func (s step) mapped(fd int) error {
	from := s.Off &^ 4095
	m, err := unix.Mmap(fd, from, int(s.Off+s.Len-from), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	copy(m[s.Off-from:], s.bytes())
	if s.Sync {
		err = unix.Msync(m, unix.MS_SYNC)
	}
	return errors.Join(err, unix.Munmap(m))
}
