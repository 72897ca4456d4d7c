package integration

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/parser"
	"go/token"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/kmsfs/kmsfs"

// layer is a package's row of the table: what it may import directly, of ours
// and of others. Standard packages need no row, except unsafe.
type layer struct {
	ours    []string
	outside []string // import paths or prefixes of them
}

func imports(ours ...string) layer { return layer{ours: ours} }

func (l layer) and(outside ...string) layer {
	l.outside = append(l.outside, outside...)
	return l
}

const (
	awsSDK  = "github.com/aws/aws-sdk-go-v2"
	smithy  = "github.com/aws/smithy-go"
	tink    = "github.com/tink-crypto/tink-go/v2"
	sysUnix = "golang.org/x/sys/unix"
	cobra   = "github.com/spf13/cobra"
	goFuse  = "github.com/hanwen/go-fuse/v2"
)

// layers is the architecture: every package of the module with its row. Arrows
// go down only: crypto never imports fs, only fusefs sees FUSE, only awskms
// sees AWS, only cmd knows which key services exist.
var layers = map[string]layer{
	"crypto/fault":   imports(),
	"crypto/keymem":  imports(),
	"crypto/dare":    imports("crypto/fault", "crypto/keymem").and("github.com/minio/sio"),
	"crypto/nameenc": imports("crypto/fault", "crypto/keymem").and(tink),
	// A library for logging of key use; cmd joins it to envelope's observers.
	"crypto/audit":   imports("crypto/fault").and(sysUnix),
	"crypto/keywrap": imports("crypto/fault", "crypto/keymem"),
	"crypto/keywrap/awskms": imports("crypto/keywrap", "crypto/fault", "crypto/keymem").
		and(awsSDK, smithy),
	"crypto/keywrap/keyring": imports("crypto/keywrap", "crypto/fault", "crypto/keymem").
		and(tink, "golang.org/x/crypto/argon2"),
	// Without its build tag; integration/hsm holds what the tag adds.
	"crypto/keywrap/pkcs11": imports("crypto/keywrap", "crypto/fault", "crypto/keymem"),
	// Limits are of time and number only: the rate is a token bucket.
	"crypto/keywrap/limit": imports("crypto/keywrap", "crypto/fault", "crypto/keymem").
		and("golang.org/x/time/rate"),
	"crypto/keywrap/keywraptest": imports("crypto/keywrap", "crypto/fault", "crypto/keymem"),
	"crypto/keywrap/keypolicy":   imports("crypto/keywrap", "crypto/fault"),
	"crypto/envelope":            imports("crypto/keywrap", "crypto/keymem", "crypto/fault").and(tink + "/kwp/subtle"),

	// The policy is written in YAML, and parsing it belongs to its rules.
	"fs/classify": imports("crypto/fault").and("go.yaml.in/yaml/v3"),
	"fs/backing":  imports("crypto/fault").and(sysUnix),
	// Redo records and their epochs in two files; it does not know what the
	// operations mean.
	"fs/journal": imports("crypto/fault", "crypto/keymem", "fs/backing").and(sysUnix),
	// Who may write a store that several machines have, apart from cryptfs because
	// it knows nothing of files, and rewrap takes part in it.
	"fs/lease": imports("crypto/fault", "crypto/keymem", "fs/backing").and(sysUnix),
	// The byte formats of what a store keeps beside its files, apart from
	// cryptfs so that they can be fuzzed without a disk. They name values of
	// dare (suite), envelope (ids, placement) and classify (policy).
	"fs/record": imports("crypto/dare", "crypto/envelope", "crypto/fault", "fs/classify"),
	// Where a header goes and how it is read back, apart from cryptfs so that
	// whoever has no key can look at headers too.
	"fs/placement": imports("crypto/envelope", "crypto/fault", "fs/backing").and(sysUnix),
	// Who depends on which key, and other recipients for them, by looking at the
	// ciphertext tree; envelope.Manager comes in through an interface.
	"fs/rewrap": imports("crypto/dare", "crypto/envelope", "crypto/fault", "crypto/keywrap", "fs/backing", "fs/journal", "fs/lease", "fs/placement", "fs/record").
		and(sysUnix, "golang.org/x/sync/errgroup"),
	// One open file over sealed chunks, apart from cryptfs for its size: it
	// knows chunks and redo records, not names, classes or key services.
	"fs/chunkfile": imports("crypto/dare", "crypto/fault", "fs/journal").and(sysUnix),
	// keywrap for the Provider that is passed in, and for purposes; errgroup
	// bounds what fsck reads at once.
	"fs/cryptfs": imports("fs/classify", "fs/backing", "fs/journal", "fs/lease", "fs/record", "fs/placement", "fs/rewrap", "fs/chunkfile", "crypto/dare", "crypto/nameenc",
		"crypto/envelope", "crypto/keywrap", "crypto/keymem", "crypto/fault").
		and(sysUnix, "golang.org/x/sync/errgroup"),
	// keywrap for what a failed call says of key and request, for the log;
	// unsafe for the size of a struct of the kernel's.
	"fs/fusefs": imports("fs/cryptfs", "crypto/keywrap", "crypto/fault").and(goFuse, sysUnix, "unsafe"),

	// What can be read of a damaged store; apart from cryptfs, whose every step
	// relies on records being whole.
	"fs/salvage": imports("fs/classify", "fs/backing", "fs/journal", "fs/record", "fs/placement", "fs/chunkfile", "crypto/dare", "crypto/nameenc",
		"crypto/envelope", "crypto/keywrap", "crypto/keymem", "crypto/fault").
		and(sysUnix, "golang.org/x/sync/errgroup"),

	// Prometheus metrics of one mount. It reads cryptfs.Status and takes what cmd
	// hands it of the key services' limits and the audit log.
	"fs/metrics": imports("fs/cryptfs", "crypto/keywrap", "crypto/fault").
		and("github.com/prometheus/client_golang/prometheus"),

	// Checks of the machine and of a store that take no key: it reads the record
	// itself, and the services are passed in.
	"fs/doctor": imports("crypto/envelope", "crypto/fault", "crypto/keymem", "crypto/keywrap", "fs/backing", "fs/journal", "fs/record").and(sysUnix),

	// A page made of plain data; crypto/audit for the lines that it counts.
	"fs/report": imports("crypto/audit"),

	"cmd/kmsfs": imports("crypto/audit", "crypto/dare", "crypto/envelope", "crypto/fault", "crypto/keymem",
		"crypto/keywrap", "crypto/keywrap/awskms", "crypto/keywrap/keypolicy",
		"crypto/keywrap/keyring", "crypto/keywrap/limit", "fs/classify", "fs/cryptfs", "fs/doctor",
		"fs/fusefs", "fs/metrics", "fs/record", "fs/report", "fs/rewrap", "fs/salvage").
		and(cobra, "github.com/spf13/pflag", "github.com/schollz/progressbar/v3", "golang.org/x/term", sysUnix),

	// Test tools. None of them imports the program, so that a bug there cannot
	// hide itself.
	"integration":       imports(),
	"integration/bench": imports().and(sysUnix),
	// What FUSE itself costs from Go, to hold kmsfs against.
	"integration/bench/floor":    imports().and(goFuse, sysUnix),
	"integration/faultsweep":     imports(),
	"integration/hsm":            imports(),
	"integration/model":          imports(),
	"integration/powercut":       imports(),
	"integration/rig":            imports().and(sysUnix),
	"integration/soak":           imports(),
	"integration/stress":         imports(),
	"integration/kmsd":           imports("integration/kmsd/kmsserver").and(cobra),
	"integration/kmsd/kmsserver": imports("integration/kmsd/iampolicy", "integration/kmsd/sigv4"),
	"integration/kmsd/iampolicy": imports(),
	"integration/kmsd/sigv4":     imports(),
}

