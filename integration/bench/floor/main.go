// Command floor mounts a directory on itself, as it is, through go-fuse's own
// loopback file system: what a FUSE file system written in Go takes when it
// does nothing. The kernel may not read and write below it by itself
// (passthrough), because a file system that has work to do cannot let it.
//
//	floor [-writeback] [-read-ahead KiB] [-allow-other] DIR MOUNTPOINT
//
// It serves until somebody unmounts it, or until SIGINT or SIGTERM.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "floor:", err)
		os.Exit(1)
	}
}

func run() error {
	writeback := flag.Bool("writeback", false, "with the kernel's writeback cache")
	allowOther := flag.Bool("allow-other", false, "let other users in")
	readAhead := flag.Int("read-ahead", 0, "what the kernel reads ahead, in `KiB` (takes root); 0: its default for FUSE, 128")
	flag.Parse()
	if flag.NArg() != 2 {
		flag.Usage()
		os.Exit(2)
	}
	dir, mountpoint := flag.Arg(0), flag.Arg(1)
	root, err := fs.NewLoopbackRoot(dir)
	if err != nil {
		return err
	}
	if *writeback {
		root = &readable{root.(*fs.LoopbackNode)}
	}
	server, err := fs.Mount(mountpoint, root, options(dir, *writeback, *allowOther))
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	if *readAhead > 0 {
		if err := setReadAhead(mountpoint, *readAhead); err != nil {
			_ = server.Unmount()
			return err
		}
	}
	go func() {
		<-ctx.Done()
		if err := server.Unmount(); err != nil {
			fmt.Fprintln(os.Stderr, "floor:", err)
		}
	}()
	server.Wait()
	return nil
}

// options are those of go-fuse's example/loopback, with requests as large as
// the kernel makes them, and without a getxattr before each write.
func options(dir string, writeback, allowOther bool) *fs.Options {
	second := time.Second
	o := &fs.Options{
		AttrTimeout:     &second,
		EntryTimeout:    &second,
		NullPermissions: true,
		MountOptions: fuse.MountOptions{
			AllowOther:           allowOther,
			DirectMount:          true,
			FsName:               dir,
			Name:                 "floor",
			MaxWrite:             1 << 20,
			MaxReadAhead:         1 << 20,
			ExtraCapabilities:    fuse.CAP_HANDLE_KILLPRIV_V2,
			DisabledCapabilities: fuse.CAP_PASSTHROUGH,
		},
	}
	if writeback {
		o.ExtraCapabilities |= fuse.CAP_WRITEBACK_CACHE
	}
	if allowOther {
		o.Options = append(o.Options, "default_permissions")
	}
	return o
}

// readable opens every file for reading as well: with the writeback cache the
// kernel reads the page around a small write, also for a caller who may only
// write.
type readable struct{ *fs.LoopbackNode }

func (r *readable) WrapChild(_ context.Context, child fs.InodeEmbedder) fs.InodeEmbedder {
	if n, ok := child.(*fs.LoopbackNode); ok {
		return &readable{n}
	}
	return child
}

func readToo(flags uint32) uint32 {
	if flags&unix.O_ACCMODE == unix.O_WRONLY {
		return flags&^unix.O_ACCMODE | unix.O_RDWR
	}
	return flags
}

func (r *readable) Open(ctx context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return r.LoopbackNode.Open(ctx, readToo(flags))
}

func (r *readable) Create(ctx context.Context, name string, flags, mode uint32, out *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	return r.LoopbackNode.Create(ctx, name, readToo(flags), mode, out)
}

// setReadAhead lifts a limit that the FUSE protocol can only lower.
func setReadAhead(mountpoint string, kib int) error {
	var st unix.Stat_t
	if err := unix.Stat(mountpoint, &st); err != nil {
		return err
	}
	file := fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", unix.Major(st.Dev), unix.Minor(st.Dev))
	return os.WriteFile(file, fmt.Appendf(nil, "%d", kib), 0)
}
