//go:build !pkcs11 || !cgo

package main

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// TestBuiltWithoutPKCS11: the static program says so, and how to get the other
// one; classes under other keys work.
func TestBuiltWithoutPKCS11(t *testing.T) {
	const key = "pkcs11:token=t;object=k"
	log := slog.New(slog.DiscardHandler)
	_, err := openProviders(context.Background(), providerConfig{}, []string{key}, nil, log)
	code, text, hint := explain(err)
	if code == exitOK || !strings.Contains(text, "built without PKCS#11") || !strings.Contains(hint, "make build-pkcs11") {
		t.Errorf("exit %d, %q, hint %q", code, text, hint)
	}
	if currentVersion().PKCS11 {
		t.Error("kmsfs version says that this program has PKCS#11")
	}
	p, err := openProviders(context.Background(), providerConfig{Region: "eu-west-1"}, []string{key, "alias/other"}, nil, log)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	_, err = p.Describe(context.Background(), key)
	var ce *keywrap.CallError
	if !errors.Is(err, keywrap.ErrNotFound) || !errors.As(err, &ce) || !strings.Contains(ce.Hint, "make build-pkcs11") {
		t.Errorf("Describe: %v", err)
	}
}