// goPackage is what `go list -json` tells.
type goPackage struct {
	ImportPath   string
	Dir          string
	Name         string
	GoFiles      []string
	Imports      []string
	TestImports  []string
	XTestImports []string
}

func (p *goPackage) short() string {
	return strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/")
}

func goList(t *testing.T, args ...string) []byte {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list"}, args...)...)
	cmd.Dir = repoRoot(t)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v: %s", err, stderr.String())
	}
	return out
}

func packages(t *testing.T) []*goPackage {
	t.Helper()
	var out []*goPackage
	dec := json.NewDecoder(bytes.NewReader(goList(t, "-json", "./...")))
	for {
		p := &goPackage{}
		err := dec.Decode(p)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, p)
	}
	if len(out) < 20 {
		t.Fatalf("go list found %d packages", len(out))
	}
	return out
}

// checkLayers compares packages with the table and returns what is wrong.
func checkLayers(table map[string]layer, pkgs []*goPackage) (wrong []string) {
	seen := map[string]bool{}
	for _, p := range pkgs {
		name := p.short()
		seen[name] = true
		row, ok := table[name]
		if !ok {
			wrong = append(wrong, fmt.Sprintf("%s has no row", name))
			continue
		}
		for _, imp := range p.Imports {
			if !row.allows(imp) {
				wrong = append(wrong, fmt.Sprintf("%s imports %s", name, imp))
			}
		}
		for _, imp := range append(slices.Clone(p.TestImports), p.XTestImports...) {
			if strings.HasPrefix(name, "crypto/") && strings.HasPrefix(imp, module+"/fs/") {
				wrong = append(wrong, fmt.Sprintf("a test of %s imports %s", name, imp))
			}
		}
	}
	for name := range table {
		if !seen[name] {
			wrong = append(wrong, fmt.Sprintf("row %s has no package", name))
		}
	}
	slices.Sort(wrong)
	return wrong
}

