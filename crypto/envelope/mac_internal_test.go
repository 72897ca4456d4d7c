package envelope

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"testing"
)

// TestHMACIsTheStandard holds hmacSHA256 to crypto/hmac over all its lengths.
func TestHMACIsTheStandard(t *testing.T) {
	for k := range sha256.BlockSize + 1 {
		for n := range maxMACed + 1 {
			key, message := bytes.Repeat([]byte{byte(k + 1)}, k), bytes.Repeat([]byte{byte(n)}, n)
			var got [sha256.Size]byte
			hmacSHA256(&got, key, message)
			want := hmac.New(sha256.New, key)
			want.Write(message)
			if !hmac.Equal(got[:], want.Sum(nil)) {
				t.Fatalf("key of %d bytes, message of %d: not HMAC-SHA256", k, n)
			}
		}
	}
}
