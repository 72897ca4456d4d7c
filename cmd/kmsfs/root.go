package main

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"github.com/spf13/cobra"
)

// globalOptions are the flags that every command has.
type globalOptions struct {
	keyring        string
	knownStores    string
	passphraseFile string
	passphraseFD   int
	region         string
	profile        string
	endpointURL    string
	pkcs11Module   string
	pkcs11PINFile  string
	kmsRate        float64
	kmsConcurrency int
	logFormat      string
	logLevel       string
}

func (a *app) log() *slog.Logger { return newLogger(a.stderr, a.global.logFormat, a.global.logLevel) }

// newRootCommand builds the whole command tree. It has no state outside a.
func newRootCommand(a *app) *cobra.Command {
	root := &cobra.Command{
		Use:   "kmsfs",
		Short: "Mount directories whose files are encrypted under AWS KMS or an embedded keyring",
		Long: `kmsfs mounts a directory in which every file is encrypted before it reaches the
disk. Each file has a data key of its own, which AWS KMS or an embedded keyring
wraps; a directory's class decides which key.`,
		Example: `  kmsfs init ~/store             # make a store under an embedded key
  kmsfs mount ~/store ~/plain    # returns when the mount is usable
  kmsfs umount ~/plain`,
		SilenceErrors:     true,
		SilenceUsage:      true,
		DisableAutoGenTag: true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { return a.prepare(cmd) },
	}
	root.SetIn(a.stdin)
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usage(err.Error(), fmt.Sprintf("run %s --help", cmd.CommandPath()))
	})
	a.addGlobalFlags(root)
	root.AddCommand(
		newInitCommand(a), newMountCommand(a, &mountOptions{}), newDaemonCommand(a), newUmountCommand(a),
		newStatusCommand(a), newHealthCommand(a), newInfoCommand(a), newLsCommand(a), newCatCommand(a),
		newPolicyCommand(a), newClassifyCommand(a), newKeyringCommand(a),
		newKnownStoresCommand(a), newFsckCommand(a), newSalvageCommand(a), newRekeyCommand(a), newRewrapCommand(a), newKeysCommand(a), newReclassifyCommand(a), newAuditCommand(a), newDoctorCommand(a), newVersionCommand(a), newDocsCommand(a),
	)
	makeGroup(root)
	documentEnv(root)
	return root
}

func (a *app) addGlobalFlags(root *cobra.Command) {
	g, f := &a.global, root.PersistentFlags()
	f.StringVar(&g.keyring, "keyring", "", "keyring `FILE` (default $XDG_CONFIG_HOME/kmsfs/keyring.json)")
	f.StringVar(&g.knownStores, "known-stores", "", "`FILE` of the stores and keys this machine trusts (default beside the keyring)")
	f.StringVar(&g.passphraseFile, "passphrase-file", "", "`FILE` whose first line is the keyring's passphrase")
	f.IntVar(&g.passphraseFD, "passphrase-fd", -1, "read the keyring's passphrase from this open descriptor `N`")
	f.StringVar(&g.region, "region", "", "AWS `REGION` (default: the AWS configuration's)")
	f.StringVar(&g.profile, "profile", "", "AWS configuration `PROFILE`")
	f.StringVar(&g.endpointURL, "endpoint-url", "", "AWS KMS endpoint `URL`")
	f.StringVar(&g.pkcs11Module, "pkcs11-module", "", "PKCS#11 module `FILE`, the vendor's library, for pkcs11: keys")
	f.StringVar(&g.pkcs11PINFile, "pkcs11-pin-file", "", "`FILE` whose first line is the PKCS#11 token's user PIN")
	f.Float64Var(&g.kmsRate, "kms-rate", 0, "calls per second to a key service, `N`: a share of the account's quota (default: no limit but what its throttling teaches)")
	f.IntVar(&g.kmsConcurrency, "kms-concurrency", 0, "calls at a time to a key service, `N` (default 64)")
	f.StringVar(&g.logFormat, "log-format", "text", "log `FORMAT`: text or json")
	f.StringVar(&g.logLevel, "log-level", "", "log `LEVEL`: debug, info, warn or error (default: info in a mount, else warn)")
}

// prepare runs before every command.
func (a *app) prepare(cmd *cobra.Command) error {
	if err := bindEnv(cmd); err != nil {
		return err
	}
	return a.checkGlobals()
}

func (a *app) checkGlobals() error {
	if f := a.global.logFormat; f != "text" && f != "json" {
		return usage(fmt.Sprintf("--log-format %q is neither text nor json", f), "give --log-format text or json")
	}
	if _, err := parseLevel(a.global.logLevel); err != nil {
		return usage(fmt.Sprintf("--log-level %q is no level", a.global.logLevel), "give debug, info, warn or error")
	}
	if a.global.kmsRate < 0 || a.global.kmsConcurrency < 0 {
		return usage("--kms-rate and --kms-concurrency must not be negative", "leave them out for the defaults")
	}
	if a.global.passphraseFile != "" && a.global.passphraseFD >= 0 {
		return usage("--passphrase-file and --passphrase-fd exclude each other", "give one of them")
	}
	return nil
}

// makeGroup makes cmd, which only holds subcommands, print its help when it is
// called alone, and refuse unknown subcommands as a usage error.
func makeGroup(cmd *cobra.Command) {
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return nil
		}
		h := fmt.Sprintf("run %s --help for the list", cmd.CommandPath())
		if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
			h = "did you mean " + strings.Join(near, " or ") + "?"
		}
		return usage(fmt.Sprintf("%s has no command %q", cmd.CommandPath(), args[0]), h)
	}
	cmd.SuggestionsMinimumDistance = 2
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
}

// operands returns the argument check of a command that takes the named
// operands; a name in brackets may be left out, one with "..." repeats.
func operands(names ...string) cobra.PositionalArgs {
	least, most := 0, len(names)
	for _, n := range names {
		if !strings.HasPrefix(n, "[") {
			least++
		}
		if strings.Contains(n, "...") {
			most = 1 << 20
		}
	}
	return func(cmd *cobra.Command, args []string) error {
		h := "usage: " + cmd.CommandPath() + " " + strings.Join(names, " ")
		switch {
		case len(args) < least:
			return usage(fmt.Sprintf("%s: %s is missing", cmd.CommandPath(), names[len(args)]), h)
		case len(args) > most:
			return usage(fmt.Sprintf("%s: %q is too much", cmd.CommandPath(), args[most]), h)
		}
		for _, arg := range args {
			if arg == "" {
				return usage(cmd.CommandPath()+": an argument is empty", h)
			}
		}
		return nil
	}
}

// exclusive refuses two flags that were both given, in whichever way.
func exclusive(cmd *cobra.Command, one, other string) error {
	if cmd.Flags().Changed(one) && cmd.Flags().Changed(other) {
		return usage(fmt.Sprintf("--%s and --%s exclude each other", one, other), "give one of them")
	}
	return nil
}

var errLevel = errors.New("no such log level")

// parseLevel reads --log-level; "" is 0 with no error.
func parseLevel(s string) (slog.Level, error) {
	switch s {
	case "", "info":
		return slog.LevelInfo, nil
	case "debug":
		return slog.LevelDebug, nil
	case "warn":
		return slog.LevelWarn, nil
	case "error":
		return slog.LevelError, nil
	}
	return 0, errLevel
}
