package integration

import (
	"context"
	"image"
	"image/color"
	"image/png"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kmsfs/kmsfs/integration/rig"
)

// chromium runs the browser without a window and returns what it prints.
func chromium(t *testing.T, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "chromium", append([]string{"--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
		"--disable-background-networking", "--hide-scrollbars", "--user-data-dir=" + t.TempDir()}, args...)...)
	cmd.Env = append(os.Environ(), "HOME="+t.TempDir())
	cmd.WaitDelay = 5 * time.Second // its children hold the pipes
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("chromium: %v: %s", err, stderr.String())
	}
	return string(out)
}

// painted is what a screenshot shows: the brightness of the corner, and how many
// points have a colour.
type painted struct {
	corner uint32
	count  map[color.RGBA]int
}

func screenshot(t *testing.T, page, scheme string) painted {
	t.Helper()
	file := filepath.Join(t.TempDir(), "page.png")
	chromium(t, "--blink-settings=preferredColorScheme="+scheme, "--window-size=1200,3000", "--screenshot="+file, "file://"+page)
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	img, err := png.Decode(f)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := img.Bounds().Size(), image.Pt(1200, 3000); got != want {
		t.Fatalf("screenshot of %v, want %v", got, want)
	}
	p := painted{count: map[color.RGBA]int{}}
	r, g, b, _ := img.At(2, 2).RGBA()
	p.corner = (r + g + b) / 3 >> 8
	for y := range 3000 {
		for x := range 1200 {
			p.count[color.RGBAModel.Convert(img.At(x, y)).(color.RGBA)]++
		}
	}
	return p
}

// TestAuditReportInABrowser makes the page from a mount's log with calls, cached
// uses, a denial and damage in it, and has a browser show it, light and dark.
func TestAuditReportInABrowser(t *testing.T) {
	rig.Need(t, "root", "fuse", "chromium")
	h := rig.NewHome(t)
	dir := t.TempDir()
	store, log, page := filepath.Join(dir, "S"), filepath.Join(dir, "audit.log"), filepath.Join(dir, "report.html")
	h.Run("init", store)
	m := h.Mount(store, "--audit", log)
	for _, name := range []string{"confidential-one", "confidential-two", "confidential-three"} {
		m.Put(name, []byte("contents of "+name))
	}
	id := m.Path("confidential-one")
	h.Sh(`cat "$1" >/dev/null; cat "$1" >/dev/null`, id)
	m.Unmount()

	// The key is disabled while nothing is open; then one file is damaged.
	m.Again("--audit", log)
	h.Run("keyring", "disable", "general")
	if out := h.TrySh(`cat "$1"`, id); out.Code == 0 {
		t.Error("a file opens without its key")
	}
	h.Run("keyring", "enable", "general")
	h.Sh(`f=$(find "$1" -maxdepth 1 -type f ! -name '.kmsfs*' | sort | head -n 1); printf X | dd of="$f" bs=1 seek=1050 conv=notrunc 2>/dev/null`, store)
	time.Sleep(1100 * time.Millisecond) // failures are remembered for a second
	if out := h.TrySh(`for f in "$1"/*; do cat "$f" || failed=1; done; [ -z "$failed" ]`, m.Dir); out.Code == 0 {
		t.Error("a damaged file opens")
	}
	m.Unmount()
	h.Run("keyring", "schedule-deletion", "general")
	h.Run("audit", "verify", log)
	h.Run("audit", "report", "--html", page, "--log", log, store)

	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(text), "confidential") {
		t.Error("the page has a plaintext name")
	}
	dom := chromium(t, "--dump-dom", "file://"+page)
	for _, want := range []string{"Key report", "keyring:general", "pending deletion", "can be opened by no other key and will be lost", "integrity event", "<strong>key-missing</strong>", "The chain is whole",
		`<rect class="calls" x=`, `<rect class="cached" x=`, `<rect class="denied" x=`, `<title id="chart-title">`, `scope="col"`} {
		if !strings.Contains(dom, want) {
			t.Errorf("the browser's page lacks %q", want)
		}
	}
	light, dark := screenshot(t, page, "1"), screenshot(t, page, "0")
	if light.corner < 200 || dark.corner > 60 {
		t.Errorf("brightness %d in light, %d in dark", light.corner, dark.corner)
	}
	for name, n := range map[string]int{
		"calls, light":  light.count[color.RGBA{0x25, 0x63, 0xb0, 0xff}],
		"cached, light": light.count[color.RGBA{0x8f, 0xb4, 0xdc, 0xff}],
		"calls, dark":   dark.count[color.RGBA{0x5b, 0x9b, 0xea, 0xff}],
		"cached, dark":  dark.count[color.RGBA{0x2f, 0x55, 0x83, 0xff}],
	} {
		if n < 300 { // the legend alone has 144
			t.Errorf("%s: %d points are painted", name, n)
		}
	}
}