func (l layer) allows(imp string) bool {
	if ours, ok := strings.CutPrefix(imp, module+"/"); ok {
		return slices.Contains(l.ours, ours)
	}
	if first, _, _ := strings.Cut(imp, "/"); !strings.Contains(first, ".") && imp != "unsafe" {
		return true // the standard library
	}
	return slices.ContainsFunc(l.outside, func(o string) bool { return imp == o || strings.HasPrefix(imp, o+"/") })
}

// unusedRows finds what the table allows and nobody needs any more.
func unusedRows(table map[string]layer, pkgs []*goPackage) (unused []string) {
	for _, p := range pkgs {
		for _, o := range table[p.short()].ours {
			if !slices.Contains(p.Imports, module+"/"+o) {
				unused = append(unused, fmt.Sprintf("%s may import %s and does not", p.short(), o))
			}
		}
		for _, o := range table[p.short()].outside {
			uses := func(imp string) bool { return imp == o || strings.HasPrefix(imp, o+"/") }
			if !slices.ContainsFunc(p.Imports, uses) {
				unused = append(unused, fmt.Sprintf("%s may import %s and does not", p.short(), o))
			}
		}
	}
	return unused
}

func TestLayers(t *testing.T) {
	pkgs := packages(t)
	for _, w := range checkLayers(layers, pkgs) {
		t.Error(w)
	}
	for _, u := range unusedRows(layers, pkgs) {
		t.Error(u)
	}
}

// TestLayersSeesViolations plants one violation of each kind.
func TestLayersSeesViolations(t *testing.T) {
	planted := func(name string, imp string) *goPackage {
		return &goPackage{ImportPath: module + "/" + name, Imports: []string{"fmt", imp}}
	}
	for _, tc := range []struct {
		name, want string
		pkg        *goPackage
	}{
		{"crypto imports fs", "crypto/dare imports " + module + "/fs/backing", planted("crypto/dare", module+"/fs/backing")},
		{"FUSE outside fusefs", "fs/cryptfs imports " + goFuse + "/fuse", planted("fs/cryptfs", goFuse+"/fuse")},
		{"AWS outside awskms", "crypto/envelope imports " + awsSDK + "/service/kms", planted("crypto/envelope", awsSDK+"/service/kms")},
		{"a library that only begins alike", "fs/classify imports go.yaml.in/yaml/v3x", planted("fs/classify", "go.yaml.in/yaml/v3x")},
		{"unsafe", "crypto/keymem imports unsafe", planted("crypto/keymem", "unsafe")},
		{"package without a row", "fs/newthing has no row", planted("fs/newthing", "os")},
		{"test of crypto imports fs", "a test of crypto/nameenc imports " + module + "/fs/cryptfs",
			&goPackage{ImportPath: module + "/crypto/nameenc", XTestImports: []string{module + "/fs/cryptfs"}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := checkLayers(layers, []*goPackage{tc.pkg}); !slices.Contains(got, tc.want) {
				t.Errorf("got %q, want %q among them", got, tc.want)
			}
		})
	}
	if got := checkLayers(map[string]layer{"fs/gone": imports()}, nil); !slices.Equal(got, []string{"row fs/gone has no package"}) {
		t.Errorf("row without a package: got %q", got)
	}
	if got := unusedRows(layers, []*goPackage{planted("crypto/dare", "fmt")}); len(got) != 3 {
		t.Errorf("unused rights of crypto/dare: got %q, want 3", got)
	}
}

// TestNoTestToolsInTheProgram keeps the KMS test server, and testing itself, out
// of what users get.
func TestNoTestToolsInTheProgram(t *testing.T) {
	deps := strings.Fields(string(goList(t, "-deps", "./cmd/kmsfs")))
	if !slices.Contains(deps, module+"/fs/fusefs") {
		t.Fatal("go list -deps does not name fs/fusefs")
	}
	for _, d := range deps {
		if strings.HasPrefix(d, module+"/integration") || d == "testing" || strings.HasSuffix(d, "test") && strings.HasPrefix(d, module) {
			t.Errorf("cmd/kmsfs depends on %s", d)
		}
	}
}

func TestOnePackageComment(t *testing.T) {
	for _, p := range packages(t) {
		var with []string
		for _, f := range p.GoFiles {
			file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, f), nil, parser.PackageClauseOnly|parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			if file.Doc != nil {
				with = append(with, f)
			}
		}
		if len(with) != 1 {
			t.Errorf("%s: package comments in %q, want one", p.short(), with)
		}
	}
}
