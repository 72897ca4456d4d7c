//go:build !race

package nameenc_test

import "testing"

// TestAllocations holds what one name allocates.
func TestAllocations(t *testing.T) {
	c := newCipher(t, 1)
	enc, err := c.EncryptName(dirA, "quarterly-report-2024.pdf")
	if err != nil {
		t.Fatal(err)
	}
	for what, tt := range map[string]struct {
		do   func() error
		want float64
	}{
		"EncryptName": {func() error { _, err := c.EncryptName(dirA, "quarterly-report-2024.pdf"); return err }, 10},
		"DecryptName": {func() error { _, err := c.DecryptName(dirA, enc); return err }, 9},
	} {
		if got := testing.AllocsPerRun(1000, func() {
			if err := tt.do(); err != nil {
				t.Fatal(err)
			}
		}); got > tt.want {
			t.Errorf("%s allocates %v times, want at most %v", what, got, tt.want)
		}
	}
}
