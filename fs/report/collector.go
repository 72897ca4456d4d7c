package report

import (
	"cmp"
	"slices"
	"strconv"
	"time"

	"github.com/kmsfs/kmsfs/crypto/audit"
)

// Bounds of the page's tables, and so of a Collector's memory.
const (
	maxRows   = 200   // rows of one table
	maxGroups = 10000 // different denials, and different users, that are told apart
	maxHours  = 24 * 366 * 10
)

// Collector makes an Activity of the lines of an audit log. It is not safe for
// concurrent use. The zero Collector is ready.
type Collector struct {
	hours    map[int64]*Hour
	denials  map[denialKey]*Denial
	users    map[userKey]*User
	damage   []Damage // a ring of maxRows
	total    Activity
	lastUsed map[string]time.Time
}

type denialKey struct{ class, key, op, result, code, uid, program string }
type userKey struct{ uid, program, class string }

// Add counts one event.
func (c *Collector) Add(e *audit.Event) {
	if c.hours == nil {
		c.hours, c.denials, c.users = map[int64]*Hour{}, map[denialKey]*Denial{}, map[userKey]*User{}
		c.lastUsed = map[string]time.Time{}
	}
	switch e.Kind {
	case audit.KindUse:
		c.use(e)
	case audit.KindCall:
		if e.Failed() {
			if e.Background { // nobody was refused, but an auditor asks why
				c.deny(e)
			}
			return
		}
		c.total.Calls++
		if h := c.hour(e.Time); h != nil {
			h.Calls++
		}
	case audit.KindIntegrity:
		c.total.Damaged++
		uid, program := who(e)
		d := Damage{Time: e.Time, Class: e.Class, File: e.File, Op: e.Op, Detail: e.Detail, UID: uid, Program: program}
		if len(c.damage) == maxRows {
			c.damage = slices.Delete(c.damage, 0, 1)
		}
		c.damage = append(c.damage, d)
	}
}

func (c *Collector) use(e *audit.Event) {
	uid, program := who(e)
	u := c.users[userKey{uid, program, e.Class}]
	if u == nil && len(c.users) < maxGroups {
		u = &User{UID: uid, Program: program, Class: e.Class}
		c.users[userKey{uid, program, e.Class}] = u
	}
	if u == nil {
		c.total.MoreUsers++
		u = &User{}
	}
	u.Last = e.Time
	if e.Failed() {
		u.Denied++
		c.total.Denied++
		c.deny(e)
		if h := c.hour(e.Time); h != nil {
			h.Denied++
		}
		return
	}
	u.Used++
	c.used(e)
	if e.Cached || e.Source != "" && e.Source != "call" {
		c.total.Cached++
		if h := c.hour(e.Time); h != nil {
			h.Cached++
		}
	}
}

func (c *Collector) used(e *audit.Event) {
	if e.Key != "" && len(c.lastUsed) < maxGroups {
		c.lastUsed[e.Key] = e.Time
	}
}

func (c *Collector) deny(e *audit.Event) {
	uid, program := who(e)
	k := denialKey{e.Class, e.Key, e.Op, e.Result, e.Code, uid, program}
	d := c.denials[k]
	if d == nil {
		if len(c.denials) == maxGroups {
			c.total.MoreDeny++
			return
		}
		d = &Denial{Class: e.Class, Key: e.Key, Op: e.Op, Result: e.Result, Code: e.Code, UID: uid, Program: program, First: e.Time}
		c.denials[k] = d
	}
	d.Count++
	d.Last, d.Detail, d.File = e.Time, e.Detail, e.File
	if e.Request != "" {
		d.Request = e.Request
	}
}

// hour returns nil when there are too many hours to be true.
func (c *Collector) hour(t time.Time) *Hour {
	start := t.UTC().Truncate(time.Hour)
	h := c.hours[start.Unix()]
	if h == nil && len(c.hours) < maxHours {
		h = &Hour{Start: start}
		c.hours[start.Unix()] = h
	}
	return h
}

func who(e *audit.Event) (uid, program string) {
	if e.Caller == nil {
		return "", ""
	}
	return strconv.FormatUint(uint64(e.UID), 10), e.Program
}

// LastUsed returns when a data key was last handed out that is under this key,
// zero if never. Calls that only ask about a key are no use of it.
func (c *Collector) LastUsed(key string) time.Time { return c.lastUsed[key] }

// Activity returns what was counted, in the order of the page.
func (c *Collector) Activity() Activity {
	a := c.total
	for _, h := range c.hours {
		a.Hours = append(a.Hours, *h)
	}
	slices.SortFunc(a.Hours, func(x, y Hour) int { return x.Start.Compare(y.Start) })
	for _, d := range c.denials {
		a.Denials = append(a.Denials, *d)
	}
	slices.SortFunc(a.Denials, func(x, y Denial) int {
		return cmp.Or(y.Last.Compare(x.Last), cmp.Compare(y.Count, x.Count), cmp.Compare(x.Class, y.Class), cmp.Compare(x.Key, y.Key),
			cmp.Compare(x.Op+x.Result+x.Code, y.Op+y.Result+y.Code), cmp.Compare(x.UID+x.Program, y.UID+y.Program))
	})
	for _, u := range c.users {
		a.Users = append(a.Users, *u)
	}
	slices.SortFunc(a.Users, func(x, y User) int {
		return cmp.Or(cmp.Compare(y.Used+y.Denied, x.Used+x.Denied), cmp.Compare(x.Class, y.Class), cmp.Compare(x.Program, y.Program), cmp.Compare(x.UID, y.UID))
	})
	if n := len(a.Denials); n > maxRows {
		a.Denials, a.MoreDeny = a.Denials[:maxRows], a.MoreDeny+n-maxRows
	}
	if n := len(a.Users); n > maxUsers {
		a.Users, a.MoreUsers = a.Users[:maxUsers], a.MoreUsers+n-maxUsers
	}
	a.Integrity = slices.Clone(c.damage)
	slices.Reverse(a.Integrity) // newest first
	return a
}

// maxUsers is how many users the page shows.
const maxUsers = 50
