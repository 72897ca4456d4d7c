package integration

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/integration/rig"
)

// crashRounds is how many kills there are for each placement, one of each kind;
// CRASH_ROUNDS sets another number. `make kill` has 200 in all.
const crashRounds = len(crashModes)

// crashModes say who is killed, in turn.
var crashModes = [...]string{"daemon", "clients", "clients, daemon", "daemon, mounts", "daemon, clients", "clients, umount"}

// crashSeed is where the moments come from, and what clients do.
func crashSeed(t *testing.T) uint64 {
	seed := uint64(5)
	if v := os.Getenv("CRASH_SEED"); v != "" {
		n, err := strconv.ParseUint(v, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		seed = n
	}
	t.Logf("CRASH_SEED=%d", seed)
	return seed
}

// TestCrash kills the serving process, the programs that use the mount, or both,
// in the middle of writes, of a mount and of an unmount, again and again. After
// each kill the store mounts, all that fsync promised is there, every file reads,
// and fsck is clean.
func TestCrash(t *testing.T) {
	rounds := crashRounds
	if v := os.Getenv("CRASH_ROUNDS"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil {
			t.Fatal(err)
		}
		rounds = n
	}
	seed := crashSeed(t)
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		rig.Need(t, "root", "fuse")
		h := rig.NewHome(t)
		store := filepath.Join(t.TempDir(), "S")
		h.Run("init", "--placement", p.String(), "--chunk-size", "4KiB", store)
		m := h.Mount(store)
		rnd := rand.New(rand.NewPCG(uint64(p), seed))
		var all []*crashRound
		kills := map[string]int{}
		for i := range rounds {
			r := &crashRound{t: t, m: m, dir: fmt.Sprintf("round%d", i), logs: t.TempDir(), seed: rnd.Uint64N(1 << 40)}
			all = append(all, r)
			mode := crashModes[i%len(crashModes)]
			kills[mode]++
			r.run(mode, time.Duration(150+rnd.IntN(700))*time.Millisecond, rnd)
			if strings.Contains(mode, "mounts") {
				killMounting(t, h, store, m.Dir, rnd)
			}
			if !rig.Mounted(m.Dir) {
				m.Again()
			}
			r.verify()
			m.Unmount()
			fsck(t, h, store, 0)
			m.Again()
		}
		for _, r := range all {
			r.verify()
		}
		m.Unmount()
		t.Logf("%d rounds, killed: %v", rounds, kills)
		if t.Failed() {
			t.Logf("log:\n%s", crashLog(h))
		}
	})
}

func crashLog(h *rig.Home) string {
	logs, _ := filepath.Glob(filepath.Join(h.Dir, ".state/kmsfs/*.log"))
	if len(logs) == 0 {
		return ""
	}
	b, _ := os.ReadFile(logs[0])
	return string(b[max(0, len(b)-8000):])
}

// killMounting kills mounts that are still finishing what the last crash left, or
// have just begun to serve.
func killMounting(t *testing.T, h *rig.Home, store, dir string, rnd *rand.Rand) {
	t.Helper()
	for range 3 {
		cmd := exec.Command(rig.Binary(t), "mount", "--foreground", store, dir)
		cmd.Env = append(os.Environ(), h.Env...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(10+rnd.IntN(80)) * time.Millisecond)
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		for rig.Mounted(dir) {
			if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
				t.Fatal(err)
			}
		}
	}
}

var crashKinds = []string{"append", "rewrite", "names", "sizes"}

// crashRound is one life of a mount, in a directory of its own.
type crashRound struct {
	t    *testing.T
	m    *rig.Mount
	dir  string
	logs string
	seed uint64
}

