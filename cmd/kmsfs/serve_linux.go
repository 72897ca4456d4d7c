package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/audit"
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/fs/cryptfs"
	"github.com/kmsfs/kmsfs/fs/fusefs"
)

// serveMount opens the store, mounts it, and returns when it is unmounted and
// closed. ready is called once, when the mount is usable, with what the user
// should know; its error unmounts again. ctx ends the mount.
func serveMount(ctx context.Context, p *mountPlan, pass func() ([]byte, error), log *slog.Logger, ready func(warnings []string) error) (err error) {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	defer signal.Stop(signals)
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	defer signal.Stop(hangups)
	prepareLimits(log)
	spareProcs()
	mon, err := openMonitor(p, log)
	if err != nil {
		return err
	}
	defer mon.close(log)
	v, err := openServed(ctx, p, mon, pass, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	if err := mon.serveMetrics(ctx, p, v, log); err != nil {
		return err
	}
	// Deriving a key from a passphrase took 64 MiB that are not needed again.
	debug.FreeOSMemory()
	defer boundMemory()()
	syscall.Umask(0) // each request brings its caller's
	server, err := fusefs.Mount(v.Volume, p.Mountpoint, fusefs.Options{
		AllowOther: p.AllowOther, ReadOnly: p.ReadOnly, Extra: p.Options, Log: log, Failed: mon.failed,
	})
	if err != nil {
		return err
	}
	if err := announce(p, log, keyWarnings(ctx, v.providers, allKeys(p.Keys)), ready); err != nil {
		return errors.Join(err, server.Unmount())
	}
	_ = mon.write(audit.Event{Kind: audit.KindMount, Result: audit.OK})
	watching, stopWatching := context.WithCancel(ctx)
	defer stopWatching()
	go watchKeys(watching, v.providers, allKeys(p.Keys), log)
	if p.PidFile != "" {
		defer os.Remove(p.PidFile)
	}
	unmounted := make(chan struct{})
	go func() {
		server.Wait()
		close(unmounted)
	}()
	for waiting := true; waiting; {
		select {
		case <-hangups:
			mon.reopen(log)
			continue
		case <-unmounted:
		case <-ctx.Done():
		case <-signals:
		}
		waiting = false
	}
	notify(log, "STOPPING=1")
	unmount(server, p.Mountpoint, log)
	<-unmounted
	_ = mon.write(audit.Event{Kind: audit.KindUnmount, Result: audit.OK})
	log.Info("unmounted", "store", p.Store)
	return nil
}

// openServed opens the volume of a mount, observed by mon.
func openServed(ctx context.Context, p *mountPlan, mon *monitor, pass func() ([]byte, error), log *slog.Logger) (*volume, error) {
	cfg := p.Provider
	cfg.Observe = mon.ended
	services, err := openProviders(ctx, cfg, allKeys(p.Keys), pass, log)
	if err != nil {
		return nil, err
	}
	c := cryptfs.Config{ReadOnly: p.ReadOnly, WriteOnly: p.WriteOnly, LeaseInterval: p.LeaseInterval, Log: log}
	if mon.log != nil {
		c.Observe, c.Call, c.Classified = mon.use, mon.call, mon.classified
	}
	return openVolume(ctx, p.facts(), services, c, p.KnownStores)
}

// announce tells everyone who waits that the mount is usable.
func announce(p *mountPlan, log *slog.Logger, warnings []string, ready func([]string) error) error {
	for _, w := range warnings {
		log.Warn(w)
	}
	if !keymem.Locked() {
		warnings = append(warnings, "keys cannot be locked into memory and may reach the swap: raise the limit (ulimit -l) or turn swap off")
		log.Warn("keys cannot be locked into memory; raise RLIMIT_MEMLOCK")
	}
	if p.PidFile != "" {
		if err := replaceFile(p.PidFile, []byte(strconv.Itoa(os.Getpid())+"\n"), 0o644); err != nil {
			return hint(fmt.Errorf("pid file: %w", err), "give a --pid-file that can be written")
		}
	}
	log.Info("mounted", "store", p.Store, "id", p.ID, "read_only", p.ReadOnly, "pid", os.Getpid())
	// In the background this is not the process that was started.
	notify(log, fmt.Sprintf("READY=1\nMAINPID=%d\nSTATUS=serving %s", os.Getpid(), p.Store))
	return ready(warnings)
}

func notify(log *slog.Logger, state string) {
	if err := sdNotify(state); err != nil {
		log.Warn("no answer to the service manager", "err", err)
	}
}

// unmount ends the mount, if it is still there. A mount that is in use is detached: it
// leaves the tree now, and the process ends when the last file is closed.
func unmount(server *fusefs.Server, mountpoint string, log *slog.Logger) {
	err := server.Unmount()
	if err == nil {
		return
	}
	log.Warn("the mount is in use and was detached; it ends when its last file is closed", "err", err)
	if err := detach(mountpoint, true); err != nil {
		log.Error("the mount cannot be detached", "err", err)
	}
}

// prepareLimits raises what a mount with many open files and keys needs.
func prepareLimits(log *slog.Logger) {
	for _, r := range []struct {
		name     string
		resource int
	}{{"RLIMIT_NOFILE", unix.RLIMIT_NOFILE}, {"RLIMIT_MEMLOCK", unix.RLIMIT_MEMLOCK}} {
		if err := raiseLimit(r.resource); err != nil {
			log.Warn("a resource limit stays low", "limit", r.name, "err", err)
		}
	}
	// The kernel sends every caller's umask along; this process's own must not
	// take bits away on top.
	unix.Umask(0)
}

// raiseLimit lifts a soft limit to the hard one.
func raiseLimit(resource int) error {
	var l unix.Rlimit
	if err := unix.Getrlimit(resource, &l); err != nil {
		return err
	}
	if l.Cur == l.Max {
		return nil
	}
	l.Cur = l.Max
	return unix.Setrlimit(resource, &l)
}
