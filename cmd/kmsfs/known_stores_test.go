package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"
)

const (
	idA = "000102030405060708090a0b0c0d0e0f"
	idB = "f0e0d0c0b0a090807060504030201000"
)

func keysOf(keys ...string) map[string][]string { return map[string][]string{"general": keys} }

func TestKnownStoresRoundTrip(t *testing.T) {
	k := &knownStores{}
	k.put(knownStore{ID: idA, Keys: keysOf("keyring:a", "alias/<&>"), Path: "/srv/a \n\u2028", Time: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)})
	k.put(knownStore{ID: idB, Keys: map[string][]string{"x": {"keyring:x"}, "y": {"keyring:y"}}})
	text, err := k.encode()
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Count(string(text), "\n"); got != 3 {
		t.Errorf("%d lines, want 3:\n%s", got, text)
	}
	back, err := parseKnownStores(text)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(back, k) {
		t.Errorf("got %+v\nwant %+v", back, k)
	}
}

// F-44
func TestParseKnownStoresIsStrict(t *testing.T) {
	good := `{"id":"` + idA + `","keys":{"general":["keyring:g"]},"path":"/s","time":"2026-01-02T03:04:05Z"}`
	file := func(lines ...string) string { return knownStoresHeader + "\n" + strings.Join(lines, "\n") + "\n" }
	for _, ok := range []string{file(), file(good), file("", "# a comment", good), file(strings.Replace(good, `"/s"`, `""`, 1))} {
		if _, err := parseKnownStores([]byte(ok)); err != nil {
			t.Errorf("%q: %v", ok, err)
		}
	}
	for _, bad := range []string{
		good, "# kmsfs known-stores 2\n" + good, file(good, good), file("{}"), file("null"), file("[]"), file(good + good), file(good + " x"),
		file(strings.Replace(good, `"path"`, `"paht"`, 1)),
		file(strings.Replace(good, idA, "abc", 1)),
		file(strings.Replace(good, idA, strings.ToUpper(idA), 1)),
		file(strings.Replace(good, `{"general":["keyring:g"]}`, `{}`, 1)),
		file(strings.Replace(good, `["keyring:g"]`, `[]`, 1)),
		file(strings.Replace(good, `"keyring:g"`, `""`, 1)),
		file(strings.Replace(good, `"keyring:g"`, `"k"`+strings.Repeat(`,"k"`, maxKnownKeys), 1)),
		file(strings.Replace(good, `"/s"`, `"s"`, 1)),
		file(strings.Replace(good, `2026-01`, `2026-99`, 1)),
		file(good[:40]), file("#" + strings.Repeat("x", maxKnownLine)),
	} {
		if _, err := parseKnownStores([]byte(bad)); !errors.Is(err, errKnownStores) {
			t.Errorf("%.90q: %v, want %v", bad, err, errKnownStores)
		}
	}
}

func TestJudge(t *testing.T) {
	k := &knownStores{}
	k.put(knownStore{ID: idA, Keys: keysOf("keyring:a", "keyring:b"), Path: "/a"})
	k.put(knownStore{ID: idB, Keys: keysOf("keyring:b"), Path: "/b"})
	for _, tc := range []struct {
		what  string
		facts storeFacts
		want  verdict
	}{
		{"same", storeFacts{idA, "/a", keysOf("keyring:a", "keyring:b")}, storeKnown},
		{"other order", storeFacts{idA, "/a", keysOf("keyring:b", "keyring:a")}, storeKnown},
		{"moved", storeFacts{idA, "/new", keysOf("keyring:a", "keyring:b")}, storeKnown},
		{"new", storeFacts{strings.Repeat("0", 32), "/c", keysOf("keyring:a")}, storeNew},
		{"key added", storeFacts{idB, "/b", keysOf("keyring:b", "keyring:evil")}, storeChanged},
		{"key removed", storeFacts{idA, "/a", keysOf("keyring:a")}, storeChanged},
		{"class added", storeFacts{idB, "/b", map[string][]string{"general": {"keyring:b"}, "x": {"keyring:b"}}}, storeChanged},
		{"class renamed", storeFacts{idB, "/b", map[string][]string{"x": {"keyring:b"}}}, storeChanged},
		{"new store at a known place", storeFacts{strings.Repeat("0", 32), "/a", keysOf("keyring:a")}, storeSwapped},
		{"known store at another's place", storeFacts{idB, "/a", keysOf("keyring:b")}, storeSwapped},
	} {
		if got, _ := judge(k, tc.facts); got != tc.want {
			t.Errorf("%s: verdict %d, want %d", tc.what, got, tc.want)
		}
	}
}