// run starts the clients, kills who is to be killed after a while, and waits for
// the clients.
func (r *crashRound) run(mode string, d time.Duration, rnd *rand.Rand) {
	t := r.t
	t.Helper()
	var clients []*exec.Cmd
	for i, kind := range crashKinds {
		dir := r.m.Path(r.dir, kind)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		cmd := helper("crash-client", kind, dir, filepath.Join(r.logs, kind), strconv.FormatUint(r.seed+uint64(i), 10))
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		clients = append(clients, cmd)
	}
	// Directories are durable like anything else: only after an fsync.
	r.m.Home.Sh(`sync -f "$1"`, r.m.Dir)
	time.Sleep(d)
	killed := false
	for who := range strings.SplitSeq(mode, ", ") {
		switch who {
		case "daemon":
			r.m.Die()
		case "clients":
			for _, c := range clients {
				_ = c.Process.Kill() // it may have ended with the mount
				time.Sleep(time.Duration(rnd.IntN(20)) * time.Millisecond)
			}
			killed = true
		case "umount":
			r.wait(clients, killed)
			killUnmounting(t, r.m, rnd)
		}
		time.Sleep(time.Duration(rnd.IntN(30)) * time.Millisecond)
	}
	r.wait(clients, killed)
	if strings.Contains(mode, "daemon") || strings.Contains(mode, "umount") {
		r.m.Detach()
	}
}

// wait waits for clients that were killed, or had an end that is meant.
func (r *crashRound) wait(clients []*exec.Cmd, killed bool) {
	r.t.Helper()
	for i, c := range clients {
		if c.ProcessState != nil {
			continue
		}
		if err := c.Wait(); err != nil && !(killed && c.ProcessState.ExitCode() < 0) {
			r.t.Errorf("%s: %v", crashKinds[i], err)
		}
	}
}

// killUnmounting kills the serving process while it ends, or just has.
func killUnmounting(t *testing.T, m *rig.Mount, rnd *rand.Rand) {
	t.Helper()
	server, err := unix.PidfdOpen(m.PID, 0) // its id may come again once it has ended
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(server) }()
	cmd := exec.Command(rig.Binary(t), "umount", m.Dir)
	cmd.Env = append(os.Environ(), m.Home.Env...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Duration(rnd.IntN(120)) * time.Millisecond)
	if err := unix.PidfdSendSignal(server, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		t.Fatal(err)
	}
	_ = cmd.Wait() // it waits for the process's end, whatever that was
	m.Ended()
}

// verify compares what is on the mount with the clients' logs.
func (r *crashRound) verify() {
	r.t.Helper()
	for i, kind := range crashKinds {
		c := &crashCheck{t: r.t, kind: kind, dir: r.m.Path(r.dir, kind), seed: r.seed + uint64(i)}
		b, err := os.ReadFile(filepath.Join(r.logs, kind))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			r.t.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			c.lines = append(c.lines, strings.Fields(line))
		}
		map[string]func(){"append": c.append, "rewrite": c.rewrite, "names": c.names, "sizes": c.sizes}[kind]()
	}
}

// crashCheck looks at one client's directory. A line of its log is one write(2),
// which a kill does not halve.
type crashCheck struct {
	t     *testing.T
	kind  string
	dir   string
	seed  uint64
	lines [][]string
}

func (c *crashCheck) errorf(format string, args ...any) {
	c.t.Helper()
	c.t.Errorf("%s: "+format, append([]any{c.dir}, args...)...)
}

func number(s string) int {
	n, err := strconv.Atoi(s)
	if err != nil {
		panic(err)
	}
	return n
}

// read reads a file, which never fails with anything but ENOENT.
func (c *crashCheck) read(name string) ([]byte, bool) {
	c.t.Helper()
	b, errno := readAll(filepath.Join(c.dir, name))
	if errno != 0 && errno != unix.ENOENT {
		c.errorf("%s: %s", name, errnoName(errno))
	}
	return b, errno == 0
}

// append: the file is the beginning of the stream, and has what was synced.
func (c *crashCheck) append() {
	got, _ := c.read("stream")
	if len(c.lines) > 0 {
		if want := number(c.lines[len(c.lines)-1][1]); len(got) < want {
			c.errorf("%d bytes of %d that were synced", len(got), want)
		}
	}
	want := make([]byte, len(got))
	crashPattern(want, c.seed, 0)
	if !bytes.Equal(got, want) {
		c.errorf("the %d bytes are not those of the stream", len(got))
	}
}

