package dare_test

import (
	"fmt"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/crypto/keymem"
)

// A file of 5,000 bytes in chunks of 4 KiB, behind a header block of 1 KiB.
func Example() {
	prk := keymem.Random(32)
	defer prk.Wipe()
	c, err := dare.New(prk, dare.AES256GCM, 4096)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer c.Wipe()

	plain := make([]byte, 5000)
	g := dare.Geometry{ChunkSize: 4096, Base: 1024}
	size := dare.PlainOff(len(plain))
	for i := range g.Chunks(size) {
		n := g.ChunkLen(i, size)
		slot, err := c.Seal(nil, plain[i*4096:][:n], i, i == g.Chunks(size)-1)
		if err != nil {
			fmt.Println(err)
			return
		}
		fmt.Printf("chunk %d: %d bytes at %d\n", i, len(slot), g.Slot(i))
	}
	fmt.Println("store file:", g.CipherSize(size), "bytes")
	// Output:
	// chunk 0: 4128 bytes at 1024
	// chunk 1: 936 bytes at 5152
	// store file: 6088 bytes
}
