package main

import (
	"time"

	"github.com/schollz/progressbar/v3"
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
