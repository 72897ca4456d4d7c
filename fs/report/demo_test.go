package report

import (
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/kmsfs/kmsfs/crypto/audit"
)

var (
	madeAt = time.Date(2026, 11, 23, 9, 30, 0, 0, time.UTC)
	arn1   = "arn:aws:kms:us-east-1:111122223333:key/6f2b1c6e-2e0a-4c8d-9a40-0d1f6a7b8c9d"
	arn2   = "arn:aws:kms:us-west-2:111122223333:key/1a2b3c4d-5e6f-4a7b-8c9d-0e1f2a3b4c5d"
)

// activity is a month as a store has it: working days, nightly backups, one
// morning without permissions.
func activity(seed uint64) Activity {
	r := rand.New(rand.NewPCG(seed, 1))
	var c Collector
	programs := []string{"restic", "python3", "nginx", "smbd"}
	for h := range 30 * 24 {
		at := madeAt.Add(time.Duration(h-30*24) * time.Hour)
		n := 3 + r.IntN(10)
		if hour, day := at.Hour(), at.Weekday(); hour > 7 && hour < 18 && day != time.Sunday && day != time.Saturday {
			n += 60
		}
		for i := range n {
			e := audit.Event{Kind: audit.KindUse, Time: at.Add(time.Duration(i) * time.Second), Class: []string{"phi", "general", "pci"}[r.IntN(3)], Key: arn1, Op: "open",
				File: fmt.Sprintf("%032x", r.Uint64()), Source: "cache", Cached: true, Result: audit.OK,
				Caller: &audit.Caller{UID: 1000 + uint32(r.IntN(2)), Program: programs[r.IntN(4)]}}
			if i%3 == 0 {
				c.Add(&audit.Event{Kind: audit.KindCall, Time: e.Time, Class: e.Class, Key: arn1, Op: "Decrypt", Result: audit.OK})
				e.Source, e.Cached = "call", false
			}
			if h > 500 && h < 506 && i%4 == 0 {
				e.Result, e.Code, e.Detail, e.Cached, e.Request = "key-denied", "AccessDeniedException", "keywrap: access denied", false, fmt.Sprintf("%08x-aaaa-4bbb-8ccc-1234567890ab", h)
			}
			c.Add(&e)
		}
	}
	for i := range 3 {
		c.Add(&audit.Event{Kind: audit.KindIntegrity, Time: madeAt.Add(-time.Duration(i*7) * time.Hour), Class: "phi", Op: "read", File: fmt.Sprintf("%032x", 0xabc+i),
			Detail: "dare: chunk does not authenticate", Result: "integrity", Caller: &audit.Caller{UID: 1000, Program: "restic"}})
	}
	return c.Activity()
}

// demo is a page with something in every table.
func demo() *Data {
	day := 24 * time.Hour
	return &Data{
		StoreID: "5f3a9c0e8b7d4f21a6c3e5d79b8f0142", Store: "/srv/store", Made: madeAt, Version: "v1.2.0", Counted: true,
		Classes: []Class{
			{Name: "general", Keys: []string{"keyring:general"}, Names: "encrypted", DataKeys: "shared", Cache: 5 * time.Minute},
			{Name: "pci", Keys: []string{arn1}, Retired: []string{"keyring:old"}, Names: "encrypted", DataKeys: "per-file", Cache: time.Hour},
			{Name: "phi", Keys: []string{arn1, arn2}, Names: "encrypted", DataKeys: "per-file"},
		},
		Keys: []Key{
			{URI: arn1, State: "enabled", Created: madeAt.Add(-812 * day), Rotation: true, Rotated: madeAt.Add(-82 * day), LastUsed: madeAt.Add(-time.Minute), Uses: []Dependence{
				{Class: "pci", Files: 4300, Bytes: 5 << 30, OnlyFiles: 4300, OnlyBytes: 5 << 30},
				{Class: "phi", Files: 12040, Bytes: 1234567890123}},
				Materials: []Material{{"a3f1c2d4e5b6978812345678", 16340, 1239936618123}}, NameKeys: []string{"pci", "phi"}, StoreKeys: []string{"pci", "phi"}},
			{URI: arn2, State: "enabled", Created: madeAt.Add(-400 * day), Uses: []Dependence{{Class: "phi", Files: 12040, Bytes: 1234567890123}}},
			{URI: "keyring:general", State: "enabled", Created: madeAt.Add(-20 * day), LastUsed: madeAt.Add(-time.Hour), Uses: []Dependence{{Class: "general", Files: 81223, Bytes: 93 << 30, OnlyFiles: 81223, OnlyBytes: 93 << 30}}},
			{URI: "keyring:old", State: "pending-deletion", Created: madeAt.Add(-900 * day), DeletionAt: madeAt.Add(12 * day), Uses: []Dependence{{Class: "pci", Files: 111, Bytes: 44 << 20, OnlyFiles: 111, OnlyBytes: 44 << 20}}},
			{URI: "alias/gone", Error: "keywrap: key not found"},
		},
		Activity: activity(7),
		Log: &Log{Path: "/var/log/kmsfs/audit.log", Files: 3, Lines: 42311, First: 1, Last: 42311, Head: "9c2f0f1d7c5a4b3e8d6f1029384756abcdef0123456789abcdef0123456789ab",
			From: madeAt.Add(-30 * day), To: madeAt, Lost: 12, Warnings: []string{"/var/log/kmsfs/audit.log.1:881: an incomplete write of 211 bytes, set aside"}},
	}
}
