package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// rewarm is how often a small number of files is looked at, so that what is
// measured is more than the clock.
func rewarm(files int) int { return max(1, min(3, 1000/files)) }

// manyFiles makes a directory of empty files, so that the room for their
// contents is not what is measured, and lists it in three ways.
func (c *client) manyFiles() error {
	began := time.Now()
	if _, err := createSmall(c.many(), c.files, nil); err != nil {
		return err
	}
	say("create", perFile(began, c.files), nil)
	for _, m := range []struct {
		name string
		look func() (int, error)
	}{{"list", c.list}, {"find", c.find}, {"stat", c.stat}} {
		var total time.Duration
		n := 0
		for range rewarm(c.files) {
			if err := c.drop(); err != nil {
				return err
			}
			began := time.Now()
			seen, err := m.look()
			if err != nil {
				return fmt.Errorf("%s: %w", m.name, err)
			}
			total += time.Since(began)
			n += seen
		}
		say(m.name, float64(total.Microseconds())/float64(n), nil)
	}
	return nil
}

// want makes an error of a listing that misses files.
func (c *client) want(n int) (int, error) {
	if n != c.files {
		return n, fmt.Errorf("%d files, want %d", n, c.files)
	}
	return n, nil
}

func (c *client) list() (int, error) {
	n := 0
	if err := eachName(c.many(), func(string) error { n++; return nil }); err != nil {
		return n, err
	}
	return c.want(n)
}

// stat is what ls -l does: it lists, and asks for each file.
func (c *client) stat() (int, error) {
	fd, err := unix.Open(c.many(), unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer func() { _ = unix.Close(fd) }()
	n := 0
	err = eachName(c.many(), func(name string) error {
		var st unix.Stat_t
		n++
		return unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	})
	if err != nil {
		return n, err
	}
	return c.want(n)
}

// find asks for some files by their names, in no order.
func (c *client) find() (int, error) {
	r := rand.New(rand.NewPCG(1, 2))
	n := min(c.files, c.ops(5000))
	for range n {
		var st unix.Stat_t
		path := fmt.Sprintf("%s/f%d", c.many(), r.IntN(c.files))
		if err := unix.Lstat(path, &st); err != nil {
			return 0, fmt.Errorf("%s: %w", path, err)
		}
	}
	return n, nil
}

// remove removes what manyFiles made.
func (c *client) remove() error {
	began := time.Now()
	for i := range c.files {
		if err := unix.Unlink(fmt.Sprintf("%s/f%d", c.many(), i)); err != nil {
			return err
		}
	}
	err := unix.Rmdir(c.many())
	say("remove", perFile(began, c.files), err)
	return nil
}

// largeFile writes a file, reads it and reads in it.
func (c *client) largeFile() error {
	path := filepath.Join(c.dir, "large")
	rate, err := writeLarge(path, c.size)
	say("write", rate, err)
	if err := c.drop(); err != nil {
		return err
	}
	rate, err = readLarge(path, c.size)
	say("read", rate, err)
	if err := c.drop(); err != nil {
		return err
	}
	rate, err = randRead(path, offsets(c.ops(4000), c.size, 5))
	say("randread", rate, err)
	return nil
}

// What all clients together do does not grow with their number.
func (c *client) sharedFiles() int { return c.ops(3200) }
func (c *client) sharedReads() int { return c.ops(6400) }

// manyClients starts workers, lets all of them go at once, and times them until
// the last is done.
func (c *client) manyClients() error {
	if _, err := writeLarge(filepath.Join(c.dir, "large"), c.size); err != nil {
		return err
	}
	for i := range c.clients {
		if _, err := createSmall(c.ownDir("small", i), c.sharedFiles()/c.clients, noise(1000)); err != nil {
			return err
		}
	}
	for _, part := range []struct {
		name string
		ops  int
	}{{"read", c.sharedFiles()}, {"create", c.sharedFiles()}, {"randread", c.sharedReads()}} {
		if err := c.drop(); err != nil {
			return err
		}
		took, err := c.together(part.name)
		if err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
		say(part.name, float64(part.ops/c.clients*c.clients)/took.Seconds(), nil)
	}
	return nil
}

func (c *client) ownDir(kind string, i int) string { return fmt.Sprintf("%s/%s%d", c.dir, kind, i) }

// helper is a worker process and its end of the starting line.
type helper struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// together runs a part in as many processes as there are clients.
func (c *client) together(part string) (time.Duration, error) {
	var workers []*helper
	// A worker whose input is closed before it was told to go ends.
	defer func() {
		for _, w := range workers {
			_ = w.in.Close()
			_ = w.cmd.Wait() // its failure was seen in what it said
		}
	}()
	for i := range c.clients {
		w, err := c.startWorker(part, i)
		if err != nil {
			return 0, err
		}
		workers = append(workers, w)
	}
	if err := eachLine(workers, "ready"); err != nil {
		return 0, err
	}
	began := time.Now()
	for _, w := range workers {
		if _, err := io.WriteString(w.in, "go\n"); err != nil {
			return 0, err
		}
	}
	err := eachLine(workers, "done")
	return time.Since(began), err
}

func (c *client) startWorker(part string, i int) (*helper, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self, "client", "worker", "-dir", c.dir, "-only", part, fmt.Sprintf("-brief=%v", c.brief),
		"-files", fmt.Sprint(i), "-clients", fmt.Sprint(c.clients), "-size", fmt.Sprint(c.size>>20))
	cmd.Stderr = os.Stderr
	w := &helper{cmd: cmd}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	w.out = bufio.NewReader(out)
	if w.in, err = cmd.StdinPipe(); err != nil {
		return nil, err
	}
	return w, cmd.Start()
}

func eachLine(workers []*helper, want string) error {
	for _, w := range workers {
		line, err := w.out.ReadString('\n')
		if line != want+"\n" {
			return errors.Join(fmt.Errorf("a worker said %q, not %q", line, want), err)
		}
	}
	return nil
}

// worker is one of many clients, the one of number c.files. It says that it is
// ready, waits until it is told to go, does its share and says that it is done.
func (c *client) worker() error {
	i, mine := c.files, c.sharedFiles()/c.clients
	do, ok := map[string]func() error{
		"read": func() error {
			_, err := readSmall(c.ownDir("small", i), 1000)
			return err
		},
		"create": func() error {
			_, err := createSmall(c.ownDir("new", i), mine, noise(1000))
			return err
		},
		"randread": func() error {
			all := offsets(c.sharedReads(), c.size, 11)
			share := slices.Collect(slices.Chunk(all, c.sharedReads()/c.clients))[i]
			_, err := randRead(filepath.Join(c.dir, "large"), share)
			return err
		},
	}[c.only[0]]
	if !ok {
		return fmt.Errorf("worker %s: no such part", c.only[0])
	}
	fmt.Println("ready")
	if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
		return nil // the others did not get ready
	}
	if err := do(); err != nil {
		return err
	}
	fmt.Println("done")
	return nil
}
