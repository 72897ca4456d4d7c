package faultsweep

import (
	"maps"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

// prepared is what is in each store, and durable, before an operation.
var prepared = []step{
	create("foo"), write("foo", 0, 10_000, 1), setxattr("foo", 20, 2),
	mkdir("A"), create("A/foo"), write("A/foo", 0, 100, 3), create("A/bar"), write("A/bar", 0, 5000, 4), link("A/bar", "bar"), create("A/" + longName), write("A/"+longName, 0, 4096, 5),
	mkdir("A/sub"), create("A/sub/x"), write("A/sub/x", 0, 300, 6),
	mkdir("B"), mkdir("empty"), create("nothing"),
	symlink("../foo", "A/sym"), symlink(longTarget, "long link"), symlink(longTarget, "A/"+longName+"s"),
	create("holes"), write("holes", 0, 100, 8), truncate("holes", 40_000), write("holes", 60_000, 100, 9),
}

// unfinished is what a volume was doing when its process was killed: overwritten,
// grown, cut, and new files, of which some were synced.
var unfinished = []step{
	write("foo", 3000, 3000, 20), fsync("foo"), write("foo", 5000, 100, 21),
	write("A/bar", 5000, 9000, 22), truncate("A/foo", 50), fsync("A/foo"),
	create("new"), write("new", 0, 7000, 23), fsync("new"), write("new", 7000, 2000, 24),
	mkdir("D"), create("D/" + longName), write("D/"+longName, 0, 5000, 25), write("holes", 50_000, 100, 26),
	rename("A/sub/x", "B/moved", 0), unlink("nothing"),
}

// path is a series of steps of which each call may fail.
type path struct {
	name  string
	steps []step
	// half is a further state that a dead disk may leave of a step.
	half func(before, after tree) tree
}

// bothThere: the directory is at its new place, and the one that was there at
// its old one.
func bothThere(before, after tree) tree {
	out := maps.Clone(after)
	out["./A"] = before["./empty"]
	return out
}

func sec(s int64) *cryptfs.Time { return &cryptfs.Time{Sec: s} }

func id(n uint32) *uint32 { return &n }

const keepSize = unix.FALLOC_FL_KEEP_SIZE

var paths = []path{
	{name: "create", steps: []step{create("new"), write("new", 0, 6000, 30), fsync("new"), fsyncdir("."), closing("new")}},
	{name: "create long", steps: []step{create("B/" + longName), write("B/"+longName, 0, 10, 31), fsync("B/" + longName), fsyncdir("B")}},
	{name: "create big", steps: []step{create("new"), write("new", 0, 300_000, 32), fsync("new")}},
	{name: "create in new", steps: []step{mkdir("D"), create("D/f"), write("D/f", 0, 500, 33), fsync("D/f"), fsyncdir("D"), fsyncdir(".")}},
	{name: "write", steps: []step{write("nothing", 0, 9000, 34), fsync("nothing")}},
	{name: "overwrite", steps: []step{write("foo", 3000, 3000, 35), fsync("foo"), write("foo", 3500, 200, 36), fsync("foo"), settle()}},
	{name: "overwrite and close", steps: []step{write("foo", 3000, 3000, 35), closing("foo"), settle(), checkpoint()}},
	{name: "append", steps: []step{write("foo", 10_000, 7000, 37), fsync("foo"), write("foo", 17_000, 9000, 38), fsync("foo")}},
	{name: "append within a chunk", steps: []step{write("A/foo", 100, 50, 39), fsync("A/foo"), closing("A/foo"), write("A/foo", 150, 50, 40), fsync("A/foo")}},
	{name: "append much", steps: []step{write("foo", 10_000, 400_000, 41), fsync("foo")}},
	{name: "extend", steps: []step{write("foo", 30_000, 100, 42), fsync("foo")}},
	{name: "write into a hole", steps: []step{write("holes", 20_000, 5000, 43), fsync("holes"), settle()}},
	{name: "rewrite", steps: []step{trunc("foo"), write("foo", 0, 5000, 44), fsync("foo")}},
	{name: "truncate shorter", steps: []step{truncate("foo", 5000), fsync("foo"), write("foo", 5000, 6000, 45), fsync("foo")}},
	{name: "truncate longer", steps: []step{truncate("A/foo", 9000), fsync("A/foo")}},
	{name: "truncate to nothing", steps: []step{truncate("foo", 0), fsync("foo"), write("foo", 0, 100, 46), fsync("foo"), checkpoint()}},
	{name: "truncate by name", steps: []step{setattr("truncate", "foo", cryptfs.SetAttr{Size: new(int64)}), fsync("foo")}},
	{name: "rename", steps: []step{rename("A/foo", "A/zoo", 0), fsyncdir("A")}},
	{name: "rename to long", steps: []step{rename("A/foo", "A/n"+longName, 0), fsyncdir("A")}},
	{name: "rename to another directory", steps: []step{rename("foo", "B/moved", 0), fsyncdir("B"), fsyncdir(".")}},
	{name: "rename long to another directory", steps: []step{rename("A/"+longName, "B/n"+longName, 0), fsyncdir("B")}},
	{name: "rename over a file", steps: []step{rename("foo", "A/foo", 0), fsyncdir("A"), fsyncdir(".")}},
	{name: "rename over an open file", steps: []step{write("A/foo", 50, 10, 47), rename("foo", "A/foo", 0)}},
	{name: "exchange", steps: []step{rename("foo", "A/"+longName, unix.RENAME_EXCHANGE), fsyncdir("A")}},
	{name: "rename a directory", steps: []step{rename("A", "B/A", 0), fsyncdir("B")}},
	{name: "rename over a directory", steps: []step{rename("A", "empty", 0), fsyncdir(".")}, half: bothThere},
	{name: "rename a long symlink", steps: []step{rename("A/"+longName+"s", "B/s", 0)}},
	{name: "rename of a linked file", steps: []step{rename("bar", "B/bar", 0), fsyncdir("B")}},
	{name: "save", steps: []step{create("tmp"), write("tmp", 0, 3000, 48), fsync("tmp"), closing("tmp"), rename("tmp", "foo", 0), fsyncdir(".")}},
	{name: "link", steps: []step{link("foo", "B/link"), fsyncdir("B")}},
	{name: "link long", steps: []step{link("foo", "l"+longName), fsyncdir(".")}},
	{name: "unlink", steps: []step{unlink("foo"), fsyncdir(".")}},
	{name: "unlink one of two", steps: []step{unlink("bar"), fsyncdir(".")}},
	{name: "unlink long", steps: []step{unlink("A/" + longName), fsyncdir("A")}},
	{name: "unlink a long symlink", steps: []step{unlink("long link")}},
	{name: "unlink open", steps: []step{write("foo", 0, 100, 49), unlink("foo"), closing("foo"), checkpoint()}},
	{name: "mkdir", steps: []step{mkdir("D"), fsyncdir(".")}},
	{name: "mkdir long", steps: []step{mkdir("B/" + longName), fsyncdir("B")}},
	{name: "rmdir", steps: []step{rmdir("empty"), fsyncdir(".")}},
	{name: "symlink", steps: []step{symlink("to", "B/sym"), fsyncdir("B")}},
	{name: "long symlink", steps: []step{symlink(longTarget, "B/"+longName), fsyncdir("B")}},
	{name: "mknod", steps: []step{mknod("fifo"), fsyncdir(".")}},
	{name: "setxattr", steps: []step{setxattr("foo", 30, 50), fsync("foo")}},
	{name: "removexattr", steps: []step{rmxattr("foo"), fsync("foo")}},
	{name: "chmod", steps: []step{chmod("foo", 0o600), chmod("A", 0o700), fsync("foo"), fsyncdir("A")}},
	{name: "chown and times", steps: []step{setattr("chown", "foo", cryptfs.SetAttr{Uid: id(0), Gid: id(0)}), setattr("utimes", "foo", cryptfs.SetAttr{Atime: sec(5), Mtime: sec(6)}), fsync("foo")}},
	{name: "fallocate", steps: []step{allocate("fallocate", "foo", 0, 0, 15_000), fsync("foo")}},
	{name: "fallocate and keep", steps: []step{allocate("fallocate", "foo", keepSize, 0, 50_000), write("foo", 10_000, 9000, 51), fsync("foo")}},
	{name: "punch", steps: []step{allocate("punch", "foo", keepSize|unix.FALLOC_FL_PUNCH_HOLE, 1000, 8000), fsync("foo"), settle()}},
	{name: "zero range", steps: []step{allocate("zero", "foo", unix.FALLOC_FL_ZERO_RANGE, 1000, 14_000), fsync("foo")}},
	{name: "tmpfile", steps: []step{tmpfile(), write("", 0, 5000, 52), linkTemp("B/made"), fsyncdir("B")}},
	{name: "checkpoint", steps: []step{write("foo", 3000, 3000, 53), write("A/bar", 5000, 9000, 54), mkdir("D"), checkpoint(), write("foo", 0, 10, 55), fsync("foo"), checkpoint()}},
	{name: "unmount", steps: []step{write("foo", 3000, 3000, 58), fsync("foo"), write("foo", 9000, 3000, 59), write("A/bar", 5000, 9000, 60), mkdir("D")}},
	{name: "read", steps: []step{look()}},
	{name: "classify", steps: []step{classifying("empty", "phi"), create("empty/f"), write("empty/f", 0, 100, 56)}},
	{name: "policy apply", steps: []step{applyPolicy(), create("new"), write("new", 0, 100, 57)}},
}
