package classify

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// rules returns the directories that have a rule, sorted.
func (p *Policy) rules() []string { return slices.Sorted(maps.Keys(p.Directories)) }

// Marshal returns p as JSON on one line, all fields present save for retired
// where there is none and data_keys where it is per-file, classes and rules
// sorted: equal policies give equal bytes. If Check accepts p, Parse reads it
// back.
func (p *Policy) Marshal() []byte {
	b := fmt.Appendf(nil, `{"version":%d,"default":%s,"classes":{`, p.Version, quote(p.Default))
	for i, name := range p.Names() {
		if i > 0 {
			b = append(b, ',')
		}
		c := p.Classes[name]
		b = appendList(fmt.Appendf(b, `%s:{"keys":`, quote(name)), c.Keys)
		if len(c.Retired) > 0 {
			b = appendList(append(b, `,"retired":`...), c.Retired)
		}
		if c.Shared {
			b = fmt.Appendf(b, `,"data_keys":%s`, quote(dataKeysShared))
		}
		b = fmt.Appendf(b, `,"cache":%s,"names":%s,"chunk_size":%d}`,
			quote(formatDuration(c.Cache)), quote(string(c.Names)), c.ChunkSize)
	}
	b = append(b, `},"directories":{`...)
	for i, dir := range p.rules() {
		if i > 0 {
			b = append(b, ',')
		}
		b = fmt.Appendf(b, `%s:%s`, quote(dir), quote(p.Directories[dir]))
	}
	return append(b, `}}`...)
}

func appendList(b []byte, list []string) []byte {
	b = append(b, '[')
	for i, s := range list {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, quote(s)...)
	}
	return append(b, ']')
}

// YAML returns p as people write it. Parse reads it back if Check accepts p.
func (p *Policy) YAML() []byte {
	b := fmt.Appendf(nil, "version: %d\ndefault: %s\nclasses:\n", p.Version, plain(p.Default))
	for _, name := range p.Names() {
		c := p.Classes[name]
		b = fmt.Appendf(b, "  %s:\n    keys:\n", plain(name))
		for _, key := range c.Keys {
			b = fmt.Appendf(b, "      - %s\n", quote(key))
		}
		if len(c.Retired) > 0 {
			b = append(b, "    retired:\n"...)
			for _, key := range c.Retired {
				b = fmt.Appendf(b, "      - %s\n", quote(key))
			}
		}
		if c.Shared {
			b = fmt.Appendf(b, "    data_keys: %s\n", dataKeysShared)
		}
		b = fmt.Appendf(b, "    cache: %s\n    names: %s\n    chunk_size: %s\n", formatDuration(c.Cache), plain(string(c.Names)), formatSize(c.ChunkSize))
	}
	if len(p.Directories) == 0 {
		return append(b, "directories: {}\n"...)
	}
	b = append(b, "directories:\n"...)
	for _, dir := range p.rules() {
		b = fmt.Appendf(b, "  %s: %s\n", plain(dir), plain(p.Directories[dir]))
	}
	return b
}

// plainPattern is what YAML reads as itself without quotes, save for the words
// in notPlain.
var (
	plainPattern = regexp.MustCompile(`^[a-z/][A-Za-z0-9/_.-]*$`)
	notPlain     = []string{"null", "true", "false", "yes", "no", "on", "off", "y", "n"}
)

func plain(s string) string {
	if plainPattern.MatchString(s) && !slices.Contains(notPlain, s) {
		return s
	}
	return quote(s)
}

// quote returns s as a string that is the same in JSON and YAML. Runes that are
// not printable are escaped: YAML refuses some and folds others. Beyond the
// basic plane JSON would need surrogates, which YAML refuses, so those stay.
func quote(s string) string {
	var b strings.Builder
	b.WriteByte('"')
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r > 0xFFFF || unicode.IsPrint(r) && r != utf8.RuneError:
			b.WriteRune(r)
		default:
			fmt.Fprintf(&b, `\u%04x`, r)
		}
	}
	b.WriteByte('"')
	return b.String()
}

// formatSize returns "32KiB", or plain bytes where that is not exact.
func formatSize(n int) string {
	if n >= 1<<10 && n%(1<<10) == 0 {
		return strconv.Itoa(n>>10) + "KiB"
	}
	return strconv.Itoa(n)
}
