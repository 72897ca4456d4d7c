package integration

import (
	"bytes"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// repoRoot returns the module's directory.
func repoRoot(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "go.mod")); err != nil {
		t.Fatal(err)
	}
	return dir
}

// topLevel is what may lie beside go.mod, apart from dot-files and what
// .gitignore names.
var topLevel = []string{"fs", "crypto", "cmd", "integration", "docs", "go.mod", "go.sum", "Makefile", "README.md", "LICENSE"}

func TestTopLevel(t *testing.T) {
	root := repoRoot(t)
	ignore, err := os.ReadFile(filepath.Join(root, ".gitignore"))
	if err != nil {
		t.Fatal(err)
	}
	var built []string
	for line := range strings.Lines(string(ignore)) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "/"); ok {
			built = append(built, strings.TrimSuffix(name, "/"))
		}
	}
	entries, err := os.ReadDir(root)
	if err != nil {
		t.Fatal(err)
	}
	left := slices.Clone(topLevel)
	for _, e := range entries {
		i := slices.Index(left, e.Name())
		switch {
		case i >= 0:
			left = slices.Delete(left, i, i+1)
		case !strings.HasPrefix(e.Name(), ".") && !slices.Contains(built, e.Name()):
			t.Errorf("%s does not belong at the top level", e.Name())
		}
	}
	if len(left) > 0 {
		t.Errorf("missing at the top level: %q", left)
	}
	for _, dir := range []string{"fs", "crypto", "cmd"} {
		if files, _ := filepath.Glob(filepath.Join(root, dir, "*.go")); len(files) > 0 {
			t.Errorf("%s holds packages only, not %q", dir, files)
		}
	}
}

// sourceFiles calls f for every file of the tree that git would keep.
func sourceFiles(t *testing.T, f func(rel string, data []byte)) {
	t.Helper()
	root := repoRoot(t)
	n := 0
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		if d.IsDir() && (rel == ".git" || rel == "bin") {
			return filepath.SkipDir
		}
		if !d.Type().IsRegular() || strings.HasSuffix(rel, ".test") || strings.HasSuffix(rel, ".out") {
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		n++
		f(rel, data)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if n < 100 {
		t.Fatalf("the tree has %d files", n)
	}
}

// localNames returns strings that are true of this machine only: where the
// checkout and the module cache are, and a module proxy of one's own.
func localNames(t *testing.T) []string {
	t.Helper()
	root := repoRoot(t)
	out := []string{root + "/", root + "\""}
	standard := []string{"bin", "etc", "home", "mnt", "opt", "root", "run", "srv", "tmp", "usr", "var", "builds", "go", "src"}
	if first, _, ok := strings.Cut(strings.TrimPrefix(root, "/"), "/"); ok && !slices.Contains(standard, first) {
		out = append(out, "/"+first+"/")
	}
	env, err := exec.Command("go", "env", "GOMODCACHE", "GOPROXY").Output()
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(env), "\n")
	out = append(out, lines[0])
	for _, proxy := range strings.FieldsFunc(lines[1], func(r rune) bool { return r == ',' || r == '|' }) {
		if !slices.Contains([]string{"https://proxy.golang.org", "direct", "off"}, proxy) {
			out = append(out, proxy)
		}
	}
	return out
}

func TestNoMachinePaths(t *testing.T) {
	names := localNames(t)
	sourceFiles(t, func(rel string, data []byte) {
		for _, s := range names {
			if bytes.Contains(data, []byte(s)) {
				t.Errorf("%s names %q, which is of one machine", rel, s)
			}
		}
		if bytes.HasPrefix(data, []byte("\x7fELF")) {
			t.Errorf("%s is a built program", rel)
		}
	})
}

// TestErrnoInOnePlace: go-fuse's helper ignores wrapped errors and answers
// ENOSYS, on which the kernel stops asking and reports success for fsync and
// close.
func TestErrnoInOnePlace(t *testing.T) {
	seen := false
	sourceFiles(t, func(rel string, data []byte) {
		if filepath.Dir(rel) != "fs/fusefs" || strings.HasSuffix(rel, "_test.go") {
			return
		}
		if filepath.Base(rel) == "errno.go" {
			seen = true
			return
		}
		for _, word := range []string{"ENOSYS", "ToErrno", "ToStatus"} {
			if bytes.Contains(data, []byte(word)) {
				t.Errorf("%s has %s, which belongs in errno.go", rel, word)
			}
		}
	})
	if !seen {
		t.Error("fs/fusefs/errno.go is gone")
	}
}
