package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/integration/kmsd/kmsserver"
	"github.com/kmsfs/kmsfs/integration/rig"
)

// stormSource opens files while a timer signals every millisecond, with a
// handler that does not restart system calls.
const stormSource = `
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/time.h>
#include <unistd.h>

static volatile long ticks;
static void tick(int n) { ticks++; }

int main(int argc, char **argv) {
	struct sigaction sa = { .sa_handler = tick };
	struct itimerval every = { {0, 1000}, {0, 1000} };
	sigaction(SIGALRM, &sa, 0);
	setitimer(ITIMER_REAL, &every, 0);
	for (int i = 1; i < argc; i++) {
		char b[16];
		int create = strstr(argv[i], "new") != 0;
		int fd = open(argv[i], create ? O_RDWR | O_CREAT | O_EXCL : O_RDWR, 0644);
		if (fd < 0) { printf("open %s: %s\n", argv[i], strerror(errno)); return 1; }
		if (create ? write(fd, "x", 1) != 1 : read(fd, b, sizeof b) < 1) { printf("use %s: %s\n", argv[i], strerror(errno)); return 1; }
		if (fsync(fd) != 0 || close(fd) != 0) { printf("close %s: %s\n", argv[i], strerror(errno)); return 1; }
	}
	printf("%s\n", ticks >= argc - 1 ? "stormy" : "calm"); /* one is pending while a call waits */
	return 0;
}
`

// TestKMSSignalStorm: programs that are interrupted all the time see neither
// EINTR nor EIO while the key service takes its usual worst time.
func TestKMSSignalStorm(t *testing.T) {
	t.Parallel()
	rig.Need(t, "gcc")
	s := newKMSStore(t, envelope.Prefix, []string{"phi"}, map[string]kmsClass{"phi": {cache: "0s"}})
	m := s.mount()
	var old, all []string
	for i := range 8 {
		m.Put(fmt.Sprintf("f%d", i), []byte("x"))
		old = append(old, m.Path(fmt.Sprintf("f%d", i)))
		all = append(all, old[i], m.Path(fmt.Sprintf("new%d", i)))
	}
	s.again(m)
	s.faults(kmsserver.Faults{LatencyMS: 300})
	source, program := filepath.Join(t.TempDir(), "storm.c"), filepath.Join(t.TempDir(), "storm")
	if err := os.WriteFile(source, []byte(stormSource), 0o600); err != nil {
		t.Fatal(err)
	}
	s.h.Sh(`gcc -o "$1" "$2"`, program, source)
	if r := s.h.Exec(nil, program, all...); r.Code != 0 || r.Stdout != "stormy\n" {
		t.Errorf("SIGALRM: exit %d: %s", r.Code, r.Stdout)
	}
	cmd := helper("preempted-opens", old...)
	if out, err := cmd.Output(); err != nil {
		t.Errorf("preemption: %v: %s", err, out)
	}
	if n := s.kms.Count("Decrypt"); n != 2*len(old) {
		t.Errorf("%d calls for %d opens", n, 2*len(old))
	}
	m.Unmount()
}

// preemptedOpens opens files with bare system calls while goroutines of the same
// process signal its threads, as the Go runtime does to preempt them and to
// collect garbage.
func preemptedOpens(paths []string) error {
	runtime.LockOSThread()
	pid, tid := unix.Getpid(), unix.Gettid()
	signals := 0
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
				runtime.GC()
				_ = unix.Tgkill(pid, tid, unix.SIGURG)
				signals++
				time.Sleep(time.Millisecond)
			}
		}
	}()
	for _, p := range paths {
		fd, err := unix.Open(p, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open %s: %w", p, err)
		}
		if _, err := unix.Read(fd, make([]byte, 10)); err != nil {
			return fmt.Errorf("read %s: %w", p, err)
		}
		if err := unix.Close(fd); err != nil {
			return fmt.Errorf("close %s: %w", p, err)
		}
	}
	close(stop)
	<-stopped
	if signals < 100 {
		return fmt.Errorf("only %s signals", strconv.Itoa(signals))
	}
	return nil
}
