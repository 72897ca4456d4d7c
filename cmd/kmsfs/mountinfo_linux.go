package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// fsType is the type of a kmsfs mount in the mount table.
const fsType = "fuse.kmsfs"

// mountEntry is one line of the mount table.
type mountEntry struct {
	Source     string // the store's path, of a kmsfs mount
	Mountpoint string
	Type       string
	Options    string // per mount and per file system, comma-separated
	Device     string // major:minor
}

// readMounts returns this process's mount table, in mount order.
func readMounts() ([]mountEntry, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return parseMountinfo(f)
}

// parseMountinfo reads proc_pid_mountinfo(5):
//
//	36 35 98:0 /root /mountpoint rw,noatime master:1 - type source super-options
func parseMountinfo(r io.Reader) ([]mountEntry, error) {
	var out []mountEntry
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		before, after, ok := strings.Cut(lines.Text(), " - ")
		left, right := strings.Fields(before), strings.Split(after, " ")
		if !ok || len(left) < 6 || len(right) < 3 {
			return nil, fmt.Errorf("mount table: a line of an unknown form: %q", lines.Text())
		}
		out = append(out, mountEntry{
			Mountpoint: unescapeMount(left[4]),
			Type:       right[0],
			Source:     unescapeMount(right[1]),
			Options:    left[5] + "," + right[2],
			Device:     left[2],
		})
	}
	return out, lines.Err()
}

// unescapeMount undoes the kernel's \040 for space, tab, newline and backslash.
func unescapeMount(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+4 <= len(s) {
			if c, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(c))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// mountAt returns the top mount at exactly path, or nil.
func mountAt(mounts []mountEntry, path string) *mountEntry {
	var found *mountEntry
	for i := range mounts {
		if mounts[i].Mountpoint == path {
			found = &mounts[i] // a later line lies above an earlier one
		}
	}
	return found
}

// kmsfsMounts returns the kmsfs mounts that can be reached: of several at one
// place, the top one.
func kmsfsMounts() ([]mountEntry, error) {
	mounts, err := readMounts()
	if err != nil {
		return nil, err
	}
	var out []mountEntry
	for _, m := range mounts {
		if m.Type == fsType && mountAt(mounts, m.Mountpoint).Device == m.Device {
			out = append(out, m)
		}
	}
	return out, nil
}

// mountpointPath makes a MOUNTPOINT operand comparable with the mount table.
// The mountpoint itself is never followed or touched: a dead mount there would
// answer ENOTCONN, and a hung one not at all.
func mountpointPath(path string) (string, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	mounts, err := readMounts()
	if err != nil {
		return "", err
	}
	if mountAt(mounts, abs) != nil {
		return abs, nil
	}
	real, err := realParent(abs)
	if err != nil {
		return "", err
	}
	if mountAt(mounts, real) != nil {
		return real, nil
	}
	if full, err := realPath(path); err == nil { // the operand is itself a link
		return full, nil
	} else if !errors.Is(err, os.ErrNotExist) {
		return "", err
	}
	return real, nil
}
