package report

import (
	_ "embed"
	"fmt"
	"html/template"
	"io"
	"strings"
	"time"
)

//go:embed page.html.tmpl
var pageText string

var page = template.Must(template.New("page").Funcs(template.FuncMap{
	"bytes": sizeText, "group": group, "time": timeText, "day": dayText, "since": sinceText, "cache": cacheText,
	"state": stateText, "stateClass": stateClass, "join": strings.Join, "short": short,
}).Parse(pageText))

// view is what the template sees: the data and what follows from it.
type view struct {
	*Data
	Chart   *chart
	Pending []Key
	Alerts  []string // what the reader must not miss
	Good    bool
	MaxRows int
}

// Render writes the page. It changes nothing of d. Errors are w's.
func Render(w io.Writer, d *Data) error {
	v := view{Data: d, Chart: newChart(d.Activity.Hours), Pending: d.pending(), MaxRows: maxRows}
	v.Alerts = alerts(d, v.Pending)
	v.Good = len(v.Alerts) == 0 && d.Log != nil
	if err := page.Execute(w, v); err != nil {
		return fmt.Errorf("report: %w", err)
	}
	return nil
}

// alerts are the findings at the top of the page.
func alerts(d *Data, pending []Key) (out []string) {
	if d.Log != nil && len(d.Log.Problems) > 0 {
		out = append(out, fmt.Sprintf("The audit log's chain is broken in %s. What the log says below may not be all that happened.", places(len(d.Log.Problems))))
	}
	if n := d.Activity.Damaged; n > 0 {
		out = append(out, fmt.Sprintf("%s integrity %s: something in the store failed authentication.", group(n), plural(n, "event", "events")))
	}
	for _, k := range pending {
		t := k.Totals()
		when := ""
		if !k.DeletionAt.IsZero() {
			when = " on " + timeText(k.DeletionAt)
		}
		switch {
		case d.Counted && t.OnlyFiles > 0:
			out = append(out, fmt.Sprintf("%s will be deleted%s. %s %s (%s) can be opened by no other key and will be lost.", k.URI, when, group(t.OnlyFiles), plural(t.OnlyFiles, "file", "files"), sizeText(t.OnlyBytes)))
		case d.Counted && t.Files > 0:
			out = append(out, fmt.Sprintf("%s will be deleted%s. %s %s depend on it as one of several keys.", k.URI, when, group(t.Files), plural(t.Files, "file", "files")))
		default:
			out = append(out, fmt.Sprintf("%s will be deleted%s.", k.URI, when))
		}
	}
	if d.Uncounted > 0 {
		out = append(out, fmt.Sprintf("%s %s could not be counted: the key they depend on is not known.", group(d.Uncounted), plural(d.Uncounted, "file", "files")))
	}
	if d.Log != nil && d.Log.Lost > 0 {
		out = append(out, fmt.Sprintf("%s %s could not be written to the audit log.", group(d.Log.Lost), plural(d.Log.Lost, "event", "events")))
	}
	return out
}

func places(n int) string {
	return fmt.Sprintf("%d %s", n, plural(uint64(n), "place", "places"))
}

func plural(n uint64, one, many string) string {
	if n == 1 {
		return one
	}
	return many
}

// sizeText writes a size in IEC 80000-13 units.
func sizeText(n uint64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	f, unit := float64(n)/1024, 0
	for f >= 1024 && unit < 5 {
		f /= 1024
		unit++
	}
	return fmt.Sprintf("%.1f %ciB", f, "KMGTPE"[unit])
}

func timeText(t time.Time) string {
	if t.IsZero() {
		return "–"
	}
	return t.UTC().Format("2006-01-02 15:04 UTC")
}

func dayText(t time.Time) string {
	if t.IsZero() {
		return "–"
	}
	return t.UTC().Format("2006-01-02")
}

// sinceText is an age at the time of the page, in days.
func sinceText(now, t time.Time) string {
	if t.IsZero() || now.Before(t) {
		return ""
	}
	days := uint64(now.Sub(t) / (24 * time.Hour))
	return fmt.Sprintf("%s %s", group(days), plural(days, "day", "days"))
}

func cacheText(d time.Duration) string {
	if d == 0 {
		return "none"
	}
	s := d.String() // "5m0s", "1h0m0s"
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

func stateText(k Key) string {
	switch {
	case k.State == "":
		return "unknown"
	case k.State == "pending-deletion":
		return "pending deletion"
	}
	return k.State
}

// stateClass is the style of a state; colour is never all that tells it.
func stateClass(k Key) string {
	switch {
	case k.PendingDeletion():
		return "bad"
	case k.State == "enabled":
		return "good"
	}
	return "warn"
}

// short cuts an id for a narrow column; the whole stands in the title.
func short(s string) string {
	if len(s) <= 13 {
		return s
	}
	return s[:12] + "…"
}
