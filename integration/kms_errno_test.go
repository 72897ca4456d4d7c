package integration

import (
	"context"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/integration/kmsd/kmsserver"
)

func (s *kmsStore) disable(key string) {
	s.t.Helper()
	if _, err := admin(s.kms).DisableKey(context.Background(), &kms.DisableKeyInput{KeyId: &key}); err != nil {
		s.t.Fatal(err)
	}
}

func (s *kmsStore) enable(key string) {
	s.t.Helper()
	if _, err := admin(s.kms).EnableKey(context.Background(), &kms.EnableKeyInput{KeyId: &key}); err != nil {
		s.t.Fatal(err)
	}
}

// trouble is a state of the key service, and what open(2) says to it.
type trouble struct {
	name       string
	begin, end func(s *kmsStore)
	want       unix.Errno // of opening a file
}

func injected(name, code string, want unix.Errno) trouble {
	return trouble{name: name, want: want,
		begin: func(s *kmsStore) { s.faults(kmsserver.Faults{Rules: []kmsserver.Fault{{Error: code}}}) },
		end:   func(s *kmsStore) { s.faults(kmsserver.Faults{}) },
	}
}

func outageOf(kind kmsserver.Outage) trouble {
	return trouble{name: "outage: " + string(kind), want: unix.ETIMEDOUT,
		begin: func(s *kmsStore) { s.faults(kmsserver.Faults{Outage: kind}) },
		end:   func(s *kmsStore) { s.faults(kmsserver.Faults{}) },
	}
}

func troubles() []trouble {
	ctx := context.Background()
	key := func(s *kmsStore) *string { return aws.String(s.arn["phi"]) }
	must := func(s *kmsStore, err error) {
		s.t.Helper()
		if err != nil {
			s.t.Fatal(err)
		}
	}
	me := kmsserver.DefaultPrincipal().AccessKeyID
	deny := `{"Version":"2012-10-17","Statement":[
		{"Effect":"Allow","Principal":"*","Action":"kms:*","Resource":"*"},
		{"Effect":"Deny","Principal":"*","Action":["kms:Decrypt","kms:GenerateDataKey"],"Resource":"*"}]}`
	grant := `{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Principal":"*","Action":"kms:*","Resource":"*"}]}`
	return []trouble{
		{name: "denied by the key policy", want: unix.EACCES,
			begin: func(s *kmsStore) { must(s, s.kms.SetPolicy(*key(s), deny)) },
			end:   func(s *kmsStore) { must(s, s.kms.SetPolicy(*key(s), grant)) }},
		{name: "credentials expired", want: unix.EACCES,
			begin: func(s *kmsStore) { must(s, s.kms.SetExpired(me, true)) },
			end:   func(s *kmsStore) { must(s, s.kms.SetExpired(me, false)) }},
		injected("credentials unknown", "UnrecognizedClientException", unix.EACCES),
		{name: "key disabled", want: unix.ENOKEY,
			begin: func(s *kmsStore) { s.disable(*key(s)) },
			end:   func(s *kmsStore) { s.enable(*key(s)) }},
		injected("key not found", "NotFoundException", unix.ENOKEY),
		{name: "key pending deletion", want: unix.EKEYREVOKED,
			begin: func(s *kmsStore) {
				_, err := admin(s.kms).ScheduleKeyDeletion(ctx, &kms.ScheduleKeyDeletionInput{KeyId: key(s), PendingWindowInDays: aws.Int32(7)})
				must(s, err)
			},
			end: func(s *kmsStore) {
				_, err := admin(s.kms).CancelKeyDeletion(ctx, &kms.CancelKeyDeletionInput{KeyId: key(s)})
				must(s, err)
				s.enable(*key(s))
			}},
		{name: "imported material expired", want: unix.EKEYEXPIRED,
			begin: func(s *kmsStore) { must(s, s.kms.SetMaterialExpired(*key(s), true)) },
			end:   func(s *kmsStore) { must(s, s.kms.SetMaterialExpired(*key(s), false)) }},
		injected("throttled", "ThrottlingException", unix.ETIMEDOUT),
		injected("connections reset", kmsserver.CodeReset, unix.ETIMEDOUT),
		injected("no answer to one call", kmsserver.CodeHang, unix.ETIMEDOUT),
		outageOf(kmsserver.OutageRefuse), outageOf(kmsserver.OutageReset), outageOf(kmsserver.OutageHang),
		outageOf(kmsserver.OutageInternal), outageOf(kmsserver.OutageUnavailable),
	}
}

// TestKMSErrno wants each row of the errno table on a real mount, and after the
// end of the trouble a mount that works without more ado. What is open works on
// through all of it, and a file that could not be made leaves no name behind.
func TestKMSErrno(t *testing.T) {
	t.Parallel()
	var wg sync.WaitGroup
	defer wg.Wait()
	for i, tr := range troubles() {
		// All at once, however few processors: most of it is waiting for the
		// program to give up.
		wg.Go(func() {
			t.Run(tr.name, func(t *testing.T) { kmsErrno(t, tr, placements[i%len(placements)]) })
		})
	}
}

