package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"
)

func newKnownStoresCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "known-stores",
		Short: "Show and change which stores and keys this machine trusts",
		Long: `Whoever can write a store can put other keys into its record. Therefore this
machine remembers which keys a store may use, as ssh remembers host keys: from
kmsfs init on, or from the first time it was accepted (a question, or --trust).
A store that names other keys is refused until kmsfs known-stores accept.`,
		Example: `  kmsfs known-stores list
  kmsfs known-stores accept ~/store`,
	}
	makeGroup(cmd)
	cmd.AddCommand(newKnownListCommand(a), newKnownAcceptCommand(a), newKnownRemoveCommand(a))
	return cmd
}

type knownListOptions struct{ json bool }

func newKnownListCommand(a *app) *cobra.Command {
	var o knownListOptions
	cmd := &cobra.Command{
		Use:     "list",
		Short:   "List the known stores with their keys",
		Example: "  kmsfs known-stores list --json",
		Args:    operands(),
		RunE:    func(*cobra.Command, []string) error { return a.runKnownList(o) },
	}
	cmd.Flags().BoolVar(&o.json, "json", false, "print JSON")
	return cmd
}

func (a *app) runKnownList(o knownListOptions) error {
	path, err := a.global.knownStoresPath()
	if err != nil {
		return err
	}
	k, err := loadKnownStores(path)
	if err != nil {
		return err
	}
	if o.json {
		return a.printJSON(map[string]any{"path": path, "stores": append([]knownStore{}, k.stores...)})
	}
	for _, s := range k.stores {
		where := s.Path
		if where == "" {
			where = "(another store is at its place)"
		}
		a.printf("%s  %s  %s\n", s.ID, day(s.Time), printable(where))
		for _, line := range classLines(s.Keys) {
			a.printf("  %s\n", line)
		}
	}
	return nil
}

type knownAcceptOptions struct {
	store string
	yes   bool
}

func newKnownAcceptCommand(a *app) *cobra.Command {
	var o knownAcceptOptions
	cmd := &cobra.Command{
		Use:   "accept STORE",
		Short: "Trust the keys that a store names now",
		Long: `Trust the keys that a store names now, although they changed or another store
was at its place. Compare them with what you expect first: whoever can write the
store can have put them there, and new files will be encrypted under them. Asks
on a terminal; otherwise --yes is needed.`,
		Example: "  kmsfs known-stores accept ~/store",
		Args:    operands("STORE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.store = args[0]
			return a.runKnownAccept(cmd.Context(), o)
		},
	}
	cmd.Flags().BoolVar(&o.yes, "yes", false, "do not ask")
	return cmd
}

func (a *app) runKnownAccept(ctx context.Context, o knownAcceptOptions) error {
	_, facts, err := inspectStore(o.store)
	if err != nil {
		return err
	}
	path, err := a.global.knownStoresPath()
	if err != nil {
		return err
	}
	k, err := loadKnownStores(path)
	if err != nil {
		return err
	}
	v, known := judge(k, facts)
	if v == storeKnown && known.Path == facts.path {
		a.printf("%s is known with these keys already\n", printable(facts.path))
		return nil
	}
	a.describeStore(facts)
	switch v {
	case storeChanged:
		a.note("trusted until now: %s", keyList(known.Keys))
	case storeSwapped:
		a.note("at this place until now: store %s %s", known.ID, keyList(known.Keys))
	}
	if !o.yes {
		if !a.interactive() {
			return fail(errNotTrusted, "there is no terminal to ask on", "check the keys above, then give --yes")
		}
		yes, err := a.confirm(ctx, "Trust this store with these keys?")
		if err != nil {
			return err
		}
		if !yes {
			return fail(errNotTrusted, "store "+facts.path+" was not trusted", "nothing was changed")
		}
	}
	if err := pinStore(path, facts, true); err != nil {
		return err
	}
	a.printf("%s is trusted with these keys\n", printable(facts.path))
	return nil
}

type knownRemoveOptions struct{ id string }

func newKnownRemoveCommand(a *app) *cobra.Command {
	var o knownRemoveOptions
	return &cobra.Command{
		Use:     "remove ID",
		Short:   "Forget a store; it is new to this machine afterwards",
		Example: "  kmsfs known-stores remove 0123456789abcdef0123456789abcdef",
		Args:    operands("ID"),
		RunE: func(_ *cobra.Command, args []string) error {
			o.id = args[0]
			return a.runKnownRemove(o)
		},
	}
}

func (a *app) runKnownRemove(o knownRemoveOptions) error {
	path, err := a.global.knownStoresPath()
	if err != nil {
		return err
	}
	err = updateKnownStores(path, func(k *knownStores) (bool, error) {
		if !k.remove(o.id) {
			return false, usage(fmt.Sprintf("no store %q is known", o.id), "kmsfs known-stores list shows the ids")
		}
		return true, nil
	})
	if err != nil {
		return err
	}
	a.printf("store %s is forgotten\n", o.id)
	return nil
}
