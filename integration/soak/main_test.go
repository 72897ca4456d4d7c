package soak

import (
	"os"
	"testing"

	"github.com/kmsfs/kmsfs/integration/rig"
)

func TestMain(m *testing.M) {
	code := m.Run()
	rig.Clean()
	os.Exit(code)
}
