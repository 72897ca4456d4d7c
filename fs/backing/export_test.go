package backing

// ZeroFill is what Punch does where there are no holes.
func (f *File) ZeroFill(off, size int64) error { return f.zeroFill(off, size) }

// ParseDirents walks a buffer of getdents64(2).
func ParseDirents(b []byte, f func(Entry) bool) bool { return parseDirents(b, f) }
