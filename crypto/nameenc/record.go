package nameenc

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
)

// MAC returns HMAC-SHA256 under the record sub-key over the label and the parts
// of a record, each preceded by its length as uint64be: no two different
// argument lists share a MAC. label separates kinds of record. MAC panics on a
// wiped Cipher: there is no answer that would be safe to write.
func (c *Cipher) MAC(label string, record ...[]byte) [32]byte {
	mac, err := c.mac(label, record)
	if err != nil {
		panic(err)
	}
	return mac
}

// VerifyMAC answers ErrAuth unless mac is MAC's for these arguments. It
// compares in constant time.
func (c *Cipher) VerifyMAC(mac [32]byte, label string, record ...[]byte) error {
	want, err := c.mac(label, record)
	if err != nil {
		return err
	}
	if !hmac.Equal(mac[:], want[:]) {
		return ErrAuth
	}
	return nil
}

func (c *Cipher) mac(label string, record [][]byte) (out [32]byte, err error) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if c.wiped {
		return out, ErrKey
	}
	h := hmac.New(sha256.New, c.record.Bytes())
	var n [8]byte
	part := func(b []byte) {
		binary.BigEndian.PutUint64(n[:], uint64(len(b)))
		h.Write(n[:])
		h.Write(b)
	}
	part([]byte(label))
	for _, b := range record {
		part(b)
	}
	h.Sum(out[:0])
	return out, nil
}
