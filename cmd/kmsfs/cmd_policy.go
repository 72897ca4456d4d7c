package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path"

	"github.com/spf13/cobra"

	"github.com/kmsfs/kmsfs/fs/classify"
	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

func newPolicyCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "policy",
		Short: "Show, check and change the policy of a store",
		Example: `  kmsfs policy show ~/store > policy.yaml
  kmsfs policy check --store ~/store policy.yaml
  kmsfs policy apply ~/store policy.yaml`,
	}
	makeGroup(cmd)
	cmd.AddCommand(newPolicyShowCommand(a), newPolicyCheckCommand(a), newPolicyApplyCommand(a))
	return cmd
}

type policyShowOptions struct {
	openOptions
	json bool
}

func newPolicyShowCommand(a *app) *cobra.Command {
	var o policyShowOptions
	cmd := &cobra.Command{
		Use:   "show STORE",
		Short: "Print the policy that is in a store",
		Long: `Print the policy that is in a store, as YAML that kmsfs policy apply takes. STORE
may be a mountpoint as well. It takes the key of one class: the rules are
encrypted, and the policy is verified.`,
		Example: "  kmsfs policy show ~/store > policy.yaml",
		Args:    operands("STORE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.store = args[0]
			return a.runPolicyShow(cmd.Context(), o)
		},
	}
	addTrustFlag(cmd, &o.trust)
	cmd.Flags().BoolVar(&o.json, "json", false, "print JSON, with the keys that aliases stand for")
	return cmd
}

// policyListing is what --json prints.
type policyListing struct {
	Store    string              `json:"store"`
	ID       string              `json:"id"`
	Verified bool                `json:"verified"`
	Policy   json.RawMessage     `json:"policy"`
	Keys     map[string][]string `json:"keys"`
}

func (a *app) runPolicyShow(ctx context.Context, o policyShowOptions) error {
	if m, err := findMount(o.store); err == nil {
		o.store = m.Source
	}
	info, path, err := a.verifiedInfo(ctx, o.openOptions)
	if err != nil {
		return err
	}
	if o.json {
		return a.printJSON(policyListing{path, info.ID.String(), info.Verified, info.Policy.Marshal(), info.Keys})
	}
	a.printf("%s", info.Policy.YAML())
	return nil
}

// verifiedInfo opens a store for a look at its verified record.
func (a *app) verifiedInfo(ctx context.Context, o openOptions) (*cryptfs.Info, string, error) {
	o.readOnly = true
	v, err := a.openStore(ctx, o)
	if err != nil {
		return nil, "", err
	}
	return v.Info(), v.Path(), v.Close()
}

type policyCheckOptions struct {
	openOptions
	file  string
	paths []string
	json  bool
}

func newPolicyCheckCommand(a *app) *cobra.Command {
	var o policyCheckOptions
	cmd := &cobra.Command{
		Use:   "check FILE [DIR...]",
		Short: "Check a policy file, and tell which class it gives to directories",
		Long: `Check a policy file. With directories (paths of the plaintext tree, from its
root) print each one's class. With --store print what would change in that
store, which takes the key of one of its classes, and refuse what it cannot take.`,
		Example: `  kmsfs policy check policy.yaml
  kmsfs policy check policy.yaml /patients/scans /tmp
  kmsfs policy check --store ~/store policy.yaml`,
		Args: operands("FILE", "[DIR...]"),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.file, o.paths = args[0], args[1:]
			return a.runPolicyCheck(cmd.Context(), o)
		},
	}
	cmd.Flags().StringVar(&o.store, "store", "", "compare with the policy in this `STORE`")
	addTrustFlag(cmd, &o.trust)
	cmd.Flags().BoolVar(&o.json, "json", false, "print JSON")
	return cmd
}

// policyVerdict is what --json prints.
type policyVerdict struct {
	Classes map[string]string `json:"classes"` // directory → class
	Changes []string          `json:"changes"` // against --store
}

func (a *app) runPolicyCheck(ctx context.Context, o policyCheckOptions) error {
	p, err := a.readPolicy(o.file)
	if err != nil {
		return err
	}
	v := policyVerdict{Classes: map[string]string{}, Changes: []string{}}
	for i, dir := range o.paths {
		o.paths[i] = path.Clean("/" + dir)
		v.Classes[o.paths[i]] = p.ClassOf(o.paths[i])
	}
	if o.store != "" {
		info, _, err := a.verifiedInfo(ctx, o.openOptions)
		if err != nil {
			return err
		}
		if v.Changes, err = classify.Compare(info.Policy, p); err != nil {
			return hint(err, "add another class for new files instead")
		}
	}
	if o.json {
		return a.printJSON(v)
	}
	for _, dir := range o.paths {
		a.printf("%s\t%s\n", v.Classes[dir], printable(dir))
	}
	for _, change := range v.Changes {
		a.printf("%s\n", change)
	}
	if len(o.paths) == 0 && o.store == "" {
		a.printf("%s: %d classes, %d rules, no mistake\n", o.file, len(p.Classes), len(p.Directories))
	}
	return nil
}

type policyApplyOptions struct {
	openOptions
	file string
	json bool
}

func newPolicyApplyCommand(a *app) *cobra.Command {
	var o policyApplyOptions
	cmd := &cobra.Command{
		Use:   "apply STORE FILE",
		Short: "Change the policy of a store that is not mounted",
		Long: `Change the policy of a store that is not mounted. New files follow it at once.
A directory whose class it changes stays readable, and refuses new files until
it is reclassified. Keys of the embedded keyring must exist. The new keys are
noted in this machine's known-stores file; every other machine refuses the
store until its user accepts them (kmsfs known-stores accept).`,
		Example: "  kmsfs policy apply ~/store policy.yaml",
		Args:    operands("STORE", "FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.store, o.file = args[0], args[1]
			return a.runPolicyApply(cmd.Context(), o)
		},
	}
	cmd.Flags().BoolVar(&o.json, "json", false, "print JSON")
	addTrustFlag(cmd, &o.trust)
	return cmd
}

func (a *app) runPolicyApply(ctx context.Context, o policyApplyOptions) error {
	p, err := a.readPolicy(o.file)
	if err != nil {
		return err
	}
	changes, err := a.changePolicy(ctx, o.openOptions, policyKeys(p), func(v *volume) ([]string, error) {
		return v.ApplyPolicy(ctx, p)
	})
	if err != nil {
		return err
	}
	if o.json {
		return a.printJSON(map[string]any{"changes": append([]string{}, changes...)})
	}
	for _, change := range changes {
		a.printf("%s\n", change)
	}
	if len(changes) == 0 {
		a.printf("nothing to change\n")
	}
	return nil
}

// changePolicy opens a store with the services for its own keys and more, lets
// change work on it, and pins the keys that the store has afterwards: the user
// of this machine has just decided on them.
func (a *app) changePolicy(ctx context.Context, o openOptions, more []string, change func(*volume) ([]string, error)) (changes []string, err error) {
	v, err := a.openStoreWith(ctx, o, more)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	if changes, err = change(v); err != nil {
		return changes, err
	}
	known, err := a.global.knownStoresPath()
	if err != nil {
		return changes, err
	}
	info := v.Info()
	facts := storeFacts{id: info.ID.String(), path: v.Path(), keys: info.Keys}
	if err := pinStore(known, facts, true); err != nil {
		return changes, hint(fmt.Errorf("the policy was changed, but its keys not noted as known: %w", err),
			"kmsfs known-stores accept "+shellQuote(facts.path))
	}
	return changes, nil
}
