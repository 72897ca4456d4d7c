package report

import (
	"fmt"
	"testing"
	"time"

	"github.com/kmsfs/kmsfs/crypto/audit"
)

func TestCollector(t *testing.T) {
	d := small()
	a := d.Activity
	if a.Calls != 1 || a.Cached != 1 || a.Denied != 1 || a.Damaged != 1 || len(a.Integrity) != 1 {
		t.Errorf("got %+v", a)
	}
	if len(a.Hours) != 3 || a.Hours[0].Calls != 1 || a.Hours[1].Cached != 1 || a.Hours[2].Denied != 1 {
		t.Errorf("hours %+v", a.Hours)
	}
	if len(a.Denials) != 1 || a.Denials[0].Request != "r-1" || a.Denials[0].UID != "" {
		t.Errorf("denials %+v", a.Denials)
	}
	if len(a.Users) != 2 || a.Users[0].Program != "cat" || a.Users[0].Used != 2 || a.Users[0].UID != "0" {
		t.Errorf("users %+v", a.Users)
	}
	if got, want := d.Keys[0].LastUsed, madeAt.Add(-3*time.Hour); !got.Equal(want) {
		t.Errorf("last used %v, want %v", got, want)
	}
}

// TestCollectorIsBounded feeds it a log in which everything differs.
func TestCollectorIsBounded(t *testing.T) {
	var c Collector
	for i := range 3 * maxGroups {
		at := madeAt.Add(time.Duration(i) * 100 * time.Hour)
		name := fmt.Sprint(i)
		c.Add(&audit.Event{Kind: audit.KindUse, Time: at, Class: name, Key: name, Result: "key-denied", Caller: &audit.Caller{Program: name}})
		c.Add(&audit.Event{Kind: audit.KindUse, Time: at, Class: name, Key: name, Result: audit.OK, Cached: true})
		c.Add(&audit.Event{Kind: audit.KindIntegrity, Time: at})
	}
	if len(c.users) > maxGroups || len(c.denials) > maxGroups || len(c.lastUsed) > maxGroups || len(c.hours) > maxHours || len(c.damage) > maxRows {
		t.Errorf("%d users, %d denials, %d keys, %d hours, %d damages", len(c.users), len(c.denials), len(c.lastUsed), len(c.hours), len(c.damage))
	}
	a := c.Activity()
	if len(a.Users) > maxUsers || len(a.Denials) > maxRows || a.Denied != 3*maxGroups || a.Cached != 3*maxGroups || a.MoreDeny == 0 || a.MoreUsers == 0 {
		t.Errorf("%d users and %d more, %d denials and %d more, %d denied", len(a.Users), a.MoreUsers, len(a.Denials), a.MoreDeny, a.Denied)
	}
}

func TestChart(t *testing.T) {
	at := func(h int) time.Time { return madeAt.Truncate(time.Hour).Add(time.Duration(h) * time.Hour) }
	for _, tc := range []struct {
		hours int
		unit  string
	}{{0, "hour"}, {95, "hour"}, {200, "day"}, {24 * 120, "week"}, {24 * 1000, "four weeks"}, {24 * 9000, "52 weeks"}, {24 * 365 * 200, "52 weeks"}} {
		c := newChart([]Hour{{Start: at(0), Calls: 5}, {Start: at(tc.hours), Calls: 7, Cached: 1000, Denied: 1}})
		if c.Unit != tc.unit || len(c.Bars) > maxBars || len(c.Bars) == 0 || len(c.Labels) > 9 {
			t.Errorf("%d hours: one bar for each %s, %d bars, %d labels; want %s", tc.hours, c.Unit, len(c.Bars), len(c.Labels), tc.unit)
		}
		sum := uint64(0)
		for _, r := range c.Rows {
			sum += r.Calls + r.Cached + r.Denied
		}
		if last := c.Bars[len(c.Bars)-1]; len(last.Parts) != 3 || sum < 1008 {
			t.Errorf("%d hours: last bar %+v, sum %d", tc.hours, last, sum)
		}
		if n := len(c.Lines); n < 3 || n > 7 {
			t.Errorf("%d hours: %d grid lines", tc.hours, n)
		}
	}
	if newChart(nil) != nil {
		t.Error("a chart of nothing")
	}
}

func TestTexts(t *testing.T) {
	for n, want := range map[uint64]string{0: "0", 999: "999", 1000: "1\u202f000", 1234567: "1\u202f234\u202f567"} {
		if got := group(n); got != want {
			t.Errorf("group(%d) = %q, want %q", n, got, want)
		}
	}
	for n, want := range map[uint64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 5 << 30: "5.0 GiB", 1<<64 - 1: "16.0 EiB"} {
		if got := sizeText(n); got != want {
			t.Errorf("sizeText(%d) = %q, want %q", n, got, want)
		}
	}
	for d, want := range map[time.Duration]string{0: "none", 5 * time.Minute: "5m", time.Hour: "1h", 90 * time.Minute: "1h30m", 30 * time.Second: "30s", 10 * time.Minute: "10m"} {
		if got := cacheText(d); got != want {
			t.Errorf("cacheText(%v) = %q, want %q", d, got, want)
		}
	}
}
