package nameenc

// SetNonce makes every further target and value use this nonce. Vectors need
// it; a shipped binary must never reuse one.
func (c *Cipher) SetNonce(nonce [16]byte) { c.fixed = &nonce }

// SealName seals bytes as they are, under the name sub-key: what a holder of
// the key could make, well-formed or not.
func (c *Cipher) SealName(dir DirID, raw []byte) (string, error) {
	sealed, err := c.seal(c.name, raw, dir[:])
	return encoding.EncodeToString(sealed), err
}

// SealAttrName is SealName for attribute names.
func (c *Cipher) SealAttrName(raw []byte) (string, error) {
	sealed, err := c.seal(c.attr, raw, []byte(labelAttrName))
	return encoding.EncodeToString(sealed), err
}

// SealTarget is SealName for targets.
func (c *Cipher) SealTarget(nonce [16]byte, raw []byte) (string, error) {
	sealed, err := c.seal(c.link, raw, linkAD(nonce[:]))
	return encoding.EncodeToString(append(nonce[:], sealed...)), err
}
