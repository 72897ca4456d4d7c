package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"os"

	"github.com/spf13/cobra"

	"github.com/kmsfs/kmsfs/integration/kmsd/kmsserver"
)

type serveOptions struct {
	kmsserver.Options
	config, portFile, account, region string
}

func newServeCommand() *cobra.Command {
	var o serveOptions
	cmd := &cobra.Command{
		Use:   "kmsd",
		Short: "An AWS KMS for tests, on loopback",
		Long: `kmsd serves the AWS KMS protocol on loopback until it gets SIGINT or SIGTERM.
It is a test tool: keys lie in memory, and in the state file, unprotected.

Without --config there is one principal, an administrator; "kmsd env" prints
its environment. The configuration file is JSON:

  {
    "account": "111122223333", "region": "us-east-1",
    "principals": [{"access_key_id": "AKIA…", "secret_access_key": "…",
                    "arn": "arn:aws:iam::111122223333:user/alice", "policy": {…}}],
    "keys": [{"alias": "alias/phi", "policy": {…}, "multi_region": true}],
    "faults": {"latency_ms": 20}
  }

The admin API (/admin/…, see "kmsd ctl --help") is on the endpoint and on a
listener of its own, which answers during outages too.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runServe(cmd.Context(), o, cmd.OutOrStdout())
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Listen, "listen", "127.0.0.1:0", "endpoint address, on loopback")
	f.StringVar(&o.AdminListen, "admin-listen", "127.0.0.1:0", "address of the admin API's own listener, on loopback")
	f.StringVar(&o.portFile, "port-file", "", "write the endpoint's port to `FILE` once it accepts connections")
	f.StringVar(&o.account, "account", "", "AWS account (default "+kmsserver.DefaultAccount+")")
	f.StringVar(&o.region, "region", "", "default Region (default "+kmsserver.DefaultRegion+")")
	f.StringVar(&o.config, "config", "", "read principals, keys and faults from `FILE`")
	f.StringVar(&o.LogFile, "log", "", "append one JSON line for each call to `FILE`")
	f.StringVar(&o.StateFile, "state", "", "keep keys, aliases and principals in `FILE` across restarts")
	return cmd
}

func runServe(ctx context.Context, o serveOptions, stdout io.Writer) error {
	if o.config != "" {
		text, err := os.ReadFile(o.config)
		if err != nil {
			return err
		}
		dec := json.NewDecoder(bytes.NewReader(text))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&o.Options); err != nil {
			return fmt.Errorf("%s: %w", o.config, err)
		}
	}
	if o.account != "" {
		o.Account = o.account
	}
	if o.region != "" {
		o.Region = o.region
	}
	s, err := kmsserver.Start(ctx, o.Options)
	if err != nil {
		return err
	}
	defer s.Close()
	if o.portFile != "" {
		if err := writePort(o.portFile, s.URL()); err != nil {
			return err
		}
	}
	fmt.Fprintf(stdout, "kmsd: ready url=%s admin=%s region=%s account=%s\n", s.URL(), s.AdminURL(), s.Region(), s.Account())
	<-ctx.Done()
	return s.Close()
}

// writePort makes the file appear with its contents, so that who waits for it
// never reads half of it.
func writePort(path, endpoint string) error {
	u, err := url.Parse(endpoint)
	if err != nil {
		return err
	}
	if err := os.WriteFile(path+".tmp", []byte(u.Port()+"\n"), 0o644); err != nil {
		return err
	}
	return os.Rename(path+".tmp", path)
}