func kmsErrno(t *testing.T, tr trouble, p envelope.Placement) {
	s := newKMSStore(t, p, []string{"phi"}, map[string]kmsClass{"phi": {cache: "0s"}})
	m := s.mount()
	m.Put("cold", []byte("cold"))
	m.Put("open", []byte("open"))
	s.again(m)
	f, err := os.OpenFile(m.Path("open"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if _, err := os.Stat(m.Path("cold")); err != nil { // the kernel looks nothing up in a directory in which a create waits
		t.Fatal(err)
	}

	tr.begin(s)
	type result struct {
		what  string
		errno unix.Errno
	}
	results := make(chan result, 2)
	go func() { _, errno := readAll(m.Path("cold")); results <- result{"open", errno} }()
	go func() {
		err := os.WriteFile(m.Path("new"), []byte("x"), 0o600)
		results <- result{"create", errnoOf(err)}
	}()
	if _, err := f.WriteAt([]byte("still open, and written in the trouble"), 0); err != nil {
		t.Errorf("writing an open file: %v", err)
	}
	if err := f.Sync(); err != nil {
		t.Errorf("fsync of an open file: %v", err)
	}
	got := make([]byte, 10)
	if _, err := f.ReadAt(got, 0); err != nil || string(got) != "still open" {
		t.Errorf("reading an open file: %q, %v", got, err)
	}
	for range 2 {
		if r := <-results; r.errno != tr.want {
			t.Errorf("%s: %s, want %s", r.what, errnoName(r.errno), errnoName(tr.want))
		}
	}
	if names := s.h.Sh(`ls "$1"`, m.Dir); names != "cold\nopen\n" {
		t.Errorf("ls: %q, want cold and open", names)
	}
	tr.end(s)
	s.recovers(m.Path("cold"))
	if err := os.WriteFile(m.Path("new"), []byte("x"), 0o600); err != nil {
		t.Errorf("a new file after the trouble: %v", err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	m.Unmount()
	s.fsck(0)
}

// recovers wants a file to be readable soon. A failure may be remembered for a
// second, and a machine may be slow; the SDK's own pauses add to it.
func (s *kmsStore) recovers(path string) {
	s.t.Helper()
	var errno unix.Errno
	for range 100 {
		if _, errno = readAll(path); errno == 0 {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	s.t.Errorf("still %s after the trouble", errnoName(errno))
}

// TestKMSForeignKey: a wrapped key under a key that the class does not allow is
// refused before any call, though these credentials could use it.
func TestKMSForeignKey(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		s := newKMSStore(t, p, []string{"general", "phi"}, map[string]kmsClass{"phi": {cache: "0s"}, "general": {cache: "0s"}})
		foreign, err := s.kms.CreateKey(kmsserver.KeyOptions{})
		if err != nil {
			t.Fatal(err)
		}
		m := s.mount("phi")
		m.Put("phi/a", []byte("a"))
		m.Put("phi/b", []byte("b"))
		m.Put("phi/c", []byte("c"))
		inos := map[uint64]string{inode(t, m.Path("phi/a")): "a", inode(t, m.Path("phi/b")): "b", inode(t, m.Path("phi/c")): "c"}
		m.Unmount()
		s.locate(inos)
		for name, key := range map[string]string{"a": foreign, "b": s.arn["general"], "c": "arn:aws:kms:us-east-1:999999999999:key/1234abcd-12ab-34cd-56ef-1234567890ab"} {
			h, err := envelope.Parse(s.header(name))
			if err != nil {
				t.Fatal(err)
			}
			h.Recipients[0].Wrapped.Key = key
			if name != "c" {
				out, err := admin(s.kms).GenerateDataKey(context.Background(), &kms.GenerateDataKeyInput{
					KeyId: &key, KeySpec: "AES_256", EncryptionContext: map[string]string{
						"kmsfs:store": h.Store.String(), "kmsfs:class": "phi", "kmsfs:purpose": "data", "kmsfs:id": h.File.String()},
				})
				if err != nil {
					t.Fatal(err)
				}
				h.Recipients[0].Wrapped.Blob = out.CiphertextBlob
			}
			b, err := h.Encode(headerSize)
			if err != nil {
				t.Fatal(err)
			}
			s.setHeader(name, b)
		}
		m = s.h.Mount(s.dir)
		s.kms.ResetCalls()
		for _, name := range []string{"phi/a", "phi/b", "phi/c"} {
			if _, errno := readAll(m.Path(name)); errno != unix.EKEYREJECTED {
				t.Errorf("%s: %s, want EKEYREJECTED", name, errnoName(errno))
			}
		}
		s.wantCalls("three foreign keys", nil)
		m.Unmount()
	})
}

// TestKMSMountInTrouble: a store whose key service is away is not mounted, and
// says why in one line and a hint.
func TestKMSMountInTrouble(t *testing.T) {
	t.Parallel()
	for _, tr := range []trouble{troubles()[0], injected("key not found", "NotFoundException", unix.ENOKEY), outageOf(kmsserver.OutageRefuse)} {
		t.Run(tr.name, func(t *testing.T) {
			t.Parallel()
			s := newKMSStore(t, envelope.Prefix, []string{"phi"}, map[string]kmsClass{"phi": {}})
			tr.begin(s)
			dir := t.TempDir()
			wantFailure(t, s.h.Try("mount", s.dir, dir), 5)
			tr.end(s)
			s.h.Run("mount", s.dir, dir)
			s.h.Run("umount", dir)
		})
	}
}
