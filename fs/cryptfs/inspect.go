package cryptfs

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/placement"
	"github.com/kmsfs/kmsfs/fs/record"
)

// FileInfo is what can be told about a store file without any key.
type FileInfo struct {
	Store      string          `json:"store"` // path
	Entry      string          `json:"entry"` // path in the store
	Kind       string          `json:"kind"`  // file, directory, symlink, record, other
	Class      string          `json:"class,omitempty"`
	ID         string          `json:"id,omitempty"`
	Size       int64           `json:"size"`       // plaintext bytes
	StoreSize  int64           `json:"store_size"` // bytes
	ChunkSize  int             `json:"chunk_size,omitempty"`
	Suite      string          `json:"suite,omitempty"`
	Placement  string          `json:"placement"`
	Sparse     bool            `json:"sparse,omitempty"`
	Recipients []RecipientInfo `json:"recipients,omitempty"`
}

// RecipientInfo is one wrapped copy of a file's data key.
type RecipientInfo struct {
	Class    string `json:"class"`
	Key      string `json:"key"`
	Material string `json:"material,omitempty"`
	Bytes    int    `json:"wrapped_bytes"`
}

// InspectFile tells about the file at path in the store at storePath. Nothing
// is authenticated: that takes the key.
func InspectFile(storePath, path string) (*FileInfo, error) {
	rel, err := filepath.Rel(storePath, path)
	if err != nil || !filepath.IsLocal(rel) {
		return nil, fmt.Errorf("%s is not in the store: %w", path, ErrNoStore)
	}
	root, err := backing.OpenRoot(storePath)
	if err != nil {
		return nil, err
	}
	defer func() { _ = root.Close() }()
	_, layout, err := readRecord(root)
	if err != nil {
		return nil, err
	}
	out := &FileInfo{Store: storePath, Entry: rel, Placement: layout.Placement.String()}
	dir, err := backing.OpenRoot(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer func() { _ = dir.Close() }()
	entry := filepath.Base(path)
	if rel == "." {
		dir, entry = root, "."
	}
	st, err := dir.Stat(entry)
	if err != nil {
		return nil, err
	}
	out.StoreSize, out.Size = st.Size, st.Size
	switch {
	case st.Type() == unix.S_IFDIR:
		return out, out.directory(dir, entry)
	case strings.HasPrefix(entry, internalPrefix) && !strings.HasPrefix(entry, longEntry):
		out.Kind = "record"
	case st.Type() == unix.S_IFLNK:
		out.Kind = "symlink"
	case st.Type() == unix.S_IFREG:
		return out, out.file(layout, dir, entry, st)
	default:
		out.Kind = "other"
	}
	return out, nil
}

func (o *FileInfo) directory(dir *backing.Dir, entry string) error {
	o.Kind = "directory"
	sub, err := dir.OpenDir(entry)
	if err != nil {
		return err
	}
	defer func() { _ = sub.Close() }()
	rec, _, err := readDirRecord(sub)
	if errors.Is(err, ErrDirRecord) && strings.HasPrefix(entry, internalPrefix) {
		o.Kind = "record"
		return nil
	}
	if err != nil {
		return err
	}
	o.Class, o.ID = rec.Class, envelope.ID(rec.ID).String()
	return nil
}

func (o *FileInfo) file(l *record.Layout, dir *backing.Dir, entry string, st backing.Stat) error {
	o.Kind = "file"
	if rec, _, err := readDirRecord(dir); err == nil {
		o.Class = rec.Class
	}
	if st.Size == 0 {
		return nil
	}
	disk, err := dir.Open(entry, unix.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer func() { _ = disk.Close() }()
	block, err := placement.New(l.Placement, l.HeaderSize).Read(disk, []*backing.Dir{dir})
	if err != nil {
		return err
	}
	h, err := envelope.Parse(block)
	if err != nil {
		return err
	}
	o.ID, o.ChunkSize, o.Suite, o.Sparse = h.File.String(), h.ChunkSize, dare.Suite(h.Suite).String(), h.Sparse
	for _, r := range h.Recipients {
		o.Recipients = append(o.Recipients, RecipientInfo{r.Class, r.Wrapped.Key, r.Wrapped.Material, len(r.Wrapped.Blob)})
	}
	geo := dare.Geometry{ChunkSize: h.ChunkSize, Base: dare.CipherOff(l.Placement.Base(l.HeaderSize))}
	size, err := geo.PlainSize(dare.CipherOff(st.Size))
	o.Size = int64(size)
	return err
}
