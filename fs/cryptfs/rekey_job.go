package cryptfs

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/record"
)

// Rekey and reclassify are jobs: they may be killed at any moment, and go on
// when they are called again. What a job has to remember lies in a directory of
// its own under .kmsfs, its staging directory (docs/format.md, section 14).
const (
	rekeyDir      = "rekey"      // in metaDir
	reclassifyDir = "reclassify" // in metaDir
	jobFile       = "job"        // in either
	jobKeyInfo    = "kmsfs v1 jobs"
	maxJob        = 1 << 20 // bytes of a job record

	rekeyMagic      = "kmsfs rekey 1\n"
	reclassifyMagic = "kmsfs reclassify 1\n"
)

// JobConfig is what every job takes.
type JobConfig struct {
	// Wait is called before each file that is encrypted again, and may hold it
	// back; its error ends the job. nil: nothing waits.
	Wait func(context.Context) error
	// Progress is called after each file, from several goroutines. nil: nobody
	// is told.
	Progress func(JobProgress)
	// Concurrent is how many files are done at once; 0: as many as suit the
	// machine. Most of a small file's time is waiting for the key service and
	// the disk.
	Concurrent int
}

// crew runs a job's work on files, several at a time.
type crew struct {
	*errgroup.Group
	alone bool // one after the other, in the caller's goroutine
}

func (c JobConfig) crew(ctx context.Context) (crew, context.Context) {
	g, ctx := errgroup.WithContext(ctx)
	n := c.Concurrent
	if n <= 0 {
		n = max(16, 4*runtime.GOMAXPROCS(0))
	}
	g.SetLimit(n)
	return crew{g, n == 1}, ctx
}

// do calls f; its error ends the job.
func (c crew) do(f func() error) {
	if !c.alone {
		c.Go(f)
	} else if err := f(); err != nil {
		c.Go(func() error { return err })
	}
}

// JobProgress is how far a job is. Bytes are those of store files.
type JobProgress struct{ Files, TotalFiles, Bytes, TotalBytes uint64 }

// JobFailure is a file that a job could not do. Path is the plaintext path, or
// the ciphertext path where that cannot be told.
type JobFailure struct {
	Path string     `json:"path"`
	What string     `json:"what"`
	Kind fault.Kind `json:"-"`
	Name string     `json:"kind"` // the kind's name
}

func newFailure(path string, err error) JobFailure {
	k := fault.Of(err)
	return JobFailure{Path: path, What: err.Error(), Kind: k, Name: k.String()}
}

// fatal reports whether a failure concerns the whole job rather than one file.
func fatal(ctx context.Context, err error) bool {
	return ctx.Err() != nil || errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.EROFS) ||
		errors.Is(err, errStep) || errors.Is(err, errHalf) || fault.Of(err) == fault.KeyUnavailable
}

// errHalf means that some names of a file are moved and some are not.
var errHalf = errors.New("cryptfs: the next mount, or the same call, moves the other names of a file")

// errStep is what tests make a step fail with.
var errStep = errors.New("cryptfs: step failed")

// let is lifted for a job, which works on several files of a directory at once:
// only one of them at a time changes its mode. f may be called twice.
func (v *Volume) let(d *backing.Dir, f func() error) error {
	err := f()
	if !errors.Is(err, unix.EACCES) {
		return err
	}
	v.jobs.mu.Lock()
	defer v.jobs.mu.Unlock()
	return lifted(d, f)
}

// step is called before each change of the store that a job or its recovery
// makes: another machine may have taken the store over meanwhile. Tests look at
// the store there, or make it fail.
func (v *Volume) step(what string) error {
	if v.conf.onStep != nil {
		if err := v.conf.onStep(what); err != nil {
			return err
		}
	}
	return v.held()
}

// jobKeys authenticates job records, and marks the file ids of a job.
type jobKeys struct {
	key *keymem.Key
	mu  sync.Mutex // held while a directory lets its owner in, see let
}

func newJobKeys(storeKey *envelope.FileKey) (*jobKeys, error) {
	key, err := subKey(storeKey, jobKeyInfo)
	return &jobKeys{key: key}, err
}

func (k *jobKeys) wipe() {
	if k != nil {
		k.key.Wipe()
	}
}

