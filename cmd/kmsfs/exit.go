package main

import (
	"context"
	"errors"
	"syscall"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/crypto/keywrap/keyring"
	"github.com/kmsfs/kmsfs/fs/cryptfs"
	"github.com/kmsfs/kmsfs/fs/fusefs"
	"github.com/kmsfs/kmsfs/fs/rewrap"
	"github.com/kmsfs/kmsfs/fs/salvage"
)

// The exit codes. docs/cli.md documents them; scripts rely on them.
const (
	exitOK          = 0
	exitFailure     = 1   // any failure that has no code of its own
	exitUsage       = 2   // wrong arguments, options or policy
	exitNoStore     = 3   // not a store, or one of a newer format
	exitDamage      = 4   // something in the store fails authentication
	exitKeys        = 5   // keys not available: denied, missing, revoked, throttled, passphrase
	exitBusy        = 6   // locked or busy
	exitUntrusted   = 7   // the store or its keys are not those this machine trusts
	exitNoFUSE      = 8   // FUSE does not work here
	exitFull        = 9   // disk or quota full
	exitUnwell      = 10  // kmsfs doctor found errors
	exitKeyNeeded   = 11  // kmsfs keys: something depends on the key
	exitInterrupted = 130 // SIGINT or SIGTERM, as a shell reports it
)

// outcome is what one kind of failure means to whoever started the program.
type outcome struct {
	code int
	hint string // used where the error brings none
}

const noFUSEHint = "load the module (modprobe fuse), install the package fuse3, and in a container pass /dev/fuse"

// sentinelOutcomes are the errors whose code differs from that of their kind,
// or that have a hint of their own. The first match counts.
var sentinelOutcomes = []struct {
	is error
	outcome
}{
	{errUsage, outcome{exitUsage, "run kmsfs --help"}},
	{errNoStore, outcome{exitNoStore, "give the directory that kmsfs init made"}},
	{cryptfs.ErrNoStore, outcome{exitNoStore, "give the directory that kmsfs init made"}},
	{cryptfs.ErrNewerFormat, outcome{exitNoStore, "use a newer kmsfs"}},
	{cryptfs.ErrRecordLost, outcome{exitDamage, "kmsfs fsck --repair STORE restores it; kmsfs salvage reads a store without it"}},
	{cryptfs.ErrLocked, outcome{exitBusy, "unmount it first (kmsfs status lists the mounts), or open it with --read-only"}},
	{cryptfs.ErrElsewhere, outcome{exitBusy, "unmount it there first, or open it with --read-only"}},
	{cryptfs.ErrKeysChanged, outcome{exitUntrusted, "if you know why they changed: kmsfs known-stores accept STORE"}},
	{cryptfs.ErrNotEmpty, outcome{exitFailure, "give a new or empty directory"}},
	{cryptfs.ErrNotEmptyDir, outcome{exitFailure, "make a new directory, classify it, and copy the files into it"}},
	{cryptfs.ErrNoXattrs, outcome{exitFailure, "choose --placement header or sidecar"}},
	{cryptfs.ErrKeyInUse, outcome{exitFailure, "move the key to retired, run kmsfs rewrap STORE, then take it out"}},
	{salvage.ErrNotEmpty, outcome{exitFailure, "give a directory for OUT that does not exist"}},
	{rewrap.ErrKeysChanged, outcome{exitUntrusted, "if you know why they changed: kmsfs known-stores accept STORE"}},
	{rewrap.ErrLocked, outcome{exitBusy, "try again when the other command is done"}},
	{rewrap.ErrUnfinished, outcome{exitBusy, "mount the store once, or run kmsfs fsck --repair STORE"}},
	{rewrap.ErrKey, outcome{exitUsage, "kmsfs policy show STORE prints the keys of each class"}},
	{errKeyNeeded, outcome{exitKeyNeeded, ""}},
	{fusefs.ErrNoFuse, outcome{exitNoFUSE, noFUSEHint}},
	{fusefs.ErrOption, outcome{exitUsage, "kmsfs mount --help names the -o options"}},
	{fusefs.ErrRefused, outcome{exitFailure, "--allow-other needs user_allow_other in /etc/fuse.conf; the mountpoint must be yours; the log file has the words of fusermount3"}},
	{errNotTrusted, outcome{exitUntrusted, "if you know this store, give --trust; kmsfs policy show STORE prints its keys"}},
	{errKnownStores, outcome{exitUntrusted, "repair the known-stores file, or move it away and trust your stores again"}},
	{errNoFUSE, outcome{exitNoFUSE, noFUSEHint}},
	{errBusy, outcome{exitBusy, "try again when the other user of it is done"}},
	{errNotAMount, outcome{exitUsage, "kmsfs status lists the mounts"}},
	{errNeedPassphrase, outcome{exitKeys, "give --passphrase-file FILE, or run on a terminal"}},
	{errDamage, outcome{exitDamage, "restore what is damaged from a backup"}},
	{errUnwell, outcome{exitUnwell, "do what the remedies say"}},
	{errFailedOfLate, outcome{exitFailure, "what ran meanwhile may have left out files: run it again"}},
	{errKeysNotUsable, outcome{exitKeys, "see the messages above for each key"}},
	{keyring.ErrPassphrase, outcome{exitKeys, "give the keyring's passphrase; --keyring names another file"}},
	{keyring.ErrNeedPassphrase, outcome{exitKeys, "give --passphrase-file FILE, or run on a terminal"}},
	{keyring.ErrNoFile, outcome{exitKeys, "give the file with --keyring, or make one with kmsfs keyring create"}},
	{keyring.ErrFormat, outcome{exitKeys, "restore the keyring file from a backup"}},
	{keyring.ErrPermissions, outcome{exitKeys, "chmod 600 the keyring file"}},
	{keyring.ErrExists, outcome{exitFailure, "kmsfs keyring list shows the keys; choose another name"}},
	{keyring.ErrLocked, outcome{exitBusy, "try again when the other process is done"}},
	{keyring.ErrWindow, outcome{exitUsage, "give --days 7 to 30"}},
	{keyring.ErrNotPending, outcome{exitFailure, "kmsfs keyring list shows the states"}},
	{context.Canceled, outcome{exitInterrupted, ""}},
	{context.DeadlineExceeded, outcome{exitKeys, "the key service or the disk did not answer in time; try again"}},
}

