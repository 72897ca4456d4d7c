package main

import (
	"sync"
	"time"

	"github.com/schollz/progressbar/v3"

	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

// progress counts on standard error while long work runs, if that is a
// terminal; else it does nothing. Its methods may be called concurrently.
type progress struct {
	bar *progressbar.ProgressBar // nil without a terminal
}

func (a *app) newProgress(what, unit string) *progress {
	if _, ok := terminal(a.stderr); !ok {
		return &progress{}
	}
	return &progress{progressbar.NewOptions64(-1,
		progressbar.OptionSetWriter(a.stderr),
		progressbar.OptionSetDescription(what),
		progressbar.OptionSetItsString(unit),
		progressbar.OptionShowCount(),
		progressbar.OptionShowIts(),
		progressbar.OptionThrottle(100*time.Millisecond),
		progressbar.OptionClearOnFinish(),
	)}
}

// at shows that n units are done. What cannot be shown is no failure.
func (p *progress) at(n uint64) {
	if p.bar != nil {
		_ = p.bar.Set64(int64(n))
	}
}

func (p *progress) finish() {
	if p.bar != nil {
		_ = p.bar.Finish()
	}
}

// rewrapProgress counts files while they are looked at, and then shows how many
// of those to be done are done, and the time that is left.
type rewrapProgress struct {
	a    *app
	mu   sync.Mutex
	bar  *progress
	sure bool // the total is known
}

func (a *app) newRewrapProgress() *rewrapProgress {
	return &rewrapProgress{a: a, bar: a.newProgress("looking", "files")}
}

func (p *rewrapProgress) at(done, total, seen uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if total == 0 {
		if !p.sure {
			p.bar.at(seen)
		}
		return
	}
	if !p.sure {
		p.sure = true
		p.bar.finish()
		p.bar = p.a.newProgress("rewrapping", "files")
		if p.bar.bar != nil {
			p.bar.bar.ChangeMax64(int64(total))
			progressbar.OptionSetPredictTime(true)(p.bar.bar)
		}
	}
	p.bar.at(min(done, total))
}

func (p *rewrapProgress) finish() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.bar.finish()
}

// fsckProgress shows how many files are checked until the total is known, then
// how many bytes of how many, and the time that is left.
type fsckProgress struct {
	a     *app
	quick bool // no bytes are read
	mu    sync.Mutex
	bar   *progress
	sure  bool // the total is known
}

func (a *app) newFsckProgress(quick bool) *fsckProgress {
	return &fsckProgress{a: a, quick: quick, bar: a.newProgress("checking", "files")}
}

func (p *fsckProgress) shown() bool { return p.bar.bar != nil }

func (p *fsckProgress) at(done, total cryptfs.FsckCount) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if total.Files > 0 && !p.sure {
		p.sure = true
		p.bar.finish()
		p.bar = p.a.newTotal("checking", total, p.quick)
	}
	if p.sure && !p.quick {
		p.bar.at(min(done.Bytes, total.Bytes))
		return
	}
	p.bar.at(done.Files)
}

func (p *fsckProgress) finish() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.bar.finish()
}

// newTotal is newProgress with an end in sight.
func (a *app) newTotal(what string, total cryptfs.FsckCount, files bool) *progress {
	p := a.newProgress(what, "files")
	switch {
	case p.bar == nil:
	case files:
		p.bar.ChangeMax64(int64(total.Files))
		progressbar.OptionSetPredictTime(true)(p.bar)
	default:
		p.bar.ChangeMax64(int64(total.Bytes))
		progressbar.OptionSetPredictTime(true)(p.bar)
		progressbar.OptionShowBytes(true)(p.bar)
	}
	return p
}
