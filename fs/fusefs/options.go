package fusefs

import (
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// mountArgs is what the -o options of a mount come to.
type mountArgs struct {
	allowOther bool
	flags      uintptr  // for mount(2)
	names      []string // the same flags as fusermount3 spells them
	data       []string // options for the file system or a security module
}

// A flagOption sets and clears bits of mount(2)'s flags.
type flagOption struct{ set, clear uintptr }

var flagOptions = map[string]flagOption{
	"ro": {unix.MS_RDONLY, 0}, "rw": {0, unix.MS_RDONLY},
	"nosuid": {unix.MS_NOSUID, 0}, "suid": {0, unix.MS_NOSUID},
	"nodev": {unix.MS_NODEV, 0}, "dev": {0, unix.MS_NODEV},
	"noexec": {unix.MS_NOEXEC, 0}, "exec": {0, unix.MS_NOEXEC},
	"sync": {unix.MS_SYNCHRONOUS, 0}, "async": {0, unix.MS_SYNCHRONOUS},
	"dirsync": {unix.MS_DIRSYNC, 0},
	"noatime": {unix.MS_NOATIME, 0}, "atime": {0, unix.MS_NOATIME},
	"nodiratime": {unix.MS_NODIRATIME, 0}, "diratime": {0, unix.MS_NODIRATIME},
	"relatime": {unix.MS_RELATIME, 0}, "strictatime": {unix.MS_STRICTATIME, 0},
}

// fstabOptions speak to mount(8), systemd or nobody.
var fstabOptions = []string{
	"defaults", "auto", "noauto", "nofail", "user", "nouser", "users", "owner", "group", "_netdev",
	"default_permissions", // always on
}

// dataPrefixes begin the options that a security module reads.
var dataPrefixes = []string{"context=", "fscontext=", "defcontext=", "rootcontext="}

// parseOptions reads mount options, each element one option or several with
// commas between them. Later ones win.
func parseOptions(extra []string) (mountArgs, error) {
	var m mountArgs
	for _, option := range strings.Split(strings.Join(extra, ","), ",") {
		if err := m.add(option); err != nil {
			return mountArgs{}, err
		}
	}
	return m, nil
}

func (m *mountArgs) add(option string) error {
	if bits, ok := flagOptions[option]; ok {
		m.flags = m.flags&^bits.clear | bits.set
		m.names = append(m.names, option)
		return nil
	}
	hasPrefix := func(prefix string) bool { return strings.HasPrefix(option, prefix) }
	switch {
	case option == "allow_other":
		m.allowOther = true
	case option == "", slices.Contains(fstabOptions, option):
	case hasPrefix("x-"), hasPrefix("X-"), hasPrefix("comment="):
	case slices.ContainsFunc(dataPrefixes, hasPrefix):
		m.data = append(m.data, option)
	default:
		return fmt.Errorf("%q: %w", option, ErrOption)
	}
	return nil
}