// rewrite: every word is as it was synced or newer, and nothing that nobody
// wrote. A write that was not synced may be half done, where it reaches from
// one chunk into the next.
func (c *crashCheck) rewrite() {
	got, _ := c.read("blocks")
	if len(c.lines) == 0 {
		return // not even the first contents were promised
	}
	if len(got) != rewriteBlocks*rewriteBlock {
		c.errorf("%d bytes, want %d", len(got), rewriteBlocks*rewriteBlock)
		return
	}
	synced, tried := make([]int, rewriteBlocks), make([]map[int]bool, rewriteBlocks)
	latest := make([]int, rewriteBlocks)
	for b := range tried {
		tried[b] = map[int]bool{0: true}
	}
	for _, l := range c.lines[1:] {
		b, v := number(l[1]), number(l[2])
		if l[0] == "ok" {
			copy(synced, latest)
		} else {
			tried[b][v], latest[b] = true, v
		}
	}
	for b := range rewriteBlocks {
		block := got[b*rewriteBlock : (b+1)*rewriteBlock]
		for at := 0; at < rewriteBlock; at += 8 {
			word := binary.BigEndian.Uint64(block[at:])
			if v := int(word & (1<<32 - 1)); int(word>>32) != b || v < synced[b] || !tried[b][v] {
				c.errorf("block %d has %x at %d; version %d was synced, %v tried", b, word, at, synced[b], sortedInts(tried[b]))
				break
			}
		}
	}
}

func sortedInts(m map[int]bool) []int { return slices.Sorted(maps.Keys(m)) }

// names: what was durable is there under its name; what was under way has the
// old name or the new one.
func (c *crashCheck) names() {
	last := map[int][]string{}
	saved, trying := -1, -1
	for _, l := range c.lines {
		i := number(l[2])
		if l[1] == "replace" {
			if trying = i; l[0] == "ok" {
				saved = i
			}
			continue
		}
		last[i] = l
	}
	for i, l := range last {
		name, moved := fmt.Sprintf("f%d", i), fmt.Sprintf("moved%d", i)
		here, there := c.holds(name, i), c.holds(moved, i)
		ok := false
		switch l[0] + " " + l[1] {
		case "try create":
			ok = true // anything, as long as it reads
		case "ok create":
			ok = here
		case "try rename":
			ok = here != there
		case "ok rename":
			ok = there && !here
		case "try remove":
			ok = true
		case "ok remove":
			ok = !here
		}
		if !ok {
			c.errorf("file %d after %q: under its name %v, under the new one %v", i, l, here, there)
		}
	}
	if saved >= 0 && !c.holds("saved", saved) && !c.holds("saved", trying) {
		c.errorf("saved is neither version %d nor %d", saved, trying)
	}
	c.read("tmp")
}

// holds reports whether a file is there with the contents of file i.
func (c *crashCheck) holds(name string, i int) bool {
	got, there := c.read(name)
	want := make([]byte, namesFile)
	crashPattern(want, c.seed+uint64(i), 0)
	return there && bytes.Equal(got, want)
}

// sizes: the file is as after the last durable step, after the one that was
// tried, or between the two where a step has a between.
func (c *crashCheck) sizes() {
	got, _ := c.read("sizes")
	pattern := make([]byte, sizesFull)
	crashPattern(pattern, c.seed, 0)
	cut := sizesFull // how much of the pattern there is
	step, n, pending := "empty", 0, ""
	for _, l := range c.lines {
		pending = ""
		if l[0] == "try" {
			pending = l[1]
		} else {
			step = l[1]
		}
		if n = number(l[2]); l[1] == "cut" {
			cut = n
		}
	}
	if len(c.lines) == 0 {
		pending = "empty"
	}
	if pending == "" {
		pending = step
	}
	ok := false
	switch pending {
	case "empty":
		ok = len(got) == 0 || step != "empty" // the old contents, which begin like the pattern
	case "fill":
		ok = len(got) <= sizesFull && bytes.HasPrefix(pattern, got) && (step != "fill" || len(got) == sizesFull)
	case "cut":
		ok = bytes.Equal(got, pattern[:n]) || step == "fill" && bytes.Equal(got, pattern)
	case "grow":
		ok = len(got) >= cut && len(got) <= n && (step != "grow" || len(got) == n) &&
			bytes.Equal(got[:cut], pattern[:cut]) && len(bytes.Trim(got[cut:], "\x00")) == 0
	}
	if !ok {
		c.errorf("%d bytes are not those of %s, tried %s %d (cut at %d)", len(got), step, pending, n, cut)
	}
}
