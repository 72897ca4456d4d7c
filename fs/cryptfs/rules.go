package cryptfs

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/json"
	"fmt"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/fs/classify"
	"github.com/kmsfs/kmsfs/fs/record"
)

const (
	rulesKeyInfo = "kmsfs v1 rules"
	// rulesPad is what the rules are padded to a multiple of, in bytes, so that
	// their length tells little.
	rulesPad = 512
)

// setPolicy puts a policy into a record: classes in plaintext, as they say how
// to get at keys, and the rules, which are paths of the plaintext tree,
// encrypted under the store key (AES-256-GCM, random nonce in front).
func setPolicy(rec *record.Store, p *classify.Policy, storeKey *envelope.FileKey) error {
	rules, err := json.Marshal(p.Directories)
	if err != nil {
		return err
	}
	rules = append(rules, bytes.Repeat([]byte{' '}, rulesPad-len(rules)%rulesPad)...)
	aead, wipe, err := rulesAEAD(storeKey)
	if err != nil {
		return err
	}
	defer wipe()
	bare := p.Clone()
	bare.Directories = nil
	rec.Body.Policy = bare.Marshal()
	rec.Body.Rules = aead.Seal(nil, nil, rules, []byte(rec.Body.ID))
	return nil
}

// getRules decrypts a record's rules into a policy.
func getRules(rec *record.Store, p *classify.Policy, storeKey *envelope.FileKey) error {
	aead, wipe, err := rulesAEAD(storeKey)
	if err != nil {
		return err
	}
	defer wipe()
	rules, err := aead.Open(nil, nil, rec.Body.Rules, []byte(rec.Body.ID))
	if err != nil {
		return fmt.Errorf("rules: %w", ErrRecord)
	}
	if err := json.Unmarshal(rules, &p.Directories); err != nil {
		return fmt.Errorf("rules: %w", ErrRecord)
	}
	return p.Check()
}

func rulesAEAD(storeKey *envelope.FileKey) (aead cipher.AEAD, wipe func(), err error) {
	key, err := subKey(storeKey, rulesKeyInfo)
	if err != nil {
		return nil, nil, err
	}
	block, err := aes.NewCipher(key.Bytes())
	if err == nil {
		aead, err = cipher.NewGCMWithRandomNonce(block)
	}
	if err != nil {
		key.Wipe()
		return nil, nil, err
	}
	return aead, key.Wipe, nil
}
