package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/kms"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/integration/kmsd/kmsserver"
	"github.com/kmsfs/kmsfs/integration/rig"
)

// rewrapStore is a store of one class, general, whose files are under the key
// from, and whose policy has the key to by now, with from retired.
type rewrapStore struct {
	*kmsStore
	from, to string // ARNs
	rewrap   *rig.Home
}

func newRewrapStore(t *testing.T, p envelope.Placement, options string, fill func(m *rig.Mount)) *rewrapStore {
	t.Helper()
	s := newKMSStore(t, p, []string{"general"}, map[string]kmsClass{"general": {options: options}})
	to, err := s.kms.CreateKey(kmsserver.KeyOptions{})
	if err != nil {
		t.Fatal(err)
	}
	r := &rewrapStore{kmsStore: s, from: s.arn["general"], to: to}
	m := s.mount("d")
	fill(m)
	m.Unmount()
	r.policy([]string{to}, []string{r.from})
	// Whoever rewraps may do nothing else, above all not decrypt.
	r.rewrap = s.as(clerk(t, allow(r.from, nil, "kms:ReEncryptFrom"), allow(r.to, nil, "kms:ReEncryptTo", "kms:ReEncryptFrom")))
	s.kms.ResetCalls()
	return r
}

// policy gives the class other keys.
func (r *rewrapStore) policy(keys, retired []string) {
	r.t.Helper()
	if res := r.tryPolicy(keys, retired); res.Code != 0 {
		r.t.Fatalf("policy apply: exit %d: %s", res.Code, res.Stderr)
	}
}

func (r *rewrapStore) tryPolicy(keys, retired []string) rig.Result {
	r.t.Helper()
	var shown struct {
		Policy map[string]any `json:"policy"`
	}
	if err := json.Unmarshal([]byte(r.h.Run("policy", "show", "--json", r.dir)), &shown); err != nil {
		r.t.Fatal(err)
	}
	class := shown.Policy["classes"].(map[string]any)["general"].(map[string]any)
	class["keys"], class["retired"] = keys, append([]string{}, retired...)
	b, err := json.Marshal(shown.Policy)
	if err != nil {
		r.t.Fatal(err)
	}
	file := filepath.Join(r.t.TempDir(), "policy.json")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		r.t.Fatal(err)
	}
	return r.h.Try("policy", "apply", r.dir, file)
}

// rewrapReport is what rewrap --json prints.
type rewrapReport struct {
	Online                       bool
	Files, Todo, Rewrapped, Left int
	Keys                         int
	Failed                       []struct{ Path, What, Kind string }
}

func (r *rewrapStore) run(h *rig.Home, flags ...string) rewrapReport {
	r.t.Helper()
	var out rewrapReport
	if err := json.Unmarshal([]byte(h.Run(append(append([]string{"rewrap", "--json"}, flags...), r.dir)...)), &out); err != nil {
		r.t.Fatal(err)
	}
	return out
}

// keyUse is a key as keys --json prints it.
type keyUse struct {
	Key           string
	Sole, Several struct{ Files, Bytes int }
	Materials     map[string]any
	State         string
	Verdict       struct {
		Deletable bool
		Reasons   []string
	}
	LastUsed   string `json:"last_used"`
	DeletionAt string `json:"deletion_at"`
}

func (r *rewrapStore) keys(key string) keyUse {
	r.t.Helper()
	res := r.h.Try("keys", "--json", r.dir)
	var out struct{ Keys []keyUse }
	if err := json.Unmarshal([]byte(res.Stdout), &out); err != nil {
		r.t.Fatalf("keys: exit %d: %v: %s", res.Code, err, res.Stderr)
	}
	for _, k := range out.Keys {
		if k.Key == key {
			return k
		}
	}
	return keyUse{}
}

// wantFree checks that nothing depends on the old key: it goes, and all reads.
func (r *rewrapStore) wantFree(want map[string][]byte) {
	r.t.Helper()
	if k := r.keys(r.from); !k.Verdict.Deletable || k.Sole.Files+k.Several.Files != 0 {
		r.t.Errorf("after the rewrap: %+v", k)
	}
	if res := r.h.Try("keys", "--depends-on", r.from, r.dir); res.Code != 0 || res.Stdout != "" {
		r.t.Errorf("keys --depends-on: exit %d: %s%s", res.Code, res.Stdout, res.Stderr)
	}
	days := int32(7)
	if _, err := admin(r.kms).ScheduleKeyDeletion(context.Background(), &kms.ScheduleKeyDeletionInput{KeyId: &r.from, PendingWindowInDays: &days}); err != nil {
		r.t.Fatal(err)
	}
	if k := r.keys(r.from); k.State != "pending-deletion" || k.DeletionAt == "" {
		r.t.Errorf("pending deletion: %+v", k)
	}
	m := r.h.Mount(r.dir)
	for name, data := range want {
		if got, errno := readAll(m.Path(name)); errno != 0 || !bytes.Equal(got, data) {
			r.t.Errorf("%s: %d bytes, %s, want %d", name, len(got), errnoName(errno), len(data))
		}
	}
	m.Unmount()
	r.fsck(0)
	r.policy([]string{r.to}, nil)
}

