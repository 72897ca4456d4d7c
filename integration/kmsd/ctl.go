package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsfs/kmsfs/integration/kmsd/kmsserver"
)

// admin calls the admin API of a running server.
type admin struct {
	url string
	out io.Writer
}

func (a *admin) do(ctx context.Context, method, path string, body []byte) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, strings.TrimRight(a.url, "/")+"/admin/"+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, bytes.TrimSpace(text))
	}
	var indented bytes.Buffer
	if err := json.Indent(&indented, bytes.TrimSpace(text), "", "  "); err != nil {
		return err
	}
	if indented.String() != "{}" {
		fmt.Fprintln(a.out, indented.String())
	}
	return nil
}

// marshal is for values of this program's own types, which always have a JSON
// form.
func marshal(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}

func newCtlCommand() *cobra.Command {
	a := &admin{}
	cmd := group("ctl", "Drive a running kmsd: faults, calls, principals, keys, clock")
	cmd.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error {
		a.out = cmd.OutOrStdout()
		if a.url == "" && cmd.HasParent() && !cmd.HasSubCommands() {
			return fmt.Errorf("%w: ctl needs --url, or KMSD_URL", errUsage)
		}
		return nil
	}
	cmd.PersistentFlags().StringVar(&a.url, "url", os.Getenv("KMSD_URL"), "`URL` of the server (KMSD_URL); during an outage \"refuse\" its admin URL")
	cmd.AddCommand(a.status(), a.calls(), a.fault(), a.principal(), a.key(), a.clock())
	return cmd
}

// group makes a command that has only subcommands.
func group(use, short string) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: short,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return fmt.Errorf("%w: unknown command %q for %q", errUsage, args[0], cmd.CommandPath())
			}
			return cmd.Help()
		},
	}
}

// call makes a subcommand that sends one request; body may be nil.
func (a *admin) call(use, short, method string, n int, path func([]string) string, body func([]string) []byte) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: short, Args: cobra.ExactArgs(n),
		RunE: func(cmd *cobra.Command, args []string) error {
			var b []byte
			if body != nil {
				b = body(args)
			}
			return a.do(cmd.Context(), method, path(args), b)
		},
	}
}

func fixed(path string) func([]string) string { return func([]string) string { return path } }

func first(args []string) []byte { return []byte(args[0]) }

func (a *admin) status() *cobra.Command {
	return a.call("status", "Show addresses and counts", http.MethodGet, 0, fixed("status"), nil)
}

func (a *admin) calls() *cobra.Command {
	cmd := group("calls", "The call log")
	cmd.AddCommand(
		a.call("list", "Show the calls since the last reset", http.MethodGet, 0, fixed("calls"), nil),
		a.call("count", "Count the calls by operation", http.MethodGet, 0, fixed("calls/count"), nil),
		a.call("reset", "Forget the calls", http.MethodDelete, 0, fixed("calls"), nil),
	)
	return cmd
}

func (a *admin) fault() *cobra.Command {
	cmd := group("fault", "Misbehaviour")
	cmd.Long = `Faults as a whole:
  {"latency_ms": 20, "jitter_ms": 5, "rate_limit": 100, "burst": 10,
   "outage": "refuse|reset|hang|internal|unavailable", "outage_ms": 5000, "rules": [FAULT…]}
rate_limit is a token bucket of calls per second, burst its size; an outage with
outage_ms ends by itself.
One FAULT: the calls that match all filters given fail with the error.
  {"operations": ["Decrypt"], "key": "alias/phi", "principal": "AKIA…", "context": {"kmsfs:class": "phi"},
   "skip": 2, "times": 1, "error": "ThrottlingException", "message": "…", "status": 400, "latency_ms": 50}
Errors "kmsd:hang" and "kmsd:reset" never answer and reset the connection.`
	cmd.AddCommand(
		a.call("list", "Show the faults in force", http.MethodGet, 0, fixed("faults"), nil),
		a.call("set JSON", "Replace all faults", http.MethodPut, 1, fixed("faults"), first),
		a.call("add JSON", "Add one rule", http.MethodPost, 1, fixed("faults"), first),
		a.call("remove ID", "Remove one rule", http.MethodDelete, 1, func(args []string) string { return "faults/" + args[0] }, nil),
		a.call("clear", "End all faults", http.MethodDelete, 0, fixed("faults"), nil),
		a.call("outage MODE", "Replace all faults by an outage", http.MethodPut, 1, fixed("faults"), func(args []string) []byte {
			return marshal(kmsserver.Faults{Outage: kmsserver.Outage(args[0])})
		}),
	)
	return cmd
}

func (a *admin) principal() *cobra.Command {
	cmd := group("principal", "Callers")
	path := func(args []string) string { return "principals/" + args[0] + "/expired" }
	cmd.AddCommand(
		a.call("list", "Show the principals", http.MethodGet, 0, fixed("principals"), nil),
		a.call("add JSON", "Add or replace a principal", http.MethodPost, 1, fixed("principals"), first),
		a.call("expire ACCESS-KEY-ID", "Let its credentials expire", http.MethodPost, 1, path, func([]string) []byte { return []byte(`{"expired":true}`) }),
		a.call("renew ACCESS-KEY-ID", "Make its credentials valid again", http.MethodPost, 1, path, func([]string) []byte { return []byte(`{"expired":false}`) }),
	)
	return cmd
}

func (a *admin) key() *cobra.Command {
	cmd := group("key", "Keys")
	material := func(expired bool) func([]string) []byte {
		return func(args []string) []byte { return marshal(map[string]any{"key": args[0], "expired": expired}) }
	}
	cmd.AddCommand(
		a.call("create JSON", "Make a key and print its ARN", http.MethodPost, 1, fixed("keys"), first),
		a.call("policy KEY JSON", "Replace a key's policy", http.MethodPost, 2, fixed("keys/policy"), func(args []string) []byte {
			if !json.Valid([]byte(args[1])) {
				return []byte(args[1]) // the server says what is wrong
			}
			return marshal(map[string]any{"key": args[0], "policy": json.RawMessage(args[1])})
		}),
		a.call("expire-material KEY", "Let imported key material expire", http.MethodPost, 1, fixed("keys/material-expired"), material(true)),
		a.call("restore-material KEY", "Import the key material again", http.MethodPost, 1, fixed("keys/material-expired"), material(false)),
	)
	return cmd
}

func (a *admin) clock() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "advance DURATION",
		Short: "Move the server's clock forward, for example by 168h",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := time.ParseDuration(args[0])
			if err != nil {
				return err
			}
			return a.do(cmd.Context(), http.MethodPost, "clock", marshal(map[string]int64{"advance_s": int64(d / time.Second)}))
		},
	}
	return cmd
}

func newEnvCommand() *cobra.Command {
	var url, region string
	cmd := &cobra.Command{
		Use:   "env",
		Short: "Print the default principal's environment, for eval in a shell",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if url == "" {
				return fmt.Errorf("%w: env needs --url, or KMSD_URL", errUsage)
			}
			for _, pair := range kmsserver.Env(url, region, kmsserver.DefaultPrincipal()) {
				name, value, _ := strings.Cut(pair, "=")
				fmt.Fprintf(cmd.OutOrStdout(), "export %s='%s'\n", name, strings.ReplaceAll(value, "'", `'\''`))
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&url, "url", os.Getenv("KMSD_URL"), "`URL` of the server's endpoint (KMSD_URL)")
	cmd.Flags().StringVar(&region, "region", kmsserver.DefaultRegion, "Region")
	return cmd
}
