package keyring_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/crypto/keywrap/keyring"
)

func Example() {
	dir, err := os.MkdirTemp("", "keyring")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "keyring.json")

	k, err := keyring.Create(path, []byte("a passphrase"))
	if err != nil {
		panic(err)
	}
	defer k.Close()
	if err := k.CreateKey("general"); err != nil {
		panic(err)
	}
	ec := keywrap.Context{Store: "00", Class: "general", Purpose: keywrap.PurposeData, ID: "01"}
	dk, err := k.GenerateDataKey(context.Background(), "keyring:general", ec)
	if err != nil {
		panic(err)
	}
	defer dk.Plain.Wipe()
	fmt.Println(dk.Wrapped.Key, len(dk.Wrapped.Blob), dk.Plain)

	ec.ID = "02"
	_, err = k.Decrypt(context.Background(), dk.Wrapped, ec)
	var failed *keywrap.CallError
	if errors.As(err, &failed) {
		fmt.Println(failed.Op, failed.Key, failed.Err)
	}
	// Output:
	// keyring:general 66 [redacted]
	// Decrypt keyring:general keywrap: wrapped key does not open under this key and encryption context
}
