package faultsweep

import (
	"context"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

// step is what a program does, and is told the outcome of.
type step struct {
	name  string
	do    func(s *session) error
	syncs bool
}

var (
	longName   = strings.Repeat("long-", 50)
	longTarget = strings.Repeat("to/", 1100)
)

func caller() cryptfs.Caller { return cryptfs.Caller{Umask: 0o22} }

// create makes a file, and has it open then.
func create(p string) step {
	return step{
		name: "create " + brief(p), do: func(s *session) error {
			dir, name, err := s.parent(p)
			if err != nil {
				return err
			}
			n, h, _, err := s.v.Create(context.Background(), dir, name, unix.O_RDWR, 0o644, caller())
			if err != nil {
				return err
			}
			s.refs, s.held[p] = append(s.refs, n), h
			return nil
		},
	}
}

// on does something with an open file, and what close(2) does.
func on(what, p string, do func(h *cryptfs.Handle) error) step {
	return step{name: what + " " + brief(p), do: func(s *session) error {
		h, err := s.handle(p, unix.O_RDWR)
		if err != nil {
			return err
		}
		if err := do(h); err != nil {
			return err
		}
		return h.Flush()
	}}
}

func write(p string, off int64, n int, seed byte) step {
	return on("write", p, func(h *cryptfs.Handle) error {
		_, err := h.WriteAt(noise(n, seed), off, false)
		return err
	})
}

func truncate(p string, size int64) step {
	return on("truncate", p, func(h *cryptfs.Handle) error { return h.Truncate(size) })
}

func allocate(what, p string, mode uint32, off, size int64) step {
	return on(what, p, func(h *cryptfs.Handle) error { return h.Allocate(mode, off, size) })
}

func fsync(p string) step {
	s := on("fsync", p, func(h *cryptfs.Handle) error { return h.Fsync(false) })
	s.syncs = true
	return s
}

func closing(p string) step {
	return step{name: "close " + brief(p), do: func(s *session) error {
		if h := s.held[p]; h != nil {
			h.Release()
			delete(s.held, p)
		}
		return nil
	}}
}

// at does something with a name of a directory.
func at(what, p string, do func(s *session, dir *cryptfs.Node, name string) error) step {
	return step{name: what + " " + brief(p), do: func(s *session) error {
		dir, name, err := s.parent(p)
		if err != nil {
			return err
		}
		return do(s, dir, name)
	}}
}

func (s *session) keep(n *cryptfs.Node, err error) error {
	if err == nil {
		s.refs = append(s.refs, n)
	}
	return err
}

func mkdir(p string) step {
	return at("mkdir", p, func(s *session, dir *cryptfs.Node, name string) error {
		n, _, err := s.v.Mkdir(context.Background(), dir, name, 0o755, caller())
		return s.keep(n, err)
	})
}

func mknod(p string) step {
	return at("mknod", p, func(s *session, dir *cryptfs.Node, name string) error {
		n, _, err := s.v.Mknod(context.Background(), dir, name, unix.S_IFIFO|0o600, 0, caller())
		return s.keep(n, err)
	})
}

func symlink(target, p string) step {
	return at("symlink", p, func(s *session, dir *cryptfs.Node, name string) error {
		n, _, err := s.v.Symlink(context.Background(), dir, name, target, caller())
		return s.keep(n, err)
	})
}

func unlink(p string) step {
	return at("unlink", p, func(s *session, dir *cryptfs.Node, name string) error {
		return s.v.Unlink(context.Background(), dir, name)
	})
}

func rmdir(p string) step {
	return at("rmdir", p, func(s *session, dir *cryptfs.Node, name string) error {
		return s.v.Rmdir(context.Background(), dir, name)
	})
}

func rename(p, to string, flags uint32) step {
	return at("rename to "+brief(to), p, func(s *session, dir *cryptfs.Node, name string) error {
		newDir, newName, err := s.parent(to)
		if err != nil {
			return err
		}
		return s.v.Rename(context.Background(), dir, name, newDir, newName, flags)
	})
}

func link(p, to string) step {
	return at("link "+brief(p), to, func(s *session, dir *cryptfs.Node, name string) error {
		n, err := s.node(p)
		if err != nil {
			return err
		}
		_, err = s.v.Link(context.Background(), n, dir, name)
		return s.keep(n, err)
	})
}

// node does something with an inode.
func node(what, p string, do func(s *session, n *cryptfs.Node) error) step {
	return step{name: what + " " + brief(p), do: func(s *session) error {
		n, err := s.node(p)
		if err != nil {
			return err
		}
		return do(s, n)
	}}
}

func fsyncdir(p string) step {
	s := node("fsync", p, func(s *session, n *cryptfs.Node) error { return s.v.FsyncDir(n) })
	s.syncs = true
	return s
}

func setxattr(p string, n int, seed byte) step {
	return node("setxattr", p, func(s *session, node *cryptfs.Node) error {
		return s.v.Setxattr(context.Background(), node, "user.k", noise(n, seed), 0, caller())
	})
}

func rmxattr(p string) step {
	return node("removexattr", p, func(s *session, n *cryptfs.Node) error {
		err := s.v.Removexattr(context.Background(), n, "user.k")
		return err
	})
}

func chmod(p string, mode uint32) step {
	return node("chmod", p, func(s *session, n *cryptfs.Node) error {
		_, err := s.v.Setattr(context.Background(), n, cryptfs.SetAttr{Mode: &mode})
		return err
	})
}

func setattr(what, p string, a cryptfs.SetAttr) step {
	return node(what, p, func(s *session, n *cryptfs.Node) error {
		_, err := s.v.Setattr(context.Background(), n, a)
		return err
	})
}

// trunc is open(2) with O_TRUNC.
func trunc(p string) step {
	return node("O_TRUNC", p, func(s *session, n *cryptfs.Node) error {
		h, err := s.v.Open(context.Background(), n, unix.O_RDWR|unix.O_TRUNC, false)
		if err == nil {
			err = h.Flush()
			h.Release()
		}
		return err
	})
}

func settle() step {
	return step{name: "settle", do: func(s *session) error { return s.v.Settle() }}
}

func checkpoint() step {
	return step{name: "checkpoint", do: func(s *session) error { return s.v.Checkpoint() }}
}

// look reads everything.
func look() step {
	return step{name: "read all", do: func(s *session) error { _, err := read(s.v); return err }}
}

// tmpfile makes a file without a name, and has it open then as "".
func tmpfile() step {
	return step{name: "tmpfile", do: func(s *session) error {
		n, h, _, err := s.v.Tmpfile(context.Background(), s.v.Root(), unix.O_RDWR, 0o644, caller())
		if s.keep(n, err) == nil {
			s.held[""], s.temp = h, n
		}
		return err
	}}
}

// linkTemp gives the file without a name one.
func linkTemp(p string) step {
	return at("link of a tmpfile", p, func(s *session, dir *cryptfs.Node, name string) error {
		_, err := s.v.Link(context.Background(), s.temp, dir, name)
		return s.keep(s.temp, err)
	})
}

func classifying(p, class string) step {
	return node("classify", p, func(s *session, n *cryptfs.Node) error { return s.v.Classify(context.Background(), n, class) })
}

// applyPolicy gives the class general a second recipient.
func applyPolicy() step {
	return step{name: "policy apply", do: func(s *session) error {
		p := s.v.Info().Policy.Clone()
		c := p.Classes["general"]
		c.Keys = []string{"keyring:general", "keyring:spare"}
		p.Classes["general"] = c
		_, err := s.v.ApplyPolicy(context.Background(), p)
		return err
	}}
}
