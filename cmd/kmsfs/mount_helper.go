package main

import (
	"context"
	"fmt"
	"strings"
)

// mountHelperNames are the program names under which mount(8) starts a helper:
// by type ("kmsfs"), or by way of the types fuse.kmsfs and fuse3.kmsfs.
var mountHelperNames = map[string]bool{
	"mount.kmsfs": true, "mount.fuse.kmsfs": true, "mount.fuse3.kmsfs": true,
}

// runMountHelper is the program under one of those names:
//
//	mount.kmsfs STORE MOUNTPOINT [-sfnv] [-o OPTIONS] [-t TYPE]
//
// It parses by hand: mount(8) puts options after operands, and the environment
// variables of flags hold as well.
func (a *app) runMountHelper(ctx context.Context, args []string) error {
	var o mountOptions
	cmd := newMountCommand(a, &o)
	a.addGlobalFlags(cmd) // for their defaults and environment variables
	if err := bindEnv(cmd); err != nil {
		return err
	}
	fake, err := parseHelperArgs(args, &o, &a.global)
	if err != nil {
		return err
	}
	if err := a.checkGlobals(); err != nil {
		return err
	}
	if fake {
		return nil
	}
	return a.runMount(ctx, o)
}

// parseHelperArgs reads the arguments of a mount helper, mount(8). fake means
// that nothing is to be mounted.
func parseHelperArgs(args []string, o *mountOptions, g *globalOptions) (fake bool, err error) {
	const form = "usage: mount.kmsfs STORE MOUNTPOINT [-sfnv] [-o OPTIONS]"
	var names, lists []string
	for i := 0; i < len(args); i++ {
		arg := args[i]
		switch {
		case len(arg) < 2 || arg[0] != '-':
			names = append(names, arg)
		case strings.HasPrefix(arg, "-o"), strings.HasPrefix(arg, "-t"), strings.HasPrefix(arg, "-N"):
			value := arg[2:]
			if value == "" {
				if i++; i == len(args) {
					return false, usage(arg+" needs a value", form)
				}
				value = args[i]
			}
			if arg[1] == 'o' {
				lists = append(lists, value)
			}
		case strings.Trim(arg[1:], "sfnv") == "":
			fake = fake || strings.Contains(arg, "f")
		default:
			return false, usage(fmt.Sprintf("unknown option %s", arg), form)
		}
	}
	if len(names) != 2 {
		return false, usage(fmt.Sprintf("%d operands, not 2", len(names)), form)
	}
	o.store, o.mountpoint = names[0], names[1]
	return fake, o.apply(g, strings.Join(lists, ","))
}
