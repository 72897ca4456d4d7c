package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kmsfs/kmsfs/integration/kmsd/kmsserver"
	"github.com/kmsfs/kmsfs/integration/rig"
)

// outageTool is a tool that copies from or to a mount while KMS is down.
// Scripts get $1, the mount, and $2, a directory on the disk.
type outageTool struct {
	name, needs string
	prepare     string // before the outage; "" is nothing
	copies      string // in the outage, and again after it
	code        int    // of copies in the outage
	result      string // unpacks what copies made into $2/result, after the outage
	again       string // run before copies is run again; "" is nothing
}

var (
	// readers copy $1/tree.
	readers = []outageTool{
		{name: "cp", needs: "cp", copies: `cp -a "$1"/tree "$2"/`, code: 1, result: `cp -a "$2"/tree "$2"/result`},
		{name: "rsync", needs: "rsync", copies: `rsync -aHAX "$1"/tree/ "$2"/tree/`, code: 23, result: `cp -a "$2"/tree "$2"/result`},
		{name: "tar", needs: "tar", copies: `tar --format=posix -cf "$2"/x.tar -C "$1" tree`, code: 2,
			result: `mkdir "$2"/x; tar -xpf "$2"/x.tar -C "$2"/x; mv "$2"/x/tree "$2"/result; rmdir "$2"/x`},
		{name: "restic", needs: "restic", prepare: `restic -r "$2"/repo init`, copies: `cd "$1"; restic -r "$2"/repo backup tree`, code: 3,
			result: `restic -r "$2"/repo check --read-data; restic -r "$2"/repo restore latest --target "$2"/x; mv "$2"/x/tree "$2"/result; rmdir "$2"/x`},
		// Borg warns, skips and says 1: a thin backup that looks like one with
		// a file that changed. This is what a hook has to look at.
		{name: "borg", needs: "borg", prepare: `borg init -e repokey "$2"/repo`, copies: `cd "$1"; borg create "$2"/repo::{now:%s%f} tree`, code: 1,
			result: `borg check --verify-data "$2"/repo; mkdir "$2"/x; cd "$2"/x; borg extract "$2"/repo::$(borg list --short --last 1 "$2"/repo); mv tree "$2"/result; rmdir "$2"/x`},
	}
	// writers copy $2/tree.
	writers = []outageTool{
		{name: "cp", needs: "cp", copies: `cp -a "$2"/tree "$1"/`, code: 1, result: `cp -a "$1"/tree "$2"/result`},
		{name: "rsync", needs: "rsync", copies: `rsync -aHAX "$2"/tree/ "$1"/tree/`, code: 23, result: `cp -a "$1"/tree "$2"/result`},
		// Restic tries again for minutes. It is killed meanwhile.
		{name: "restic", needs: "restic", prepare: `restic -r "$1"/repo init`, copies: `cd "$2"; timeout -s KILL 30 restic -r "$1"/repo backup tree || exit $?`, code: 137,
			again:  `restic -r "$1"/repo unlock; restic -r "$1"/repo check --read-data`,
			result: `restic -r "$1"/repo check --read-data; restic -r "$1"/repo restore latest --target "$2"/x; mv "$2"/x/tree "$2"/result; rmdir "$2"/x`},
		{name: "tar", needs: "tar", prepare: `tar --format=posix -cf "$2"/x.tar -C "$2" tree`, copies: `tar -xpf "$2"/x.tar -C "$1"`, code: 2, result: `cp -a "$1"/tree "$2"/result`},
		{name: "borg", needs: "borg", prepare: `borg init -e repokey "$1"/repo`, copies: `cd "$2"; borg create "$1"/repo::{now:%s%f} tree`, code: 2,
			again:  `borg break-lock "$1"/repo; borg check --verify-data "$1"/repo`,
			result: `borg check --verify-data "$1"/repo; mkdir "$2"/x; cd "$2"/x; borg extract "$1"/repo::$(borg list --short --last 1 "$1"/repo); mv tree "$2"/result; rmdir "$2"/x`},
	}
)