// rewrapTree makes files of several sizes, one with two names and one with a hole.
func rewrapTree(files int, want map[string][]byte) func(m *rig.Mount) {
	return func(m *rig.Mount) {
		for i := range files {
			name := fmt.Sprintf("d/f%d", i)
			want[name] = bytes.Repeat(fmt.Appendf(nil, "contents of %d ", i), 1+i*7)
			m.Put(name, want[name])
		}
		m.Home.Sh(`cd "$1"; ln d/f0 twice; echo end > holes; truncate -s 100000 holes; echo end >> holes; touch empty`, m.Dir)
		want["twice"], want["empty"] = want["d/f0"], nil
		want["holes"] = append(append([]byte("end\n"), make([]byte, 100000-4)...), "end\n"...)
	}
}

// TestRewrap moves a store from one key to another without the right to decrypt.
func TestRewrap(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		const files = 80
		want := map[string][]byte{}
		r := newRewrapStore(t, p, "", rewrapTree(files, want))
		k := r.keys(r.from)
		if k.Sole.Files != files+1 || k.Verdict.Deletable || k.LastUsed == "" { // and the file with holes
			t.Errorf("before: %+v", k)
		}
		res := r.h.Try("keys", "--depends-on", r.from, "--plaintext", r.dir)
		if res.Code != 11 || !strings.Contains(res.Stdout, "/d/f17\n") || strings.Count(res.Stdout, "\n") != files+1 {
			t.Errorf("keys --depends-on: exit %d: %s%s", res.Code, res.Stdout, res.Stderr)
		}
		if res := r.tryPolicy([]string{r.to}, nil); res.Code != 1 || !strings.Contains(res.Stderr, "kmsfs rewrap") {
			t.Errorf("dropping a key in use: exit %d: %s", res.Code, res.Stderr)
		}
		if got := r.run(r.rewrap, "--dry-run"); got.Todo != files+1 || got.Rewrapped != 0 {
			t.Errorf("dry run: %+v", got)
		}
		r.kms.ResetCalls()
		if got := r.run(r.rewrap); got.Rewrapped != files+1 || got.Left != 0 || got.Online || len(got.Failed) != 0 {
			t.Errorf("rewrap: %+v", got)
		}
		r.wantCalls("rewrap", map[string]int{"ReEncrypt": files + 1})
		r.run(r.rewrap)
		r.wantCalls("once more", nil)
		r.wantFree(want)
	})
}

// TestRewrapShared: of shared keys the branch is rewrapped, once.
func TestRewrapShared(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		want := map[string][]byte{}
		r := newRewrapStore(t, p, "data_keys: shared", rewrapTree(40, want))
		if got := r.run(r.rewrap); got.Rewrapped != 41 || got.Left != 0 {
			t.Errorf("rewrap: %+v", got)
		}
		if n := r.calls()["ReEncrypt"]; n > 3 {
			t.Errorf("%d calls of ReEncrypt for one branch", n)
		}
		r.wantFree(want)
	})
}

// TestRewrapKilled ends rewrap with SIGKILL at random moments, until it is
// through.
func TestRewrapKilled(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		want := map[string][]byte{}
		r := newRewrapStore(t, p, "", rewrapTree(200, want))
		r.faults(kmsserver.Faults{LatencyMS: 60})
		kills := 0
		for range 40 {
			cmd := exec.Command(rig.Binary(t), "rewrap", r.dir)
			cmd.Env = append(os.Environ(), r.rewrap.Env...)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			timer := time.AfterFunc(time.Duration(40+rand.IntN(200))*time.Millisecond, func() { _ = cmd.Process.Kill() })
			err := cmd.Wait()
			timer.Stop()
			if err == nil {
				break
			}
			kills++
		}
		r.faults(kmsserver.Faults{})
		if kills == 0 {
			t.Error("rewrap was never killed")
		}
		if got := r.run(r.rewrap); got.Left != 0 || len(got.Failed) != 0 {
			t.Errorf("the last run: %+v", got)
		}
		r.wantFree(want)
	})
}

