package main

import (
	"bytes"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// eachCommand calls f for every command that users see, depth first.
func eachCommand(cmd *cobra.Command, f func(*cobra.Command)) {
	f(cmd)
	for _, sub := range cmd.Commands() {
		if sub.Name() != "completion" && sub.Name() != "help" && sub.Name() != "daemon" {
			eachCommand(sub, f)
		}
	}
}

func TestEveryCommandHasHelp(t *testing.T) {
	eachCommand(newRootCommand(&app{}), func(cmd *cobra.Command) {
		if cmd.Short == "" || cmd.Example == "" {
			t.Errorf("%s: no description or no example", cmd.CommandPath())
		}
		if strings.HasSuffix(cmd.Short, ".") {
			t.Errorf("%s: the short description ends with a period", cmd.CommandPath())
		}
	})
}

// TestEverythingIsDocumented looks for every command, flag and environment
// variable in docs/cli.md, and for every command in docs/cli.md in the program.
func TestEverythingIsDocumented(t *testing.T) {
	b, err := os.ReadFile("../../docs/cli.md")
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	kebab := regexp.MustCompile(`^[a-z][a-z0-9]*(-[a-z]+)*$`)
	root := newRootCommand(&app{})
	eachCommand(root, func(cmd *cobra.Command) {
		name := strings.TrimPrefix(cmd.CommandPath(), "kmsfs ")
		if name != "kmsfs" && !strings.Contains(text, cmd.CommandPath()) && !strings.Contains(text, "`"+cmd.Name()+" ") {
			t.Errorf("docs/cli.md does not have the command %s", cmd.CommandPath())
		}
		cmd.LocalFlags().VisitAll(func(f *pflag.Flag) {
			if f.Name == "help" {
				return
			}
			if !strings.Contains(text, "--"+f.Name) {
				t.Errorf("docs/cli.md does not have %s --%s", cmd.CommandPath(), f.Name)
			}
			if !kebab.MatchString(f.Name) {
				t.Errorf("--%s is not in kebab case", f.Name)
			}
			documented := strings.Contains(f.Usage, "["+envName(f.Name)+"]")
			if documented == slices.Contains(noEnvFlags, f.Name) {
				t.Errorf("%s --%s: help names %s: %v", cmd.CommandPath(), f.Name, envName(f.Name), documented)
			}
		})
	})
	root.PersistentFlags().VisitAll(func(f *pflag.Flag) {
		if !strings.Contains(text, "`"+envName(f.Name)+"`") {
			t.Errorf("docs/cli.md does not have %s", envName(f.Name))
		}
	})
	for _, m := range regexp.MustCompile("`kmsfs ([a-z-]+)( [a-z-]+)?").FindAllStringSubmatch(text, -1) {
		args := strings.Fields(m[1] + m[2])
		if args[0] == "completion" {
			continue
		}
		if cmd, rest, err := root.Find(args); err != nil || cmd == root || cmd.HasSubCommands() && len(rest) > 0 {
			t.Errorf("docs/cli.md has a command that does not exist: %s", strings.Join(args, " "))
		}
	}
}

func TestEnvironment(t *testing.T) {
	for name, value := range map[string]string{
		"KMSFS_KEYRING": "/env/keyring", "KMSFS_REGION": "eu-west-1", "KMSFS_PASSPHRASE_FD": "7", "KMSFS_KEY": "alias/a  keyring:b", "KMSFS_POLICY": "",
	} {
		t.Setenv(name, value)
	}
	a := &app{}
	root := newRootCommand(a)
	cmd, _, err := root.Find([]string{"init"})
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.ParseFlags([]string{"--region", "us-east-1"}); err != nil {
		t.Fatal(err)
	}
	if err := bindEnv(cmd); err != nil {
		t.Fatal(err)
	}
	if a.global.keyring != "/env/keyring" || a.global.passphraseFD != 7 {
		t.Errorf("the environment does not count: %+v", a.global)
	}
	if a.global.region != "us-east-1" {
		t.Errorf("region %q: the command line does not win", a.global.region)
	}
	keys, err := cmd.Flags().GetStringArray("key")
	if err != nil || !slices.Equal(keys, []string{"alias/a", "keyring:b"}) {
		t.Errorf("keys %q, %v", keys, err)
	}
	if cmd.Flags().Changed("policy") {
		t.Error("an empty variable counts")
	}
}

func TestBadEnvironment(t *testing.T) {
	for _, tc := range []struct{ name, value string }{{"KMSFS_PASSPHRASE_FD", "x"}, {"KMSFS_PASSPHRASE", "hunter2hunter2"}, {"KMSFS_LOG_FORMAT", "xml"}, {"KMSFS_JSON", "maybe"}} {
		t.Run(tc.name, func(t *testing.T) {
			t.Setenv(tc.name, tc.value)
			var out, errOut bytes.Buffer
			if code := run(t.Context(), []string{"kmsfs", "version"}, strings.NewReader(""), &out, &errOut); code != exitUsage {
				t.Errorf("exit code %d, want %d: %s", code, exitUsage, errOut.String())
			}
			if strings.Contains(errOut.String(), "hunter2") {
				t.Errorf("the passphrase shows: %s", errOut.String())
			}
		})
	}
}
