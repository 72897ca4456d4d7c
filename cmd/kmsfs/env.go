package main

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

const envPrefix = "KMSFS_"

// noEnvFlags have no environment variable. "passphrase" would read
// KMSFS_PASSPHRASE, which people would take for the passphrase itself; "policy"
// is a file to one command and a role to another.
var noEnvFlags = []string{"help", "passphrase", "policy"}

// envName is the environment variable of a flag: --known-stores is
// KMSFS_KNOWN_STORES.
func envName(flag string) string {
	return envPrefix + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// bindEnv sets every flag of cmd that the command line left out from its
// environment variable. The command line wins.
func bindEnv(cmd *cobra.Command) error {
	if os.Getenv("KMSFS_PASSPHRASE") != "" {
		// Any process of the same user can read the environment, children
		// inherit it, and crash reports record it.
		return usage("KMSFS_PASSPHRASE is set, but a passphrase is never read from the environment",
			"unset it, and give --passphrase-file FILE (KMSFS_PASSPHRASE_FILE) or --passphrase-fd N")
	}
	var failed error
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if failed == nil && !f.Changed && !slices.Contains(noEnvFlags, f.Name) {
			failed = setFromEnv(cmd.Flags(), f)
		}
	})
	return failed
}

func setFromEnv(flags *pflag.FlagSet, f *pflag.Flag) error {
	name := envName(f.Name)
	value, set := os.LookupEnv(name)
	if !set || value == "" {
		return nil
	}
	values := []string{value}
	if f.Value.Type() == "stringArray" {
		values = strings.Fields(value)
	}
	for _, v := range values {
		if err := flags.Set(f.Name, v); err != nil {
			return usage(fmt.Sprintf("environment variable %s: %q is no value for --%s", name, v, f.Name),
				"correct or unset "+name)
		}
	}
	return nil
}

// documentEnv adds the environment variable's name to the help of every flag.
func documentEnv(cmd *cobra.Command) {
	add := func(f *pflag.Flag) {
		if !slices.Contains(noEnvFlags, f.Name) && !strings.Contains(f.Usage, envPrefix) {
			f.Usage += " [" + envName(f.Name) + "]"
		}
	}
	cmd.PersistentFlags().VisitAll(add)
	cmd.Flags().VisitAll(add)
	for _, sub := range cmd.Commands() {
		documentEnv(sub)
	}
}
