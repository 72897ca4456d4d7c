package integration

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/integration/kmsd/kmsserver"
	"github.com/kmsfs/kmsfs/integration/rig"
)

// logLine is a line of a mount's log.
type logLine struct {
	Level, Msg, Op, Errno, Kind, Key, Class, File, Hint, Err string

	RequestID string `json:"request_id"`
	Audit     bool
}

// logged is a mount whose log is read in pieces.
type logged struct {
	*rig.Mount
	t    *testing.T
	path string
	seen int64
}

// mountLogged mounts with a log file of JSON lines, and with nothing in it.
func (s *kmsStore) mountLogged() *logged {
	s.t.Helper()
	path := filepath.Join(s.t.TempDir(), "log")
	l := &logged{Mount: s.h.Mount(s.dir, "--log-file", path, "--log-format", "json"), t: s.t, path: path}
	l.lines()
	s.kms.ResetCalls()
	return l
}

// lines returns what was logged since the last look.
func (l *logged) lines() (out []logLine) {
	l.t.Helper()
	f, err := os.Open(l.path)
	if err != nil {
		l.t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Seek(l.seen, 0); err != nil {
		l.t.Fatal(err)
	}
	for r := bufio.NewReader(f); ; {
		line, err := r.ReadBytes('\n')
		if err != nil { // a line that is being written
			return out
		}
		l.seen += int64(len(line))
		var parsed logLine
		if err := json.Unmarshal(line, &parsed); err != nil {
			l.t.Fatalf("log line %q: %v", line, err)
		}
		for _, name := range []string{"cold-file", "new-file"} {
			if bytes.Contains(line, []byte(name)) {
				l.t.Errorf("a plaintext name in the log: %s", line)
			}
		}
		out = append(out, parsed)
	}
}

// failure returns the one line about one failed operation, and wants no other
// warning to be repeated beside it.
func (l *logged) failure(what string, want unix.Errno) logLine {
	l.t.Helper()
	var found []logLine
	others := map[string]int{}
	for _, line := range l.lines() {
		switch {
		case line.Msg == "operation failed":
			found = append(found, line)
		case line.Level != "INFO" && line.Level != "DEBUG":
			others[line.Msg+" "+line.Key]++
		}
	}
	most := 1
	if len(found) > 0 && found[0].Op == "read" { // the kernel asks again for less, when it was for reading ahead
		most = 4
	}
	if len(found) == 0 || len(found) > most {
		l.t.Errorf("%s: %d lines, want one: %+v", what, len(found), found)
		return logLine{}
	}
	if name := unix.ErrnoName(want); found[0].Errno != name {
		l.t.Errorf("%s: logged as %s, want %s: %+v", what, found[0].Errno, name, found[0])
	}
	for msg, n := range others {
		if n > 2 { // an outage begins, and ends
			l.t.Errorf("%s: %d times %q beside it", what, n, msg)
		}
	}
	return found[0]
}

var idForm = regexp.MustCompile(`^[0-9a-f]{32}$`)

// complete wants a line to say all that an operator needs to act.
func (l *logged) complete(what string, line logLine, key, class, id string) {
	l.t.Helper()
	if line.Key != key || line.Class != class || line.Hint == "" || !idForm.MatchString(line.File) || id != "" && line.File != id {
		l.t.Errorf("%s: want key %s, class %s, file %s and a hint: %+v", what, key, class, id, line)
	}
}

// failedRequests are the ids of the requests since the last look that had an
// answer, and a bad one.
func (s *kmsStore) failedRequests() map[string]bool {
	out := map[string]bool{}
	for _, c := range s.kms.Calls() {
		if c.ErrorCode != "" && c.ErrorCode != kmsserver.CodeNoAnswer {
			out[c.RequestID] = true
		}
	}
	return out
}

// TestOutageLog wants one line for each failure of the key service, with key,
// class, file id, request id (if there was an answer) and a hint; and that
// nothing at all has come into the store. TestKMSErrno has what the callers see,
// and the recovery.
func TestOutageLog(t *testing.T) {
	t.Parallel()
	var wg sync.WaitGroup
	defer wg.Wait()
	for i, tr := range troubles() {
		wg.Go(func() { // all at once: they wait
			t.Run(tr.name, func(t *testing.T) { outageLog(t, tr, placements[i%len(placements)]) })
		})
	}
}

func outageLog(t *testing.T, tr trouble, p envelope.Placement) {
	s := newKMSStore(t, p, []string{"phi"}, map[string]kmsClass{"phi": {cache: "0s"}})
	m := s.mountLogged()
	m.Put("cold-file", []byte("cold"))
	id, key := s.info(m.Path("cold-file")).ID, s.arn["phi"]
	m.Unmount()
	m.Again("--log-file", m.path, "--log-format", "json")
	time.Sleep(100 * time.Millisecond)
	before := s.h.Sh(`find "$1" -printf '%P %s\n' | grep -v '^.kmsfs/' | sort`, s.dir)

	for _, op := range []struct {
		name string
		id   string
		do   func() unix.Errno
	}{
		{"open", id, func() unix.Errno { _, errno := readAll(m.Path("cold-file")); return errno }},
		{"cut", "", func() unix.Errno { return errnoOf(os.WriteFile(m.Path("cold-file"), []byte("other"), 0o600)) }},
		{"create", "", func() unix.Errno { return errnoOf(os.WriteFile(m.Path("new-file"), []byte("x"), 0o600)) }},
	} {
		tr.begin(s)
		m.lines()
		s.kms.ResetCalls()
		if errno := op.do(); errno != tr.want {
			t.Errorf("%s: %s, want %s", op.name, errnoName(errno), errnoName(tr.want))
		}
		line := m.failure(op.name, tr.want)
		m.complete(op.name, line, key, "phi", op.id)
		if requests := s.failedRequests(); (len(requests) > 0) != requests[line.RequestID] {
			t.Errorf("%s: request %q, want one of %v", op.name, line.RequestID, slices.Collect(maps.Keys(requests)))
		}
		tr.end(s)
		if now := s.h.Sh(`find "$1" -printf '%P %s\n' | grep -v '^.kmsfs/' | sort`, s.dir); now != before {
			t.Errorf("%s: the store was\n%s\nand is\n%s", op.name, before, now)
		}
		s.recovers(m.Path("cold-file"))
	}
	if got, errno := readAll(m.Path("cold-file")); errno != 0 || string(got) != "cold" {
		t.Errorf("%q, %s", got, errnoName(errno))
	}
	m.Unmount()
}

// TestOutageOtherRows has the rows of the table that no key service has to do
// with: each is logged once, with a hint, and those that may be an attack are
// audit events.
func TestOutageOtherRows(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		s := newKMSStore(t, p, []string{"general", "phi"}, map[string]kmsClass{"general": {}, "phi": {cache: "0s"}})
		m := s.mount("phi", "sub")
		inos := map[uint64]string{}
		ids := map[string]string{}
		for _, name := range []string{"chunk", "header", "stranger", "sub/f"} {
			m.Put(name, bytes.Repeat([]byte("v"), 3*threatChunk))
			inos[inode(t, m.Path(name))], ids[name] = name, s.info(m.Path(name)).ID
		}
		m.Put("phi/f", []byte("x"))
		inos[inode(t, m.Path("phi"))], inos[inode(t, m.Path("sub"))] = "phi", "sub"
		m.Unmount()
		s.locate(inos)
		foreign := s.damage()

		l := s.mountLogged()
		for _, row := range []struct {
			name, file, class, key string
			want                   unix.Errno
			audit                  bool
			do                     func() unix.Errno
		}{
			{"damaged chunk", ids["chunk"], "general", "", unix.EIO, true, l.open("chunk")},
			{"damaged header", "", "general", "", unix.EIO, true, l.open("header")},
			{"foreign key", ids["stranger"], "general", foreign, unix.EKEYREJECTED, true, l.open("stranger")},
			{"weakened directory", "", "phi", "", unix.EPERM, false, func() unix.Errno {
				return errnoOf(os.WriteFile(l.Path("phi/new-file"), nil, 0o600))
			}},
		} {
			l.lines()
			if errno := row.do(); errno != row.want {
				t.Errorf("%s: %s, want %s", row.name, errnoName(errno), errnoName(row.want))
			}
			line := l.failure(row.name, row.want)
			if line.Audit != row.audit || row.file != "" && line.File != row.file || line.Class != row.class || line.Key != row.key || line.Hint == "" {
				t.Errorf("%s: want audit %v, class %s, file %q, key %q and a hint: %+v", row.name, row.audit, row.class, row.file, row.key, line)
			}
		}
		l.Unmount()
	})
}