// outage is a mount of a store whose one class is under AWS KMS, no data key of
// which is kept.
type outage struct {
	t    *testing.T
	h    *rig.Home
	m    *rig.Mount
	kms  *kmsserver.Server
	disk string
	want tree
}

func newOutage(t *testing.T) *outage {
	t.Helper()
	rig.Need(t, "root", "fuse")
	s := kmsserver.StartT(t, kmsserver.Options{})
	arn, err := s.CreateKey(kmsserver.KeyOptions{})
	if err != nil {
		t.Fatal(err)
	}
	o := &outage{t: t, kms: s, disk: t.TempDir()}
	o.h = rig.NewHome(t, append(s.Env(kmsserver.DefaultPrincipal()), "RESTIC_PASSWORD=x", "RESTIC_CACHE_DIR="+t.TempDir(),
		"BORG_PASSPHRASE=x", "BORG_BASE_DIR="+t.TempDir())...)
	policy := filepath.Join(o.disk, "policy.yaml")
	put(t, policy, fmt.Appendf(nil, "version: 1\ndefault: phi\nclasses:\n  phi: { keys: [%q], cache: 0s }\n", arn))
	o.h.Run("init", "--policy", policy, filepath.Join(o.disk, "S"))
	o.m = o.h.Mount(filepath.Join(o.disk, "S"))
	tree := filepath.Join(o.disk, "tree")
	o.h.Sh(`mkdir -p "$1"/d; cd "$1"; : >empty; ln -s d link`, tree)
	put(t, tree+"/a", noise(1000, 1))
	put(t, tree+"/d/b", noise(3_000_000, 2))
	put(t, tree+"/d/c", noise(40_000, 3))
	setTimes(t, tree)
	o.want = readTree(t, tree)
	return o
}

func (o *outage) faults(f kmsserver.Faults) {
	o.t.Helper()
	if err := o.kms.SetFaults(f); err != nil {
		o.t.Fatal(err)
	}
}

// start makes all ready and ends with KMS down and no data key in memory.
func (o *outage) start(tool outageTool, down kmsserver.Faults) {
	o.t.Helper()
	rig.Need(o.t, tool.needs)
	if tool.prepare != "" {
		o.h.Sh(tool.prepare, o.m.Dir, o.disk)
	}
	o.m.Unmount()
	o.m.Again()
	o.faults(down)
}

// finish ends the outage in which r came about, checks what is there, and
// copies again. What the tool left under a name of the tree is not there at
// all, or whole, or visibly not (another size): never the right size with other
// bytes.
func (o *outage) finish(tool outageTool, r rig.Result) {
	o.t.Helper()
	o.faults(kmsserver.Faults{})
	if r.Code != tool.code {
		o.t.Errorf("%s in the outage: exit %d, want %d\n%s%s", tool.name, r.Code, tool.code, r.Stdout, r.Stderr)
	}
	if !strings.Contains(r.Stdout+r.Stderr, "onnection timed out") {
		o.t.Errorf("%s in the outage does not say why:\n%s%s", tool.name, r.Stdout, r.Stderr)
	}
	// A question that hangs is given up after two seconds, and then the next one
	// finds the service back; a failure is remembered for a second.
	o.h.Sh(`for i in $(seq 200); do (echo x > "$1"/probe) 2>/dev/null && break; sleep .1; done; rm "$1"/probe`, o.m.Dir)
	time.Sleep(1100 * time.Millisecond)
	if tool.again != "" {
		o.h.Sh(tool.again, o.m.Dir, o.disk)
	}
	if r := o.h.TrySh(tool.result, o.m.Dir, o.disk); r.Code == 0 {
		o.partial(tool.name, readTree(o.t, o.disk+"/result"))
	} else if _, err := os.Stat(o.disk + "/result"); err == nil {
		o.t.Errorf("%s: unpacking after the outage: %s", tool.name, r.Stderr)
	}
	o.h.Sh(`rm -rf "$1"/result "$1"/x`, o.disk)
	o.h.Sh(tool.copies, o.m.Dir, o.disk)
	o.h.Sh(tool.result, o.m.Dir, o.disk)
	mustEqual(o.t, tool.name+" after the outage", readTree(o.t, o.disk+"/result"), o.want)
	o.m.Unmount()
	o.h.Run("fsck", o.m.Store)
}