func TestTrustNeverAcceptsAChange(t *testing.T) {
	k := &knownStores{}
	k.put(knownStore{ID: idA, Keys: keysOf("keyring:a"), Path: "/a"})
	a := &app{stdin: strings.NewReader("yes\n"), stderr: &strings.Builder{}}
	for _, facts := range []storeFacts{{idA, "/a", keysOf("keyring:evil")}, {idB, "/a", keysOf("keyring:a")}} {
		err := a.checkTrust(t.Context(), k, facts, true)
		if !errors.Is(err, errNotTrusted) {
			t.Errorf("%+v: %v, want %v", facts, err, errNotTrusted)
		}
	}
	if err := a.checkTrust(t.Context(), k, storeFacts{idB, "/b", keysOf("keyring:b")}, true); err != nil {
		t.Errorf("a new store with --trust: %v", err)
	}
	if err := a.checkTrust(t.Context(), k, storeFacts{idB, "/b", keysOf("keyring:b")}, false); !errors.Is(err, errNotTrusted) {
		t.Errorf("a new store without --trust and without a terminal: %v", err)
	}
	err := a.checkTrust(t.Context(), k, storeFacts{idA, "/a", keysOf("keyring:evil")}, false)
	if s := fmt.Sprint(err); !strings.Contains(s, "keyring:a") || !strings.Contains(s, "keyring:evil") {
		t.Errorf("the message does not show both lists: %s", s)
	}
}

func TestPinStore(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sub", "known")
	facts := storeFacts{idA, "/a", keysOf("keyring:a")}
	if err := pinStore(path, facts, false); err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Fatalf("mode %v, %v", st.Mode(), err)
	}
	if err := pinStore(path, facts, false); err != nil {
		t.Fatal(err)
	}
	if after, err := os.Stat(path); err != nil || !os.SameFile(st, after) {
		t.Error("a file with nothing new was written again")
	}
	facts.path = "/moved"
	if err := pinStore(path, facts, false); err != nil {
		t.Fatal(err)
	}
	evil := storeFacts{idA, "/moved", keysOf("keyring:evil")}
	if err := pinStore(path, evil, false); !errors.Is(err, errNotTrusted) {
		t.Errorf("a change was pinned: %v", err)
	}
	if err := pinStore(path, storeFacts{idB, "/moved", keysOf("keyring:b")}, true); err != nil {
		t.Fatal(err)
	}
	k, err := loadKnownStores(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := k.byID(idA); got == nil || got.Path != "" || !sameKeys(got.Keys, facts.keys) {
		t.Errorf("the store whose place was taken: %+v", got)
	}
}

// F-44
func TestKnownStoresFileOfOthersIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "known")
	if err := os.WriteFile(path, []byte(knownStoresHeader+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o620); err != nil {
		t.Fatal(err)
	}
	if _, err := loadKnownStores(path); !errors.Is(err, errKnownStores) {
		t.Errorf("a file that the group may write: %v", err)
	}
	if _, err := loadKnownStores(filepath.Dir(path)); !errors.Is(err, errKnownStores) {
		t.Errorf("a directory: %v", err)
	}
	big := filepath.Join(t.TempDir(), "big")
	if err := os.WriteFile(big, []byte(knownStoresHeader+"\n"+strings.Repeat("#\n", maxKnownFile/2)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := loadKnownStores(big); !errors.Is(err, errKnownStores) {
		t.Errorf("a file beyond the bound: %v", err)
	}
}

func TestKnownStoresConcurrently(t *testing.T) {
	path := filepath.Join(t.TempDir(), "known")
	const n = 20
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			facts := storeFacts{fmt.Sprintf("%032x", i), fmt.Sprintf("/s%d", i), keysOf("keyring:a")}
			if err := pinStore(path, facts, false); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	k, err := loadKnownStores(path)
	if err != nil || len(k.stores) != n {
		t.Errorf("%d stores, want %d: %v", len(k.stores), n, err)
	}
}