// kindOutcomes has a row for every fault kind.
var kindOutcomes = map[fault.Kind]outcome{
	fault.Integrity:      {exitDamage, "the store was damaged or altered: run kmsfs fsck STORE, and compare with a backup"},
	fault.BadFormat:      {exitDamage, "the store was damaged or altered: run kmsfs fsck STORE, and compare with a backup"},
	fault.KeyDenied:      {exitKeys, "check the credentials and the key's policy"},
	fault.KeyMissing:     {exitKeys, "check that the key exists and is enabled: kmsfs keyring list, or aws kms describe-key"},
	fault.KeyRevoked:     {exitKeys, "the key is pending deletion; cancel that while there is time"},
	fault.KeyExpired:     {exitKeys, "import the key material again"},
	fault.KeyRejected:    {exitUntrusted, "kmsfs policy show STORE prints the store's keys, kmsfs known-stores list those this machine trusts"},
	fault.KeyUnavailable: {exitKeys, "the key service cannot be reached; check the network and the Region, then try again"},
	fault.Forbidden:      {exitFailure, "the policy forbids this; kmsfs policy show STORE prints it"},
	fault.CrossClass:     {exitFailure, "copy instead, so that the file is encrypted under the other class"},
	fault.Unsupported:    {exitFailure, ""},
	fault.Invalid:        {exitUsage, "run the command with --help"},
	fault.TooLong:        {exitUsage, ""},
	fault.Conflict:       {exitBusy, "something else uses the store: kmsfs status lists the mounts"},
}

// errnoOutcomes are the operating system's answers that scripts tell apart.
// Every other errno is exitFailure.
var errnoOutcomes = map[syscall.Errno]outcome{
	syscall.ENOSPC: {exitFull, "make room on the disk"},
	syscall.EDQUOT: {exitFull, "make room in the quota"},
	syscall.EBUSY:  {exitBusy, "fuser -vm PATH shows who uses it"},
	syscall.EACCES: {exitFailure, "check the permissions, or run as the owner of the files"},
	syscall.EPERM:  {exitFailure, "check the permissions, or run as root"},
	syscall.EROFS:  {exitFailure, "the file system is read-only; mount the store with --read-only"},
	syscall.ENOENT: {exitFailure, "check the path; kmsfs ls STORE lists a store's files"},
	syscall.EISDIR: {exitFailure, "give a file; kmsfs ls STORE PATH lists a directory"},
	syscall.EIO:    {exitDamage, "the mount's log file tells which file is damaged"},

	// A mount's answers about keys; fs/fusefs/errno.go has the table.
	syscall.ENOKEY:       {exitKeys, "the key is disabled or missing; the mount's log names it"},
	syscall.EKEYREVOKED:  {exitKeys, "the key is pending deletion; the mount's log names it"},
	syscall.EKEYEXPIRED:  {exitKeys, "the key's material has expired; the mount's log names it"},
	syscall.EKEYREJECTED: {exitUntrusted, "the key is not allowed for the class; the mount's log names it"},
	syscall.ETIMEDOUT:    {exitKeys, "the key service did not answer; try again"},
}

// explain translates an error, once: into an exit code, what is wrong, and
// what to do (possibly ""). err is not nil.
func explain(err error) (code int, text, hint string) {
	var remote *remoteError
	if errors.As(err, &remote) {
		return remote.Code, remote.Text, remote.Hint
	}
	o := outcomeOf(err)
	if o.code == exitInterrupted {
		return o.code, "interrupted", ""
	}
	return o.code, err.Error(), hintOf(err, o.hint)
}

func outcomeOf(err error) outcome {
	for _, row := range sentinelOutcomes {
		if errors.Is(err, row.is) {
			return row.outcome
		}
	}
	if kind := fault.Of(err); kind != fault.None {
		return kindOutcomes[kind]
	}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		if o, ok := errnoOutcomes[errno]; ok {
			return o
		}
	}
	return outcome{code: exitFailure}
}

// hintOf prefers the hint nearest to the cause's circumstances: the command's,
// then the key service's, then the general one.
func hintOf(err error, general string) string {
	var own *cliError
	if errors.As(err, &own) && own.hint != "" {
		return own.hint
	}
	var call *keywrap.CallError
	if errors.As(err, &call) && call.Hint != "" {
		return call.Hint
	}
	return general
}

// mountHelperCode gives the exit codes of mount(8): 1 for a wrong invocation,
// 32 for a mount that failed.
func mountHelperCode(code int) int {
	switch code {
	case exitOK:
		return 0
	case exitUsage:
		return 1
	case exitInterrupted:
		return 8
	}
	return 32
}

// keyIsGone reports whether a key service's answer says that a key is not there,
// or will not be.
func keyIsGone(err error) bool {
	return errors.Is(err, keywrap.ErrNotFound) || errors.Is(err, keywrap.ErrPending)
}
