package main

import (
	"context"

	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// absent stands in for a key service that is not here: its keys cannot be had,
// and everything under other keys works.
type absent struct{ hint string }

var _ keywrap.Checker = absent{}

func (a absent) fail(op, key string) error {
	return &keywrap.CallError{Op: op, Key: key, Hint: a.hint, Err: keywrap.ErrNotFound}
}

func (a absent) GenerateDataKey(_ context.Context, key string, _ keywrap.Context) (keywrap.DataKey, error) {
	return keywrap.DataKey{}, a.fail(keywrap.OpGenerate, key)
}

func (a absent) Encrypt(_ context.Context, key string, _ keywrap.Context, _ *keymem.Key) (keywrap.Wrapped, error) {
	return keywrap.Wrapped{}, a.fail(keywrap.OpEncrypt, key)
}

func (a absent) Decrypt(_ context.Context, w keywrap.Wrapped, _ keywrap.Context) (*keymem.Key, error) {
	return nil, a.fail(keywrap.OpDecrypt, w.Key)
}

func (a absent) ReEncrypt(_ context.Context, w keywrap.Wrapped, _ keywrap.Context, _ string, _ keywrap.Context) (keywrap.Wrapped, error) {
	return keywrap.Wrapped{}, a.fail(keywrap.OpReEncrypt, w.Key)
}

func (a absent) Describe(_ context.Context, key string) (keywrap.Description, error) {
	return keywrap.Description{}, a.fail(keywrap.OpDescribe, key)
}

func (a absent) Check(_ context.Context, c keywrap.Check) error { return a.fail(c.Op, c.KeyURI()) }