// writeJob replaces a job record: the magic line, a line of JSON, and the MAC
// over both.
func (k *jobKeys) writeJob(stage *backing.Dir, magic string, body any) error {
	b, err := json.Marshal(body)
	if err != nil {
		return err
	}
	signed := append(append([]byte(magic), b...), '\n')
	mac := hmacSum(k.key, signed)
	return stage.Replace(jobFile, fmt.Appendf(signed, "mac %x\n", mac), 0o600)
}

// readJob reads a job record into body; ENOENT if there is none.
func (k *jobKeys) readJob(stage *backing.Dir, magic string, body any) error {
	b, err := stage.ReadFile(jobFile, maxJob)
	if err != nil {
		return err
	}
	const macLen = len("mac \n") + 2*record.MACLen
	rest, ok := bytes.CutPrefix(b, []byte(magic))
	if !ok || len(rest) <= macLen {
		return ErrJob
	}
	signed, line := b[:len(b)-macLen], b[len(b)-macLen:]
	mac := hmacSum(k.key, signed)
	if !hmac.Equal(line, fmt.Appendf(nil, "mac %x\n", mac)) {
		return ErrJob
	}
	dec := json.NewDecoder(bytes.NewReader(signed[len(magic):]))
	dec.DisallowUnknownFields()
	if err := dec.Decode(body); err != nil {
		return fmt.Errorf("%w: %w", ErrJob, err)
	}
	return nil
}

// rekeyJob is the record of a rekey that is under way.
type rekeyJob struct {
	Job       string    `json:"job"` // 32 hexadecimal digits
	Started   time.Time `json:"started"`
	Cutoff    time.Time `json:"cutoff"`    // of --older-than; zero: none
	Selection string    `json:"selection"` // MAC of what the user asked for
}

// markLen is how much of a file id that a job makes is random; the rest tells
// that the job made it. So a job that goes on knows what it has done from the
// headers alone, however it ended.
const markLen = 10

// newID returns a file id of the job.
func (k *jobKeys) newID(job *rekeyJob) (id envelope.ID) {
	_, _ = rand.Read(id[:markLen])
	k.mark(job, &id)
	return id
}

// made reports whether a file id is the job's.
func (k *jobKeys) made(job *rekeyJob, id envelope.ID) bool {
	want := id
	k.mark(job, &want)
	return hmac.Equal(want[:], id[:])
}

func (k *jobKeys) mark(job *rekeyJob, id *envelope.ID) {
	sum := hmacSum(k.key, []byte("rekey id\x00"), []byte(job.Job), id[:markLen])
	copy(id[markLen:], sum[:])
}

// selection authenticates what the user asked for, which may hold plaintext
// paths, without telling it.
func (k *jobKeys) selection(s string) string {
	sum := hmacSum(k.key, []byte("rekey selection\x00"), []byte(s))
	return hex.EncodeToString(sum[:sha256.Size])
}

// recoverJobs finishes what a job that was killed left half done, so that
// nobody sees it: names of one file that are two, and a tree that was exchanged
// but not removed. The rest of the job waits until it is called again.
func (v *Volume) recoverJobs(ctx context.Context, storeKey *envelope.FileKey) (err error) {
	if v.jobs, err = newJobKeys(storeKey); err != nil {
		return err
	}
	if err := v.finishRekey(ctx); err != nil {
		return fmt.Errorf("finishing a rekey that was interrupted: %w", err)
	}
	if err := v.finishReclassify(ctx); err != nil {
		// What is left takes room, and does no harm.
		v.log.Error("what a reclassification replaced cannot be removed; the next mount tries again", "error", err)
	}
	return ctx.Err()
}

// stageDir opens a job's staging directory, making it if need be.
func (v *Volume) stageDir(name string) (*backing.Dir, error) {
	if err := v.meta.Mkdir(name, 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, err
	}
	return v.meta.OpenDir(name)
}

// endStage removes a staging directory in which only the job record is left.
func (v *Volume) endStage(stage *backing.Dir, name string) error {
	if err := v.step("remove job record"); err != nil {
		return err
	}
	if err := stage.Unlink(jobFile); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	err := v.meta.Rmdir(name)
	if errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST) {
		v.log.Warn("something is left in a staging directory", "dir", name)
		return nil
	}
	return err
}