func (o *outage) partial(tool string, got tree) {
	o.t.Helper()
	missing := 0
	for name, want := range o.want {
		g, ok := got[name]
		switch {
		case !ok || g.size != want.size:
			missing++
		case g.sum != want.sum || g.target != want.target:
			o.t.Errorf("%s: %q has the right size and the wrong contents", tool, name)
		}
	}
	if missing == 0 {
		o.t.Errorf("%s: all is there: there was no outage", tool)
	}
}

// TestOutageTools backs up a mount, copies to a mount, and writes a repository
// on a mount, while KMS is down from the start or from the second file on.
func TestOutageTools(t *testing.T) {
	t.Parallel()
	var tools []outageTool
	var outages []*outage
	for i, tool := range readers {
		o := newOutage(t)
		o.h.Sh(`cp -a "$1"/tree "$2"/; rm -r "$1"/tree`, o.disk, o.m.Dir)
		tool.name += " from a mount"
		o.start(tool, faultsOf("Decrypt", i))
		tools, outages = append(tools, tool), append(outages, o)
	}
	for i, tool := range writers {
		o := newOutage(t)
		tool.name += " to a mount"
		o.start(tool, faultsOf("GenerateDataKey", i))
		tools, outages = append(tools, tool), append(outages, o)
	}
	results := make([]rig.Result, len(tools))
	var wg sync.WaitGroup // all at once: they mostly wait for KMS
	for i, tool := range tools {
		wg.Go(func() { results[i] = outages[i].h.TrySh(tool.copies, outages[i].m.Dir, outages[i].disk) })
	}
	wg.Wait()
	for i, tool := range tools {
		outages[i].finish(tool, results[i])
	}
}

// faultsOf picks the i-th way for KMS to be down: as a whole, or, for even i, for all but the first call of an operation.
func faultsOf(operation string, i int) kmsserver.Faults {
	whole := []kmsserver.Outage{kmsserver.OutageRefuse, kmsserver.OutageUnavailable, kmsserver.OutageHang}
	if i%2 == 0 {
		return kmsserver.Faults{Rules: []kmsserver.Fault{{Operations: []string{operation}, Skip: 1, Error: "KMSInternalException"}}}
	}
	return kmsserver.Faults{Outage: whole[i/2%len(whole)]}
}

// TestOutageOpenFiles goes on with what is open, and opens what is empty.
func TestOutageOpenFiles(t *testing.T) {
	t.Parallel()
	o := newOutage(t)
	o.h.Sh(`cp -a "$1"/tree "$2"/`, o.disk, o.m.Dir)
	f, err := os.OpenFile(o.m.Path("tree/a"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	o.faults(kmsserver.Faults{Outage: kmsserver.OutageRefuse})
	defer o.faults(kmsserver.Faults{})
	if _, err := f.WriteAt([]byte("in the outage"), 900); err != nil {
		t.Error(err)
	}
	if err := f.Sync(); err != nil {
		t.Error(err)
	}
	want := slices.Concat(noise(1000, 1)[:900], []byte("in the outage"), noise(1000, 1)[913:])
	got := make([]byte, 1000)
	if _, err := f.ReadAt(got, 0); err != nil || string(got) != string(want) {
		t.Errorf("an open file reads wrongly: %v", err)
	}
	// No key: metadata, names and empty files.
	o.h.Sh(`cd "$1"/tree; ls -laR; find . -newer a; mv a a2; ln a2 a3; rm a3; chmod 600 a2; mkdir e; rmdir e; cat empty
		touch -d @7 a2; stat a2; rm d/c; ln -s x y; setfattr -n user.k -v v a2; mv d d3`, o.m.Dir)
}
