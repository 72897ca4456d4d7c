package journal

// Last returns the LSN of the newest record.
func (l *Log) Last() LSN {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lsn
}

// Resume says that recovery is over as far as it can be now. What Found told
// stays live until the next Checkpoint, whose settle appends anew what is still
// to be done.
func (l *Log) Resume() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.recovering = false
	l.use()
}
