package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

func newMountCommand(a *app, o *mountOptions) *cobra.Command {
	var options []string
	cmd := &cobra.Command{
		Use:   "mount STORE MOUNTPOINT",
		Short: "Mount a store; returns when the mount is usable",
		Long: `Mount a store. The command returns when the mount is usable, and leaves a
process in the background that serves it and logs to a file; with --foreground
it serves the mount itself, logs to standard error, and ends when the mount does.

SIGTERM and SIGINT unmount. With --foreground the command is a systemd service
of Type=notify.

A store that this machine does not know is asked about on a terminal, and
refused otherwise unless --trust is given. A store whose keys changed is always
refused; see kmsfs known-stores accept.`,
		Example: `  kmsfs mount ~/store ~/plain
  kmsfs mount --read-only --allow-other /srv/store /mnt/plain
  kmsfs mount -o noexec,nosuid,keyring=/etc/kmsfs/keyring.json /srv/store /mnt/plain
  # in /etc/fstab:
  /srv/store  /mnt/plain  fuse.kmsfs  noauto,allow_other,keyring=/etc/kmsfs/keyring.json  0 0`,
		Args: operands("STORE", "MOUNTPOINT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.store, o.mountpoint = args[0], args[1]
			for _, list := range options {
				if err := o.apply(&a.global, list); err != nil {
					return err
				}
			}
			if err := a.checkGlobals(); err != nil {
				return err
			}
			return a.runMount(cmd.Context(), *o)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&o.foreground, "foreground", false, "serve the mount in this process")
	f.BoolVar(&o.readOnly, "read-only", false, "mount read-only; the store may be mounted elsewhere")
	f.BoolVar(&o.writeOnly, "write-only", false, "files can be made and written, none can be read; needs no right to unwrap their keys")
	f.StringVar(&o.audit, "audit", "", "log every use of a key and every integrity failure to `FILE`, hash-chained (kmsfs audit verify)")
	f.BoolVar(&o.auditRequired, "audit-required", false, "use no key that cannot be logged")
	f.StringVar(&o.metrics, "metrics", "", "serve Prometheus metrics at `HOST:PORT`, such as 127.0.0.1:9099")
	f.StringVar(&o.leaseInterval, "lease-interval", "", "how often to tell other machines at a shared disk that this one is alive (default 10s, 1s to 1m)")
	f.BoolVar(&o.allowOther, "allow-other", false, "let other users use the mount")
	f.BoolVar(&o.trust, "trust", false, "accept a store that is new to this machine, with the keys it names")
	f.StringVar(&o.logFile, "log-file", "", "log to `FILE` (default $XDG_STATE_HOME/kmsfs/STORE-ID.log, in the foreground standard error)")
	f.StringVar(&o.pidFile, "pid-file", "", "write the serving process's id to `FILE` while the mount lasts")
	f.StringArrayVarP(&options, "options", "o", nil, "mount `OPTIONS` as in fstab: ro, allow_other, nosuid, keyring=FILE, …")
	return cmd
}

// mountPlan is what serving a mount takes, all decided: no questions, no
// relative paths. It travels to the background process as JSON.
type mountPlan struct {
	Store         string              `json:"store"`
	ID            string              `json:"id"`
	Keys          map[string][]string `json:"keys"`
	Mountpoint    string              `json:"mountpoint"`
	Provider      providerConfig      `json:"provider"`
	KnownStores   string              `json:"known_stores"`
	PassFile      string              `json:"passphrase_file"`
	ReadOnly      bool                `json:"read_only"`
	WriteOnly     bool                `json:"write_only"`
	Audit         string              `json:"audit"`
	AuditRequired bool                `json:"audit_required"`
	Metrics       string              `json:"metrics"`
	LeaseInterval time.Duration       `json:"lease_interval"`
	AllowOther    bool                `json:"allow_other"`
	Options       []string            `json:"options"`
	PidFile       string              `json:"pid_file"`
	LogFormat     string              `json:"log_format"`
	LogLevel      string              `json:"log_level"`
}

func (p *mountPlan) facts() storeFacts { return storeFacts{id: p.ID, path: p.Store, keys: p.Keys} }

// check refuses options that contradict each other.
func (o *mountOptions) check() error {
	switch {
	case o.readOnly && o.writeOnly:
		return usage("--read-only and --write-only exclude each other", "give one of them")
	case o.auditRequired && o.audit == "":
		return usage("--audit-required needs --audit FILE", "name the file")
	}
	return nil
}

// lease returns the interval of renewals, 0 for the default.
func (o *mountOptions) lease() (time.Duration, error) {
	if o.leaseInterval == "" {
		return 0, nil
	}
	d, err := time.ParseDuration(o.leaseInterval)
	if err != nil || d < time.Second || d > time.Minute {
		return 0, usage("--lease-interval "+o.leaseInterval+" is no duration from 1s to 1m", "give one such as 10s")
	}
	return d, nil
}

func (a *app) runMount(ctx context.Context, o mountOptions) error {
	if err := o.check(); err != nil {
		return err
	}
	if o.foreground {
		beginRelaxed()
	}
	plan, err := a.planMount(ctx, &o)
	if err != nil {
		return err
	}
	pass, err := a.mountPassphrase(ctx, plan)
	if err != nil {
		return err
	}
	defer clear(pass)
	if !o.foreground {
		return a.startDaemon(ctx, plan, o.logFile, pass)
	}
	logTo := a.stderr
	if o.logFile != "" {
		f, err := openLog(o.logFile)
		if err != nil {
			return err
		}
		defer f.Close()
		logTo = f
	}
	return serveMount(ctx, plan, plan.passphraseSource(pass), newLogger(logTo, plan.LogFormat, plan.LogLevel), func(warnings []string) error {
		for _, w := range warnings {
			a.warn("%s", w)
		}
		return nil
	})
}

// planMount checks the mount's operands and trust.
func (a *app) planMount(ctx context.Context, o *mountOptions) (*mountPlan, error) {
	_, facts, err := inspectStore(o.store)
	if err != nil {
		return nil, err
	}
	mountpoint, err := checkMountpoint(o.mountpoint, facts.path, o.nonempty)
	if err != nil {
		return nil, err
	}
	// Last, for it may ask: nobody should answer before a plain mistake shows.
	if facts, err = a.trustedStore(ctx, o.store, o.trust); err != nil {
		return nil, err
	}
	p := &mountPlan{
		Store: facts.path, ID: facts.id, Keys: facts.keys, Mountpoint: mountpoint,
		ReadOnly: o.readOnly, WriteOnly: o.writeOnly, AllowOther: o.allowOther,
		AuditRequired: o.auditRequired, Metrics: o.metrics, Options: o.passthrough,
		LogFormat: a.global.logFormat, LogLevel: a.global.logLevel,
	}
	if p.LeaseInterval, err = o.lease(); err != nil {
		return nil, err
	}
	if p.LogLevel == "" {
		p.LogLevel = "info"
	}
	if p.Provider, err = a.global.providerConfig(); err != nil {
		return nil, err
	}
	if p.KnownStores, err = a.global.knownStoresPath(); err != nil {
		return nil, err
	}
	for _, path := range []struct {
		to   *string
		from string
	}{{&p.PassFile, a.global.passphraseFile}, {&p.PidFile, o.pidFile}, {&o.logFile, o.logFile}, {&p.Audit, o.audit}} {
		if path.from != "" {
			if *path.to, err = filepath.Abs(path.from); err != nil {
				return nil, err
			}
		}
	}
	return p, nil
}

// checkMountpoint returns the mountpoint's absolute path, links resolved, or
// says in one line why it cannot be one. store has no links in it.
func checkMountpoint(path, store string, nonempty bool) (string, error) {
	const chooseDir = "give an empty directory outside the store"
	abs, err := mountpointPath(path)
	if err != nil {
		return "", hint(fmt.Errorf("mountpoint: %w", err), chooseDir)
	}
	mounts, err := readMounts()
	if err != nil {
		return "", err
	}
	if m := mountAt(mounts, abs); m != nil && (m.Type == fsType || !nonempty) {
		return "", fail(errBusy, fmt.Sprintf("%s is a mountpoint already (%s, %s)", path, m.Source, m.Type),
			"kmsfs umount "+shellQuote(abs)+" frees it, if it is a kmsfs mount")
	}
	st, err := os.Stat(abs)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return "", usage("mountpoint "+path+" does not exist", "mkdir "+shellQuote(path))
	case err != nil:
		return "", hint(fmt.Errorf("mountpoint: %w", err), chooseDir)
	case !st.IsDir():
		return "", usage("mountpoint "+path+" is not a directory", chooseDir)
	case abs == store || strings.HasPrefix(abs, store+"/"):
		return "", usage("mountpoint "+path+" lies in the store", chooseDir)
	case abs == "/" || strings.HasPrefix(store, abs+"/"):
		return "", usage("the store lies in the mountpoint "+path+", which would hide it", chooseDir)
	}
	if nonempty {
		return abs, nil
	}
	entries, err := os.ReadDir(abs)
	if err != nil {
		return "", hint(fmt.Errorf("mountpoint: %w", err), chooseDir)
	}
	if len(entries) > 0 {
		return "", usage("mountpoint "+path+" is not empty; the mount would hide what is in it", chooseDir+", or -o nonempty")
	}
	return abs, nil
}