// damage changes the store: a chunk, a header, a recipient, a directory's
// record. It returns the key of the changed recipient.
func (s *kmsStore) damage() (foreign string) {
	s.t.Helper()
	body := s.body("chunk")
	s.slot(body, 1)[100] ^= 1
	s.setBody("chunk", body)
	h := s.header("header")
	h[headerFields["commitment"]] ^= 1
	s.setHeader("header", h)
	foreign, err := s.kms.CreateKey(kmsserver.KeyOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	stranger, err := envelope.Parse(s.header("stranger"))
	if err != nil {
		s.t.Fatal(err)
	}
	stranger.Recipients[0].Wrapped.Key = foreign
	b, err := stranger.Encode(headerSize)
	if err != nil {
		s.t.Fatal(err)
	}
	s.setHeader("stranger", b)
	weak, strong := s.path("sub"), s.path("phi")
	s.write(filepath.Join(strong, ".kmsfs.dir"), s.read(filepath.Join(weak, ".kmsfs.dir")))
	s.setAttr(strong, dirAttr, s.attr(weak, dirAttr))
	return foreign
}

// open returns what reads a file.
func (l *logged) open(name string) func() unix.Errno {
	return func() unix.Errno { _, errno := readAll(l.Path(name)); return errno }
}

// credentialSource is a place that renewed credentials come to.
type credentialSource struct {
	name string
	// put writes credentials there, good for the time given.
	put func(t *testing.T, dir string, p kmsserver.Principal, good time.Duration)
	env func(dir string) []string
}

// TestOutageCredentials lets the credentials of a mount expire, and puts new ones
// where it got them from: it takes them up without a remount.
func TestOutageCredentials(t *testing.T) {
	t.Parallel()
	rig.Need(t, "sh")
	file := func(t *testing.T, path, text string, mode os.FileMode) {
		t.Helper()
		if err := os.WriteFile(path+".tmp", []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".tmp", path); err != nil {
			t.Fatal(err)
		}
	}
	sources := []credentialSource{
		{
			name: "shared credentials file",
			put: func(t *testing.T, dir string, p kmsserver.Principal, _ time.Duration) {
				file(t, dir+"/credentials", fmt.Sprintf("[default]\naws_access_key_id = %s\naws_secret_access_key = %s\naws_session_token = %s\n",
					p.AccessKeyID, p.SecretAccessKey, p.SessionToken), 0o600)
			},
			env: func(dir string) []string { return []string{"AWS_SHARED_CREDENTIALS_FILE=" + dir + "/credentials"} },
		},
		{
			name: "credential process",
			put: func(t *testing.T, dir string, p kmsserver.Principal, good time.Duration) {
				text, err := json.Marshal(map[string]any{"Version": 1, "AccessKeyId": p.AccessKeyID, "SecretAccessKey": p.SecretAccessKey,
					"SessionToken": p.SessionToken, "Expiration": time.Now().Add(good).UTC().Format(time.RFC3339)})
				if err != nil {
					t.Fatal(err)
				}
				file(t, dir+"/answer.json", string(text), 0o600)
				file(t, dir+"/config", "[default]\ncredential_process = cat "+dir+"/answer.json\n", 0o600)
			},
			env: func(dir string) []string {
				return []string{"AWS_CONFIG_FILE=" + dir + "/config", "AWS_SDK_LOAD_CONFIG=1"}
			},
		},
	}
	for _, source := range sources {
		t.Run(source.name, func(t *testing.T) {
			t.Parallel()
			s := newKMSStore(t, envelope.Prefix, []string{"phi"}, map[string]kmsClass{"phi": {cache: "0s"}})
			session := func(n int) kmsserver.Principal {
				p := kmsserver.Principal{AccessKeyID: fmt.Sprintf("ASIAKMSDSESSION%05d", n), SecretAccessKey: "secret", SessionToken: fmt.Sprintf("token%d", n),
					ARN: kmsserver.DefaultPrincipal().ARN, Policy: kmsserver.DefaultPrincipal().Policy}
				if err := s.kms.AddPrincipal(p); err != nil {
					t.Fatal(err)
				}
				return p
			}
			dir := t.TempDir()
			first, second := session(1), session(2)
			source.put(t, dir, first, time.Hour)
			h := *s.h
			h.Env = slices.DeleteFunc(slices.Clone(s.h.Env), func(v string) bool {
				return strings.HasPrefix(v, "AWS_ACCESS_KEY_ID=") || strings.HasPrefix(v, "AWS_SECRET_") || strings.HasPrefix(v, "AWS_SESSION_")
			})
			h.Env = append(h.Env, source.env(dir)...)
			m := h.Mount(s.dir)
			m.Put("f", []byte("x"))
			m.Unmount() // close(2) does not wait until the mount has forgotten the file and its key
			m.Again()
			for _, c := range s.kms.Calls() {
				if c.EventName == "GenerateDataKey" && c.UserIdentity.AccessKeyID == first.AccessKeyID {
					first.Expired = true // this mount does use it
				}
			}
			if !first.Expired {
				t.Fatal("the mount has other credentials")
			}
			if err := s.kms.SetExpired(first.AccessKeyID, true); err != nil {
				t.Fatal(err)
			}
			if _, errno := readAll(m.Path("f")); errno != unix.EACCES {
				t.Errorf("with expired credentials: %s, want EACCES", errnoName(errno))
			}
			source.put(t, dir, second, time.Hour)
			s.recovers(m.Path("f"))
			m.Unmount()
		})
	}
}

// TestOutageRecoveryTime: a mount that an outage has found busy works again as
// soon as the service does, for files that were tried in the outage and for
// others, and an outage costs only the first callers its budget.
func TestOutageRecoveryTime(t *testing.T) {
	t.Parallel()
	for _, kind := range []kmsserver.Outage{kmsserver.OutageRefuse, kmsserver.OutageHang, kmsserver.OutageUnavailable} {
		t.Run(string(kind), func(t *testing.T) {
			t.Parallel()
			s := newKMSStore(t, envelope.Prefix, []string{"general"}, map[string]kmsClass{"general": {}})
			m := s.mount("d")
			const n = 40
			fillRecords(t, m.Path("d"), n)
			s.again(m)
			s.faults(kmsserver.Faults{Outage: kind})
			start := time.Now()
			for i := range n / 2 {
				if _, errno := readAll(m.Path("d", fmt.Sprintf("record-%05d", i))); errno != unix.ETIMEDOUT {
					t.Fatalf("file %d: %s, want ETIMEDOUT", i, errnoName(errno))
				}
			}
			took := time.Since(start)
			t.Logf("%d opens in the outage took %v", n/2, took)
			if took > n/2*5*time.Second { // half of the budget each
				t.Errorf("%d opens took %v: each used up its budget", n/2, took)
			}
			s.faults(kmsserver.Faults{})
			s.recovers(m.Path("d", fmt.Sprintf("record-%05d", n/2-1)))
			time.Sleep(2 * time.Second) // failures are remembered for one, of the key and of a file
			readInOrder(t, m.Path("d"), func(int) {})
			m.Put("new", []byte("x"))
			m.Unmount()
		})
	}
}

// TestOutageNoSpuriousErrors: short faults, within what retries bridge, are
// seen by nobody.
func TestOutageNoSpuriousErrors(t *testing.T) {
	t.Parallel()
	for _, code := range []string{"ThrottlingException", "KMSInternalException", kmsserver.CodeReset} {
		t.Run(code, func(t *testing.T) {
			t.Parallel()
			s := newKMSStore(t, envelope.Prefix, []string{"general"}, map[string]kmsClass{"general": {}})
			m := s.mount("d")
			const n = 30
			fillRecords(t, m.Path("d"), n)
			s.again(m)
			s.faults(kmsserver.Faults{Rules: []kmsserver.Fault{{Error: code, Times: 3}}})
			readInOrder(t, m.Path("d"), func(int) {})
			s.faults(kmsserver.Faults{Rules: []kmsserver.Fault{{Operations: []string{"GenerateDataKey"}, Error: code, Times: 3}}})
			for i := range n {
				m.Put(fmt.Sprintf("new%d", i), []byte("x"))
			}
			m.Unmount()
			s.fsck(0)
		})
	}
}