// TestRewrapOnline rewraps a mounted store while others write it.
func TestRewrapOnline(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		const files = 120
		want := map[string][]byte{}
		r := newRewrapStore(t, p, "", rewrapTree(files, want))
		m := r.h.Mount(r.dir)
		stop := make(chan struct{})
		var load sync.WaitGroup
		for w := range 3 {
			load.Go(func() { r.work(m, w, stop, want) })
		}
		r.faults(kmsserver.Faults{LatencyMS: 5})
		res := r.rewrap.Try("rewrap", "--json", r.dir)
		close(stop)
		load.Wait()
		r.faults(kmsserver.Faults{})
		var first rewrapReport
		if err := json.Unmarshal([]byte(res.Stdout), &first); err != nil {
			t.Fatalf("exit %d: %v: %s", res.Code, err, res.Stderr)
		}
		// A file that changes all the time may be left: exit code 6.
		if !first.Online || first.Rewrapped < files-3*10 || len(first.Failed) > 0 || res.Code != 0 && (res.Code != 6 || first.Left == 0) {
			t.Errorf("under load: exit %d: %+v: %s", res.Code, first, res.Stderr)
		}
		if got := r.run(r.rewrap); got.Left != 0 || len(got.Failed) != 0 || !got.Online {
			t.Errorf("at rest: %+v", got)
		}
		if k := r.keys(r.from); !k.Verdict.Deletable {
			t.Errorf("still mounted: %+v", k)
		}
		// A sparse flag set after the rewrap writes the header again.
		for w := range 3 {
			name := fmt.Sprintf("d/f%d", 50+w)
			if err := os.Truncate(m.Path(name), 200000); err != nil {
				t.Fatal(err)
			}
			want[name] = append(bytes.Clone(want[name]), make([]byte, 200000-len(want[name]))...)
		}
		m.Unmount()
		r.wantFree(want)
	})
}

// work changes files 10w to 10w+9 until stop: it appends, makes holes, and
// renames there and back. Some stay open all the time.
func (r *rewrapStore) work(m *rig.Mount, w int, stop chan struct{}, want map[string][]byte) {
	mu := &workMu
	open := map[string]*os.File{}
	defer func() {
		for _, f := range open {
			if err := f.Close(); err != nil {
				r.t.Errorf("close: %v", err)
			}
		}
	}()
	check := func(what string, err error) bool {
		if err != nil {
			r.t.Errorf("%s: %v", what, err)
		}
		return err == nil
	}
	for round := 0; ; round++ {
		select {
		case <-stop:
			return
		default:
		}
		name := fmt.Sprintf("d/f%d", 10*w+round%10)
		if name == "d/f0" { // has two names
			continue
		}
		mu.Lock()
		data := want[name]
		mu.Unlock()
		f := open[name]
		if f == nil {
			var err error
			if f, err = os.OpenFile(m.Path(name), os.O_RDWR, 0); !check("open", err) {
				return
			}
			open[name] = f
		}
		more := fmt.Appendf(nil, "round %d", round)
		off := len(data)
		if round%3 == 0 && off < 60000 { // a hole
			off += 9000
		}
		if _, err := f.WriteAt(more, int64(off)); !check("write", err) {
			return
		}
		data = append(append(bytes.Clone(data), make([]byte, off-len(data))...), more...)
		if round%5 == 2 {
			check("fsync", f.Sync())
		}
		if round%4 == 1 {
			check("close", f.Close())
			delete(open, name)
			if !check("rename", os.Rename(m.Path(name), m.Path("moved"+fmt.Sprint(w)))) || !check("rename", os.Rename(m.Path("moved"+fmt.Sprint(w)), m.Path(name))) {
				return
			}
		}
		mu.Lock()
		want[name] = data
		mu.Unlock()
	}
}

var workMu sync.Mutex // guards the map of a test's contents

// TestRewrapRecipients adds a second recipient, uses it, and takes it away.
func TestRewrapRecipients(t *testing.T) {
	t.Parallel()
	want := map[string][]byte{}
	r := newRewrapStore(t, envelope.Prefix, "", rewrapTree(20, want))
	r.run(r.rewrap)
	r.policy([]string{r.to, r.from}, nil)
	h := r.as(clerk(t, allow("*", nil, "kms:ReEncrypt*")))
	if got := r.run(h); got.Rewrapped != 21 || got.Left != 0 {
		t.Errorf("adding: %+v", got)
	}
	if k := r.keys(r.from); k.Several.Files != 21 || k.Sole.Files != 0 {
		t.Errorf("added: %+v", k)
	}
	r.disable(r.to)
	m := r.h.Mount(r.dir)
	for name, data := range want {
		if got, errno := readAll(m.Path(name)); errno != 0 || !bytes.Equal(got, data) {
			t.Errorf("%s under the second recipient: %s", name, errnoName(errno))
		}
	}
	m.Unmount()
	r.enable(r.to)
	r.policy([]string{r.to}, []string{r.from})
	if got := r.run(h); got.Rewrapped != 21 || got.Left != 0 {
		t.Errorf("taking away: %+v", got)
	}
	r.wantFree(want)
}

