package main

import (
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/kmsfs/kmsfs/crypto/envelope"
)

// version is set by release builds: -ldflags "-X main.version=v1.2.3".
var version string

type versionOptions struct{ json bool }

// buildVersion is what --json prints.
type buildVersion struct {
	Version  string `json:"version"`
	Revision string `json:"revision,omitempty"`
	Modified bool   `json:"modified,omitempty"` // built from a changed work tree
	Format   int    `json:"format"`             // newest store format it reads and writes
	Go       string `json:"go"`
	Platform string `json:"platform"`
	PKCS11   bool   `json:"pkcs11"` // can use pkcs11: keys
}

func newVersionCommand(a *app) *cobra.Command {
	var o versionOptions
	cmd := &cobra.Command{
		Use:     "version",
		Short:   "Print the version and the store format",
		Example: "  kmsfs version --json",
		Args:    operands(),
		RunE:    func(*cobra.Command, []string) error { return a.runVersion(o) },
	}
	cmd.Flags().BoolVar(&o.json, "json", false, "print JSON")
	return cmd
}

func (a *app) runVersion(o versionOptions) error {
	v := currentVersion()
	if o.json {
		return a.printJSON(v)
	}
	a.printf("kmsfs %s, store format %d, %s, %s\n", v.Version, v.Format, v.Go, v.Platform)
	return nil
}

func currentVersion() buildVersion {
	v := buildVersion{Version: version, Format: envelope.FormatVersion, Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH, PKCS11: hasPKCS11}
	info, ok := debug.ReadBuildInfo()
	if ok {
		for _, s := range info.Settings {
			switch s.Key {
			case "vcs.revision":
				v.Revision = s.Value
			case "vcs.modified":
				v.Modified = s.Value == "true"
			}
		}
		if v.Version == "" {
			v.Version = info.Main.Version
		}
	}
	if v.Version == "" || v.Version == "(devel)" {
		v.Version = "development"
	}
	return v
}
