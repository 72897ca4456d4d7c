package backing

import (
	"errors"
	"strings"

	"golang.org/x/sys/unix"
)

// Attrs gives access to the extended attributes of one file, however it is
// reached. Values are at most 64 KiB (XATTR_SIZE_MAX).
type Attrs struct {
	path   string
	follow bool // the path is itself a link of proc(5) to the open file
	tap    Tap
	fd     int
	name   string // in fd; "": fd itself
}

// Attrs names the attributes of name in d itself, without following a symlink;
// name "" is d. Valid while d is open.
func (d *Dir) Attrs(name string) Attrs {
	a := Attrs{path: d.proc + name, tap: d.tap, fd: d.fd, name: name}
	if name == "" {
		a.path = d.proc + "."
	}
	return a
}

// Attrs names the attributes of the open file.
func (f *File) Attrs() Attrs {
	return Attrs{path: f.path(), follow: true, tap: f.tap, fd: f.fd}
}

// Get returns the value of attribute name, or ENODATA.
func (a Attrs) Get(name string) ([]byte, error) {
	if a.tap == nil {
		return a.get(name)
	}
	return tapped(a.tap, a.op("getxattr", name, nil, 0), func() ([]byte, error) { return a.get(name) })
}

func (a Attrs) get(name string) ([]byte, error) {
	get := unix.Lgetxattr
	if a.follow {
		get = unix.Getxattr
	}
	buf := make([]byte, 256)
	for {
		n, err := get(a.path, name, buf)
		if err == nil {
			return buf[:n], nil
		}
		if !errors.Is(err, unix.ERANGE) || len(buf) > 1<<16 {
			return nil, err
		}
		buf = make([]byte, 1<<16+1)
	}
}

// Set sets an attribute; flags are setxattr(2)'s.
func (a Attrs) Set(name string, value []byte, flags int) error {
	return a.do(a.op("setxattr", name, value, flags), func() error { return a.set(name, value, flags) })
}

func (a Attrs) set(name string, value []byte, flags int) error {
	if a.follow {
		return unix.Setxattr(a.path, name, value, flags)
	}
	return unix.Lsetxattr(a.path, name, value, flags)
}

// Remove removes an attribute, or ENODATA.
func (a Attrs) Remove(name string) error {
	return a.do(a.op("removexattr", name, nil, 0), func() error { return a.remove(name) })
}

func (a Attrs) remove(name string) error {
	if a.follow {
		return unix.Removexattr(a.path, name)
	}
	return unix.Lremovexattr(a.path, name)
}

// List returns the names of all attributes.
func (a Attrs) List() ([]string, error) {
	if a.tap == nil {
		return a.list()
	}
	return tapped(a.tap, a.op("listxattr", "", nil, 0), a.list)
}

func (a Attrs) list() ([]string, error) {
	list := unix.Llistxattr
	if a.follow {
		list = unix.Listxattr
	}
	buf := make([]byte, 1024)
	n, err := list(a.path, buf)
	if errors.Is(err, unix.ERANGE) {
		buf = make([]byte, 1<<16)
		n, err = list(a.path, buf)
	}
	if err != nil || n == 0 {
		return nil, err
	}
	return strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00"), nil
}

func (a Attrs) op(call, attr string, value []byte, flags int) *Op {
	if a.tap == nil {
		return nil
	}
	return &Op{Call: call, Fd: a.fd, Name: a.name, Attr: attr, Data: value, Flags: uint32(flags)}
}

func (a Attrs) do(op *Op, f func() error) error {
	if a.tap == nil {
		return f()
	}
	return a.tap.Do(op, f)
}
