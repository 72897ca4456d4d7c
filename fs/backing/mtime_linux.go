package backing

import "golang.org/x/sys/unix"

// Mtime returns the time of the last modification.
func (f *File) Mtime() (unix.Timespec, error) {
	st, err := f.Stat()
	return unix.Timespec{Sec: st.Mtime.Sec, Nsec: int64(st.Mtime.Nsec)}, err
}

// SyncFS is syncfs(2) of the file system that d is on.
func (d *Dir) SyncFS() error {
	return d.do(&Op{Call: "syncfs"}, func() error { return retry(func() error { return unix.Syncfs(d.fd) }) })
}
