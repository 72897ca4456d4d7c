package integration

import (
	"bytes"
	"path/filepath"
	"testing"

	"github.com/kmsfs/kmsfs/integration/rig"
)

// TestFirstSession is what a new user does first.
func TestFirstSession(t *testing.T) {
	rig.Need(t, "root", "fuse")
	h := rig.NewHome(t)
	store := filepath.Join(t.TempDir(), "S")
	h.Run("init", store)
	m := h.Mount(store)
	h.Sh(`cp -a /usr/share/doc "$1"/`, m.Dir)
	m.Unmount()
	m.Again()
	h.Sh(`diff -r --no-dereference /usr/share/doc "$1"/doc`, m.Dir)
	m.Unmount()
	if out := h.TrySh(`grep -rlaF copyright "$1" || find "$1" -name '*changelog*'`, store); bytes.TrimSpace([]byte(out.Stdout)) != nil && out.Stdout != "" {
		t.Errorf("plaintext in the store: %s", out.Stdout)
	}
}
