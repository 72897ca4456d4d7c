package lease

// Shared returns c for a file system that other machines have, or have not.
func (c Config) Shared(shared bool) Config {
	c.shared = &shared
	return c
}

// Hang is what a machine that stops does: the lease is no longer renewed, and
// its time goes on.
func (l *Lease) Hang() {
	l.seen.Store(0)
	close(l.stop)
	l.loop.Wait()
	l.stop = make(chan struct{})
	l.renewed.Store(uptime() - 3*int64(l.a.Interval))
}

// Crash is what a killed owner leaves: its file.
func (l *Lease) Crash() {
	l.mu.Lock()
	l.ended = true
	l.mu.Unlock()
	close(l.stop)
	l.loop.Wait()
	_ = l.file.Close()
}

// Token tells leases apart.
func (l *Lease) Token() [16]byte { return l.rec.token }

// Aside does the first half of a takeover, for a taker that stops there.
func (l *Lease) Aside(name string) error { return l.a.Dir.Rename(FileName, l.a.Dir, name, 0) }

// MoveAway is the whole of it, for a taker that has judged other bytes.
func (l *Lease) MoveAway(judged []byte) (bool, error) { return l.a.moveAway(judged) }

// SetProcess writes another process into the lease.
func (l *Lease) SetProcess(pid uint32, start uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.rec.process.pid, l.rec.process.start = pid, start
	l.renew()
}
