package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// client is the process that uses a mount. Everything is timed in it, by system
// calls that Go's os package does not add to: os.Open, say, also asks a FUSE
// file whether it can be polled.
type client struct {
	dir  string
	size int64 // of the large file, in bytes
	tar  string
	only []string

	brief bool

	files, clients int // for growth
}

func runClient(args []string) error {
	if len(args) == 0 {
		return fmt.Errorf("client of what?")
	}
	c := &client{}
	f := flag.NewFlagSet("bench client", flag.ExitOnError)
	f.StringVar(&c.dir, "dir", "", "the mount")
	sizeMiB := f.Int64("size", 512, "size of the large file, in `MiB`")
	f.StringVar(&c.tar, "tar", "", "archive to unpack")
	only := f.String("only", "", "workloads")
	f.BoolVar(&c.brief, "brief", false, "do little")
	f.IntVar(&c.files, "files", 0, "files to make")
	f.IntVar(&c.clients, "clients", 1, "how many at a time")
	_ = f.Parse(args[1:]) // ExitOnError
	c.size, c.only = *sizeMiB<<20, split(*only)
	part, ok := map[string]func() error{
		"peers": c.peers, "files": c.manyFiles, "remove": c.remove, "size": c.largeFile, "clients": c.manyClients, "worker": c.worker,
	}[args[0]]
	if !ok {
		return fmt.Errorf("client %s: no such part", args[0])
	}
	return part()
}

// peers runs the workloads. One that fails is reported, and the others run all
// the same.
func (c *client) peers() error {
	for _, w := range works {
		if len(c.only) > 0 && !slices.Contains(c.only, w.name) {
			continue
		}
		value, err := w.run(c)
		say(w.name, value, err)
	}
	return nil
}

// say tells the parent of a measurement.
func say(name string, value float64, err error) {
	r := reply{Name: name, Value: value}
	if err != nil {
		r.Error = err.Error()
	}
	line, err := json.Marshal(r)
	if err != nil {
		panic(err) // a number that is none, a bug in a workload
	}
	fmt.Println(string(line))
}

// drop makes what comes cold: the kernel forgets pages, names and inodes. What is
// dirty it cannot forget, so the mount is written out, and the disk below.
func (c *client) drop() error {
	for _, dir := range []string{c.dir, filepath.Dir(c.dir)} {
		if err := syncfs(dir); err != nil {
			return fmt.Errorf("syncfs: %w", err)
		}
	}
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		return fmt.Errorf("a cold workload takes root: %w", err)
	}
	return nil
}

func syncfs(dir string) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	return unix.Syncfs(fd)
}
