package chunkfile

// Rehead calls rewrite, which puts another header in the place of the one that
// is on the disk, with the same size and the same flags. Meanwhile nothing else
// is written. It reports false, without a call, where the disk has no header.
func (f *File) Rehead(rewrite func() error) (bool, error) {
	f.mu.Lock()
	defer f.unlock()
	if !f.header || f.diskSize == 0 {
		return false, nil
	}
	if err := f.settle(); err != nil {
		return false, err
	}
	return true, rewrite()
}
