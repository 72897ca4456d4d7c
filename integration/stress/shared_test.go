package stress

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// mapperArgs is one of several processes that map the same file.
type mapperArgs struct {
	Path   string
	Seed   uint64
	Me, Of int // the slots k with k % Of == Me are this process's
	Steps  int
}

const mapPages, slotsPerPage = 100, 512

// playMapper counts its own slots up, and watches those of the others, which
// only go up, through the mapping and by read(2). Its private mapping is
// nobody else's.
func playMapper(args []byte) error {
	var a mapperArgs
	if err := json.Unmarshal(args, &a); err != nil {
		return err
	}
	fd, err := unix.Open(a.Path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	shared, err := unix.Mmap(fd, 0, mapPages*4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	private, err := unix.Mmap(fd, 0, mapPages*4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	mine := bytes.Repeat([]byte{byte(0xf0 + a.Me)}, 4096)
	copy(private[4096*a.Me:], mine)
	rnd := rand.New(rand.NewPCG(a.Seed, uint64(a.Me)))
	seen := make([]uint64, mapPages*slotsPerPage)
	for step := range a.Steps {
		k := rnd.IntN(len(seen)/a.Of)*a.Of + a.Me
		slot := (*atomic.Uint64)(unsafe.Pointer(&shared[k*8]))
		if got := slot.Load(); got != seen[k] {
			return fmt.Errorf("step %d: slot %d of this process is %d, want %d", step, k, got, seen[k])
		}
		seen[k]++
		slot.Store(seen[k])
		other := rnd.IntN(len(seen))
		got := (*atomic.Uint64)(unsafe.Pointer(&shared[other*8])).Load()
		if rnd.IntN(10) == 0 {
			var b [8]byte
			if _, err := unix.Pread(fd, b[:], int64(other*8)); err != nil {
				return err
			}
			got = *(*uint64)(unsafe.Pointer(&b[0]))
		}
		if got < seen[other] {
			return fmt.Errorf("step %d: slot %d went back from %d to %d", step, other, seen[other], got)
		}
		seen[other] = got
		switch rnd.IntN(400) {
		case 0:
			err = unix.Msync(shared, unix.MS_SYNC)
		case 1:
			err = unix.Fsync(fd)
		case 2:
			err = unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED)
		case 3:
			err = unix.Madvise(shared, unix.MADV_DONTNEED)
		}
		if err != nil {
			return err
		}
	}
	if !bytes.Equal(private[4096*a.Me:4096*(a.Me+1)], mine) {
		return fmt.Errorf("the private mapping changed")
	}
	for k := a.Me; k < len(seen); k += a.Of { // for the test: what must be in the file
		(*atomic.Uint64)(unsafe.Pointer(&shared[k*8])).Store(uint64(k) * 3)
	}
	return nil // without msync: that the process ends must do
}

// TestMappedByMany: S-14 for several processes that map one file, and write and
// read it through their mappings.
func TestMappedByMany(t *testing.T) {
	t.Parallel()
	seed := seedOf(t)
	m := newMount(t)
	m.Put("f", make([]byte, mapPages*4096))
	const processes = 4
	var programs []*program
	for i := range processes {
		programs = append(programs, start(t, "mapper", mapperArgs{m.Path("f"), seed, i, processes, opsOf(20_000, 2_000_000)}))
	}
	all(t, programs...)
	check := func(when string) {
		got, err := os.ReadFile(m.Path("f"))
		if err != nil || len(got) != mapPages*4096 {
			t.Fatalf("%s: %d bytes, %v", when, len(got), err)
		}
		for k := range mapPages * slotsPerPage {
			if v := *(*uint64)(unsafe.Pointer(&got[k*8])); v != uint64(k)*3 {
				t.Fatalf("%s: slot %d is %d, want %d", when, k, v, k*3)
			}
		}
	}
	check("at once")
	m.Unmount()
	m.Again()
	check("after a remount")
	clean(t, m)
}

// appenderArgs is one of several processes that write to the end of a file.
type appenderArgs struct {
	Path    string
	Seed    uint64
	Me      int
	Records int
}

// record is a line that nobody can take for another, of any length.
func record(who, seq int) []byte {
	return fmt.Appendf(nil, "%d %d %s\n", who, seq, bytes.Repeat([]byte{byte('a' + (who+seq)%26)}, (who*7919+seq*104729)%3000))
}

func playAppender(args []byte) error {
	var a appenderArgs
	if err := json.Unmarshal(args, &a); err != nil {
		return err
	}
	rnd := rand.New(rand.NewPCG(a.Seed, uint64(a.Me)))
	fd := -1
	for seq := range a.Records {
		var err error
		if fd < 0 {
			if fd, err = unix.Open(a.Path, unix.O_WRONLY|unix.O_CREAT|unix.O_APPEND|unix.O_CLOEXEC, 0o644); err != nil {
				return err
			}
		}
		r := record(a.Me, seq)
		n, err := unix.Write(fd, r)
		if err != nil || n < len(r) {
			return fmt.Errorf("%d of %d bytes: %w", n, len(r), err)
		}
		switch rnd.IntN(30) {
		case 0:
			err = unix.Fsync(fd)
		case 1:
			err = unix.Close(fd)
			fd = -1
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// appended checks the records of a file, and returns how many it has of each
// process. A file that is being written may end within one.
func appended(b []byte, processes int, whole bool) ([]int, error) {
	next := make([]int, processes)
	for at := 0; at < len(b); {
		var who, seq int
		if _, err := fmt.Sscanf(string(b[at:min(len(b), at+40)]), "%d %d", &who, &seq); err != nil || who >= processes || seq != next[who] {
			if !whole && len(b)-at < 40 {
				return next, nil
			}
			return nil, fmt.Errorf("at %d: %.60q, %v", at, b[at:], err)
		}
		want := record(who, seq)
		if !bytes.HasPrefix(b[at:], want) {
			if !whole && bytes.HasPrefix(want, b[at:]) {
				return next, nil
			}
			return nil, fmt.Errorf("at %d: record %d of %d is torn: %.60q", at, seq, who, b[at:])
		}
		next[who]++
		at += len(want)
	}
	return next, nil
}

// TestAppendByMany: S-4 for several processes: no record is lost or torn, and
// who reads meanwhile sees a beginning of what will be there.
func TestAppendByMany(t *testing.T) {
	t.Parallel()
	seed := seedOf(t)
	m := newMount(t)
	const processes = 4
	records := opsOf(400, 20_000)
	var programs []*program
	for i := range processes {
		programs = append(programs, start(t, "appender", appenderArgs{m.Path("log"), seed, i, records}))
	}
	stop := make(chan struct{})
	var reader sync.WaitGroup
	reader.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if b, err := os.ReadFile(m.Path("log")); err == nil {
				if _, err := appended(b, processes, false); err != nil {
					t.Errorf("while it is written: %v", err)
					return
				}
			}
		}
	})
	all(t, programs...)
	close(stop)
	reader.Wait()
	for _, when := range []string{"at once", "after a remount"} {
		b, err := os.ReadFile(m.Path("log"))
		if err != nil {
			t.Fatal(err)
		}
		got, err := appended(b, processes, true)
		if err != nil {
			t.Fatalf("%s: %v", when, err)
		}
		for who, n := range got {
			if n != records {
				t.Errorf("%s: %d records of process %d, want %d", when, n, who, records)
			}
		}
		m.Unmount()
		m.Again()
	}
	clean(t, m)
}
