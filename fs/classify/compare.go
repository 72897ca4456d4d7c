package classify

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Compare describes, one line each and in a stable order, what turns old into
// new. The error, if any, wraps ErrChange for every change that an existing
// store cannot take: a class removed, or another chunk size or name mode for
// an existing class. Both policies have passed Check.
func Compare(old, new *Policy) (changes []string, err error) {
	var refused []error
	note := func(format string, args ...any) { changes = append(changes, fmt.Sprintf(format, args...)) }
	if old.Default != new.Default {
		note("default: %s -> %s", old.Default, new.Default)
	}
	for _, name := range old.Names() {
		if c, ok := new.Classes[name]; !ok {
			refused = append(refused, fmt.Errorf("class %s: removed; keep it, files may need it: %w", name, ErrChange))
		} else {
			lines, errs := compareClass(old.Classes[name], c)
			for _, line := range lines {
				note("class %s: %s", name, line)
			}
			for _, what := range errs {
				refused = append(refused, fmt.Errorf("class %s: %s; add another class and reclassify: %w", name, what, ErrChange))
			}
		}
	}
	for _, name := range new.Names() {
		if _, ok := old.Classes[name]; !ok {
			c := new.Classes[name]
			note("class %s: added: keys %s; cache %s; names %s; chunk_size %s", name,
				strings.Join(c.Keys, ", "), formatDuration(c.Cache), c.Names, formatSize(c.ChunkSize))
			if len(c.Retired) > 0 {
				note("class %s: added: retired %s", name, strings.Join(c.Retired, ", "))
			}
			if c.Shared {
				note("class %s: added: data_keys shared", name)
			}
		}
	}
	for _, dir := range old.rules() {
		was := old.Directories[dir]
		if class, ok := new.Directories[dir]; !ok {
			note("rule %s: removed: %s -> %s", label(dir), was, new.ClassOf(dir))
		} else if class != was {
			note("rule %s: %s -> %s", label(dir), was, class)
		}
	}
	for _, dir := range new.rules() {
		if _, ok := old.Directories[dir]; !ok {
			note("rule %s: added: %s -> %s", label(dir), old.ClassOf(dir), new.Directories[dir])
		}
	}
	return changes, errors.Join(refused...)
}

func compareClass(old, new Class) (changes, refused []string) {
	changes = compareKeys(old, new)
	switch {
	case old.Keys[0] != new.Keys[0]:
		changes = append(changes, fmt.Sprintf("first key: %s -> %s", old.Keys[0], new.Keys[0]))
	case len(changes) == 0 && !slices.Equal(old.Keys, new.Keys):
		changes = append(changes, "keys in another order")
	}
	if old.Shared != new.Shared {
		changes = append(changes, fmt.Sprintf("data_keys: %s -> %s", dataKeysName(old.Shared), dataKeysName(new.Shared)))
	}
	if old.Cache != new.Cache {
		changes = append(changes, fmt.Sprintf("cache: %s -> %s", formatDuration(old.Cache), formatDuration(new.Cache)))
	}
	if old.Names != new.Names {
		refused = append(refused, fmt.Sprintf("names: %s -> %s", old.Names, new.Names))
	}
	if old.ChunkSize != new.ChunkSize {
		refused = append(refused, fmt.Sprintf("chunk_size: %s -> %s", formatSize(old.ChunkSize), formatSize(new.ChunkSize)))
	}
	return changes, refused
}

// compareKeys tells where each key went: between keys, retired and neither.
func compareKeys(old, new Class) (changes []string) {
	for _, key := range new.Keys {
		switch {
		case slices.Contains(old.Retired, key):
			changes = append(changes, "key in use again: "+key)
		case !slices.Contains(old.Keys, key):
			changes = append(changes, "key added: "+key)
		}
	}
	for _, key := range new.Retired {
		switch {
		case slices.Contains(old.Keys, key):
			changes = append(changes, "key retired: "+key)
		case !slices.Contains(old.Retired, key):
			changes = append(changes, "retired key added: "+key)
		}
	}
	for _, key := range slices.Concat(old.Keys, old.Retired) {
		if !slices.Contains(new.Keys, key) && !slices.Contains(new.Retired, key) {
			changes = append(changes, "key removed: "+key)
		}
	}
	return changes
}

func dataKeysName(shared bool) string {
	if shared {
		return dataKeysShared
	}
	return dataKeysPerFile
}
