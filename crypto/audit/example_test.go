package audit_test

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/kmsfs/kmsfs/crypto/audit"
)

func Example() {
	dir, err := os.MkdirTemp("", "audit")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "audit.log")
	log, err := audit.Open(path, audit.Options{Required: true, Mount: "/mnt/plain"})
	if err != nil {
		panic(err)
	}
	if err := log.Write(audit.Event{Kind: audit.KindUse, Op: "open", Class: "phi", Key: "keyring:phi", Source: "call", Result: audit.OK}); err != nil {
		panic(err) // the key must not be used
	}
	if err := log.Close(); err != nil {
		panic(err)
	}
	report, err := audit.Verify(path)
	fmt.Println(report.Lines, report.OK(), err)
	// Output: 1 true <nil>
}
