package main

import (
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
)

// homeDir returns the user's home. mount(8) and systemd start programs without
// HOME, so the user database is asked next.
func homeDir() (string, error) {
	if home := os.Getenv("HOME"); filepath.IsAbs(home) {
		return home, nil
	}
	u, err := user.Current()
	if err != nil || !filepath.IsAbs(u.HomeDir) {
		return "", usage("no home directory is known",
			"set HOME, or give --keyring FILE and --known-stores FILE")
	}
	return u.HomeDir, nil
}

// xdgDir returns the kmsfs directory below the XDG base directory that env
// names, or below home/fallback. Relative values are ignored, as the XDG
// specification asks.
func xdgDir(env, fallback string) (string, error) {
	if base := os.Getenv(env); filepath.IsAbs(base) {
		return filepath.Join(base, "kmsfs"), nil
	}
	home, err := homeDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(home, fallback, "kmsfs"), nil
}

func configDir() (string, error) { return xdgDir("XDG_CONFIG_HOME", ".config") }
func stateDir() (string, error)  { return xdgDir("XDG_STATE_HOME", ".local/state") }

// keyringPath returns --keyring as an absolute path, or the default.
func (g *globalOptions) keyringPath() (string, error) {
	return pathOr(g.keyring, "--keyring", func() (string, error) {
		dir, err := configDir()
		return filepath.Join(dir, "keyring.json"), err
	})
}

// knownStoresPath returns --known-stores as an absolute path, or the default
// beside the keyring.
func (g *globalOptions) knownStoresPath() (string, error) {
	return pathOr(g.knownStores, "--known-stores", func() (string, error) {
		keyring, err := g.keyringPath()
		return filepath.Join(filepath.Dir(keyring), "known-stores"), err
	})
}

func pathOr(given, flag string, fallback func() (string, error)) (string, error) {
	if given == "" {
		return fallback()
	}
	abs, err := filepath.Abs(given)
	if err != nil {
		return "", usage(fmt.Sprintf("%s %s: %v", flag, given, err), "give an absolute path")
	}
	return abs, nil
}

// realPath returns the absolute path of an existing file without symbolic
// links: what the known-stores file, the mount table and log lines name.
func realPath(path string) (string, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	return filepath.EvalSymlinks(abs)
}

// storePath is realPath for a STORE operand.
func storePath(path string) (string, error) {
	real, err := realPath(path)
	if errors.Is(err, os.ErrNotExist) {
		return "", fail(errNoStore, fmt.Sprintf("%s does not exist", path), "kmsfs init "+path+" makes a store there")
	}
	if err != nil {
		return "", err
	}
	if st, err := os.Stat(real); err == nil && !st.IsDir() {
		return "", fail(errNoStore, path+" is not a directory", "give the store's directory")
	}
	return real, nil
}

// realParent resolves all of an absolute path but its last element.
func realParent(abs string) (string, error) {
	if abs == "/" {
		return abs, nil
	}
	dir, err := filepath.EvalSymlinks(filepath.Dir(abs))
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, filepath.Base(abs)), nil
}
