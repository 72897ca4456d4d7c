package main

import (
	"os"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

type docsOptions struct {
	dir  string
	date string
}

func newDocsCommand(a *app) *cobra.Command {
	var o docsOptions
	cmd := &cobra.Command{
		Use:     "docs DIR",
		Short:   "Write the man pages, one for each command, into DIR",
		Hidden:  true,
		Example: "  kmsfs docs --date 2026-01-31 man/",
		Args:    operands("DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.dir = args[0]
			return a.runDocs(cmd.Root(), o)
		},
	}
	cmd.Flags().StringVar(&o.date, "date", "", "`DATE` of the pages, YYYY-MM-DD, for builds that can be repeated (default today)")
	return cmd
}

func (a *app) runDocs(root *cobra.Command, o docsOptions) error {
	date := time.Now()
	if o.date != "" {
		var err error
		if date, err = time.Parse(time.DateOnly, o.date); err != nil {
			return usage("--date "+o.date+" is no date", "write it as 2026-01-31")
		}
	}
	if err := os.MkdirAll(o.dir, 0o755); err != nil {
		return err
	}
	return doc.GenManTree(root, &doc.GenManHeader{
		Title: "KMSFS", Section: "1", Date: &date, Source: "kmsfs " + currentVersion().Version, Manual: "kmsfs manual",
	}, o.dir)
}
