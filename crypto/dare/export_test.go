package dare

// SetNonce makes every further Seal use this nonce. Vectors need it; a shipped
// binary must never reuse one.
func (c *Codec) SetNonce(nonce [12]byte) { c.nonce = &nonce }

// ChunkKey returns the key of one chunk.
func (c *Codec) ChunkKey(index int64, last bool) ([]byte, error) {
	var o op
	err := o.derive(c.prk, index, last)
	return o.key[:], err
}
