package chunkfile_test

import (
	"bytes"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kmsfs/kmsfs/fs/chunkfile"
)

// gate is a disk whose writes wait until it is opened.
type gate struct {
	*memDisk
	open chan struct{}
}

func (g *gate) WriteAt(p []byte, off int64) error {
	<-g.open
	return g.memDisk.WriteAt(p, off)
}

// TestWritesKeepTheirOrder: the kernel sends the parts of a large file in their
// order, and several at a time. Whoever writes the next but one, after his own
// part, does not pass the one who waits with the next: that would make a hole,
// and fill it in place, through the journal.
func TestWritesKeepTheirOrder(t *testing.T) {
	// synctest.Wait does not end while somebody waits for a mutex.
	stuck := time.AfterFunc(30*time.Second, func() { panic("the second writer waits for a lock that is not handed on in order") })
	defer stuck.Stop()
	synctest.Test(t, func(t *testing.T) {
		s := newStored(t, chunk4k, 1024)
		s.own.tight = true
		c, err := s.config()
		if err != nil {
			t.Fatal(err)
		}
		g := &gate{s.disk, make(chan struct{})}
		c.Disk = g
		if s.f, err = chunkfile.Open(c); err != nil {
			t.Fatal(err)
		}
		const part = 8 * chunk4k
		write := func(n int) {
			if _, err := s.f.WriteAt(bytes.Repeat([]byte{byte(n)}, part), int64(n)*part); err != nil {
				t.Error(err)
			}
		}
		var wg sync.WaitGroup
		wg.Go(func() { write(0); write(2) })
		synctest.Wait()
		wg.Go(func() { write(1) })
		synctest.Wait()
		close(g.open)
		wg.Wait()
		if s.sparseOnDisk(t) {
			t.Error("a file that was written from its beginning to its end has a hole")
		}
		if s.own.records != 2 { // the chunk that was the last one, twice
			t.Errorf("%d records in the journal, want 2", s.own.records)
		}
	})
}