// TestKeysAfterRotation: a rotation, on demand or by the calendar, needs nothing;
// the inventory tells the materials apart.
func TestKeysAfterRotation(t *testing.T) {
	ctx := context.Background()
	for name, rotate := range map[string]func(s *kmsStore, key *string) error{
		"on demand": func(s *kmsStore, key *string) error {
			_, err := admin(s.kms).RotateKeyOnDemand(ctx, &kms.RotateKeyOnDemandInput{KeyId: key})
			return err
		},
		"automatic": func(s *kmsStore, key *string) error {
			if _, err := admin(s.kms).EnableKeyRotation(ctx, &kms.EnableKeyRotationInput{KeyId: key}); err != nil {
				return err
			}
			return s.kms.Advance(400 * 24 * time.Hour)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newKMSStore(t, envelope.Prefix, []string{"general"}, map[string]kmsClass{"general": {}})
			r := &rewrapStore{kmsStore: s, from: s.arn["general"]}
			m := s.mount()
			m.Put("old", []byte("old"))
			m.Unmount() // keys made ahead of need are of the old material
			if err := rotate(s, &r.from); err != nil {
				t.Fatal(err)
			}
			m.Again()
			m.Put("new", []byte("new"))
			for _, name := range []string{"old", "new"} {
				if got, errno := readAll(m.Path(name)); errno != 0 || string(got) != name {
					t.Errorf("%s: %q, %s", name, got, errnoName(errno))
				}
			}
			m.Unmount()
			if k := r.keys(r.from); len(k.Materials) != 2 || k.Sole.Files != 2 || k.Verdict.Deletable {
				t.Errorf("keys: %+v", k)
			}
			if got := r.run(s.h); got.Todo != 0 {
				t.Errorf("rewrap after a rotation: %+v", got)
			}
		})
	}
}

// TestKeyringRotation is the same for the embedded keyring.
func TestKeyringRotation(t *testing.T) {
	t.Parallel()
	rig.Need(t, "fuse")
	h := rig.NewHome(t)
	dir := filepath.Join(t.TempDir(), "S")
	h.Run("init", dir)
	m := h.Mount(dir)
	m.Put("old", []byte("old"))
	m.Unmount()
	h.Run("keyring", "rotate", "general")
	m.Again()
	m.Put("new", []byte("new"))
	m.Unmount()
	r := &rewrapStore{kmsStore: &kmsStore{victimStore: victimStore{t: t, h: h, dir: dir}}}
	if k := r.keys("keyring:general"); len(k.Materials) != 2 || k.Sole.Files != 2 {
		t.Errorf("keys: %+v", k)
	}
	m.Again()
	for _, name := range []string{"old", "new"} {
		if got, errno := readAll(m.Path(name)); errno != 0 || string(got) != name {
			t.Errorf("%s: %q, %s", name, got, errnoName(errno))
		}
	}
	m.Unmount()
}

// TestRewrapDaemonKilled kills the process that writes the headers of a mounted
// store; the next mount and the next rewrap finish what was begun.
func TestRewrapDaemonKilled(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		want := map[string][]byte{}
		r := newRewrapStore(t, p, "", rewrapTree(200, want))
		failed := 0
		for range 6 {
			m := r.h.Mount(r.dir)
			done := make(chan rig.Result)
			go func() { done <- r.rewrap.Try("rewrap", "--rate", "30", r.dir) }()
			time.Sleep(time.Duration(800+rand.IntN(2000)) * time.Millisecond)
			m.Kill()
			if res := <-done; res.Code == 6 {
				failed++
			} else if res.Code != 0 {
				t.Errorf("exit %d: %s", res.Code, res.Stderr)
			}
		}
		if failed == 0 {
			t.Error("no rewrap lost its mount")
		}
		m := r.h.Mount(r.dir)
		if got := r.run(r.rewrap); got.Left != 0 || len(got.Failed) != 0 {
			t.Errorf("the last run: %+v", got)
		}
		m.Unmount()
		r.wantFree(want)
	})
}
