package main

import (
	"fmt"
	"strings"
)

// mountOptions is a mount as the user asked for it, from flags, from -o, or
// from mount(8).
type mountOptions struct {
	store         string
	mountpoint    string
	foreground    bool
	readOnly      bool
	writeOnly     bool
	audit         string
	auditRequired bool
	metrics       string
	leaseInterval string
	allowOther    bool
	trust         bool
	nonempty      bool
	logFile       string
	pidFile       string
	passthrough   []string // -o options for the kernel
}

// apply reads one -o argument, fstab style: options with commas between them,
// later ones win. What is not kmsfs's own goes to the kernel, which refuses
// what it does not know.
func (o *mountOptions) apply(g *globalOptions, list string) error {
	for _, option := range splitOptions(list) {
		name, value, hasValue := strings.Cut(option, "=")
		if target := o.valueOption(g, name); target != nil {
			if value == "" {
				return usage(fmt.Sprintf("-o %s needs a value", name), "write "+name+"=VALUE")
			}
			*target = value
			continue
		}
		target, to := o.switchOption(name)
		if target == nil && mountInternal[name] {
			continue
		}
		if target == nil {
			o.passthrough = append(o.passthrough, option)
			continue
		}
		if hasValue {
			return usage(fmt.Sprintf("-o %s takes no value", name), "write "+name)
		}
		*target = to
	}
	return nil
}

// mountInternal are options that mount(8) adds for its own use.
var mountInternal = map[string]bool{"user": true, "uhelper": true, "helper": true}

// valueOption returns where the value of a NAME=VALUE option goes, or nil.
func (o *mountOptions) valueOption(g *globalOptions, name string) *string {
	switch strings.ReplaceAll(name, "_", "-") {
	case "keyring":
		return &g.keyring
	case "known-stores":
		return &g.knownStores
	case "passphrase-file":
		return &g.passphraseFile
	case "region":
		return &g.region
	case "profile":
		return &g.profile
	case "endpoint-url":
		return &g.endpointURL
	case "pkcs11-module":
		return &g.pkcs11Module
	case "pkcs11-pin-file":
		return &g.pkcs11PINFile
	case "log-file":
		return &o.logFile
	case "log-format":
		return &g.logFormat
	case "log-level":
		return &g.logLevel
	case "audit":
		return &o.audit
	case "metrics":
		return &o.metrics
	case "lease-interval":
		return &o.leaseInterval
	case "pid-file":
		return &o.pidFile
	}
	return nil
}

// switchOption returns what an option without a value switches, and to what.
func (o *mountOptions) switchOption(name string) (*bool, bool) {
	switch name {
	case "ro":
		return &o.readOnly, true
	case "rw":
		return &o.readOnly, false
	case "allow_other":
		return &o.allowOther, true
	case "write_only", "write-only":
		return &o.writeOnly, true
	case "audit_required", "audit-required":
		return &o.auditRequired, true
	case "trust":
		return &o.trust, true
	case "nonempty":
		return &o.nonempty, true
	case "foreground":
		return &o.foreground, true
	}
	return nil, false
}

// splitOptions cuts at commas, save those behind a backslash, as mount(8) does
// for values with commas.
func splitOptions(list string) []string {
	var out []string
	var b strings.Builder
	for i := 0; i < len(list); i++ {
		switch {
		case list[i] == '\\' && i+1 < len(list) && (list[i+1] == ',' || list[i+1] == '\\'):
			i++
			b.WriteByte(list[i])
		case list[i] == ',':
			out = append(out, b.String())
			b.Reset()
		default:
			b.WriteByte(list[i])
		}
	}
	out = append(out, b.String())
	kept := out[:0]
	for _, s := range out {
		if s != "" {
			kept = append(kept, s)
		}
	}
	return kept
}
