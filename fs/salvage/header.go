package salvage

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"path"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/placement"
)

// located is a header that may be a file's, and what stands before the chunks.
type located struct {
	*envelope.Header
	base int64
}

// prefixHeader returns the header that a file begins with, nil if it has none.
func prefixHeader(f *backing.File) *envelope.Header {
	h, err := parsePrefix(f)
	if err != nil {
		return nil
	}
	return h
}

func parsePrefix(f *backing.File) (*envelope.Header, error) {
	var start [16]byte
	if n, err := f.ReadAt(start[:], 0); err != nil || n < len(start) || string(start[:6]) != "kmsfs\x00" {
		return nil, ErrNoHeader
	}
	size := binary.BigEndian.Uint32(start[12:])
	if size > envelope.MaxHeader || !envelope.ValidHeaderSize(int(size)) {
		return nil, fmt.Errorf("header of %d bytes: %w", size, envelope.ErrFormat)
	}
	block := make([]byte, size)
	n, err := f.ReadAt(block, 0)
	if err != nil {
		return nil, err
	}
	return envelope.Parse(block[:n])
}

// headers returns what may be a file's header, wherever such is kept: before the
// chunks, in an attribute, in a file beside, or in a file elsewhere in the
// source. The error, if there is none, is of the one that came nearest.
func (s *Source) headers(d *backing.Dir, at string, f *backing.File) ([]located, error) {
	var out []located
	var first error
	add := func(h *envelope.Header, base int64, err error) {
		switch {
		case err == nil && h.ChunkSize != 0:
			if base < 0 {
				base = int64(h.BlockSize)
			}
			out = append(out, located{h, base})
		case err != nil && !errors.Is(err, ErrNoHeader) && first == nil:
			first = err
		}
	}
	h, err := parsePrefix(f)
	add(h, -1, err)
	if block, err := f.Attrs().Get(envelope.XattrName); err == nil {
		h, err := envelope.Parse(block)
		add(h, 0, err)
	}
	var id envelope.ID
	if n, err := f.ReadAt(id[:], 0); err == nil && n == placement.IDLen {
		for _, b := range s.sidecarBlocks(d, id) {
			h, err := envelope.Parse(b)
			if err == nil && h.File != id {
				err = fmt.Errorf("header of file %s: %w", h.File, ErrNoHeader)
			}
			add(h, int64(placement.IDLen), err)
		}
	}
	for _, r := range s.rewraps { // a crash may have torn the one in place
		h, err := envelope.Parse(r.Block)
		if err == nil && (r.Path == at || len(out) > 0 && out[0].File == h.File) {
			out = append(out, s.placed(h, id)...)
		}
	}
	if len(out) == 0 && first == nil {
		first = ErrNoHeader
	}
	return out, first
}

// placed returns a header that was found elsewhere, for every place that a file
// which begins with id may have its chunks at.
func (s *Source) placed(h *envelope.Header, id envelope.ID) []located {
	if h.ChunkSize == 0 {
		return nil
	}
	if bytes.Equal(id[:], h.File[:]) {
		return []located{{h, int64(placement.IDLen)}}
	}
	if st := s.stores[h.Store]; st != nil && st.layout != nil {
		return []located{{h, int64(st.layout.Placement.Base(st.layout.HeaderSize))}}
	}
	return []located{{h, int64(h.BlockSize)}, {h, 0}}
}

// sidecarBlocks reads the header files of a file id, the one beside it first.
func (s *Source) sidecarBlocks(d *backing.Dir, id envelope.ID) (out [][]byte) {
	if b, err := d.ReadFile(envelope.SidecarName(id), envelope.MaxHeader); err == nil {
		out = append(out, b)
	}
	for _, where := range s.sidecars[id] {
		dir, err := openPath(s.root, path.Dir(where))
		if err != nil {
			continue
		}
		if b, err := dir.ReadFile(path.Base(where), envelope.MaxHeader); err == nil {
			out = append(out, b)
		}
		_ = dir.Close()
	}
	return out
}
