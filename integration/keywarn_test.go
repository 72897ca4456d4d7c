package integration

import (
	"context"
	"path/filepath"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/kms"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/integration/kmsd/kmsserver"
)

// TestMountWarnsOfPendingDeletion: a mount says which of its keys will be gone,
// when, and what to do; while the store can still be used.
func TestMountWarnsOfPendingDeletion(t *testing.T) {
	server := kmsserver.StartT(t, kmsserver.Options{})
	var keys []string
	for range 2 {
		arn, err := server.CreateKey(kmsserver.KeyOptions{})
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, arn)
	}
	s := newKMSStoreAt(t, server, envelope.Prefix, []string{"general"}, map[string]kmsClass{"general": {keys: keys}})
	m := s.mount()
	m.Put("f", []byte("kept"))
	m.Unmount()
	out, err := admin(server).ScheduleKeyDeletion(context.Background(), &kms.ScheduleKeyDeletionInput{
		KeyId: &keys[0], PendingWindowInDays: aws.Int32(7)})
	if err != nil {
		t.Fatal(err)
	}
	log := filepath.Join(t.TempDir(), "log")
	r := s.h.Try("mount", "--log-file", log, s.dir, m.Dir)
	want := "key " + keys[0] + " is in use and pending deletion, on " + out.DeletionDate.Format("2006-01-02")
	if r.Code != 0 || !strings.Contains(r.Stderr, "warning: "+want) {
		t.Errorf("mount: exit %d, %q; want a warning %q", r.Code, r.Stderr, want)
	}
	if got := string(s.h.Sh(`cat "$1"`, log)); !strings.Contains(got, want) {
		t.Errorf("the log has no %q: %s", want, got)
	}
	if got, errno := readAll(m.Path("f")); errno != 0 || string(got) != "kept" {
		t.Errorf("under the other key: %q, %s", got, errnoName(errno))
	}
	m.Unmount()
	if r := s.h.Try("keys", s.dir); !strings.Contains(r.Stdout, "pending") {
		t.Errorf("kmsfs keys says nothing of the deletion: %s", r.Stdout)
	}
}
