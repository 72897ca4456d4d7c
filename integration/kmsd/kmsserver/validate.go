package kmsserver

import (
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
)

const (
	maxGrantTokens   = 10
	maxContextJSON   = 8192
	maxNumberOfBytes = 1024
	maxAliasName     = 256
	recipientRefused = "kmsd has no attestation: Recipient is not supported"
	enumRule         = "Member must satisfy enum value set: [%s]"
	dataKeyAES256    = 32
	dataKeyAES128    = 16
	maxListLimit     = 1000
)

var aliasForm = regexp.MustCompile(`^[a-zA-Z0-9:/_-]+$`)

func checkAliasName(name string) error {
	switch {
	case name == "" || len(name) > maxAliasName || !aliasForm.MatchString(name):
		return constraint("aliasName", "Member must satisfy regular expression pattern: ^[a-zA-Z0-9:/_-]+$")
	case !strings.HasPrefix(name, "alias/") || name == "alias/":
		return invalid("Alias must start with the prefix \"alias/\". Please see https://docs.aws.amazon.com/kms/latest/developerguide/kms-alias.html")
	case strings.HasPrefix(name, "alias/aws/"):
		return fail("InvalidAliasNameException", "Alias names that begin with alias/aws/ are reserved")
	}
	return nil
}

func checkContext(field string, c map[string]string) error {
	if len(c) == 0 {
		return nil
	}
	text, err := json.Marshal(c)
	if err != nil || len(text) > maxContextJSON {
		return constraint(field, fmt.Sprintf("Member must be at most %d bytes of JSON", maxContextJSON))
	}
	for k := range c {
		if k == "" {
			return constraint(field, "Member must have keys with length greater than or equal to 1")
		}
	}
	return nil
}

func checkBlob(blob []byte) error {
	switch {
	case len(blob) < 1:
		return constraint("ciphertextBlob", "Member must have length greater than or equal to 1")
	case len(blob) > maxBlob:
		return constraint("ciphertextBlob", fmt.Sprintf("Member must have length less than or equal to %d", maxBlob))
	}
	return nil
}

func checkAlgorithm(field, name string) error {
	switch name {
	case "", encryptionAlgorithm:
		return nil
	case "RSAES_OAEP_SHA_1", "RSAES_OAEP_SHA_256", "SM2PKE":
		return fail("InvalidKeyUsageException", "You cannot use algorithm %s with a symmetric key", name)
	}
	return constraint(field, fmt.Sprintf(enumRule, "SYMMETRIC_DEFAULT, RSAES_OAEP_SHA_1, RSAES_OAEP_SHA_256, SM2PKE"))
}

// common are the fields that most cryptographic operations share.
type common struct {
	GrantTokens []string
	Recipient   json.RawMessage
	DryRun      bool
}

func (c *common) check() error {
	if len(c.GrantTokens) > maxGrantTokens {
		return constraint("grantTokens", fmt.Sprintf("Member must have length less than or equal to %d", maxGrantTokens))
	}
	if len(c.Recipient) > 0 && string(c.Recipient) != "null" {
		return fail("UnsupportedOperationException", recipientRefused)
	}
	return nil
}

// end is the last check of an operation that knows DryRun.
func (c *common) end() error {
	if c.DryRun {
		return fail("DryRunOperationException", "The request would have succeeded, but the DryRun option is set.")
	}
	return nil
}

// dataKeyLen reads KeySpec and NumberOfBytes, of which exactly one is given.
func dataKeyLen(spec string, bytes *int) (int, error) {
	if (spec == "") == (bytes == nil) {
		return 0, invalid("Please specify either number of bytes or key spec.")
	}
	if bytes != nil {
		if *bytes < 1 || *bytes > maxNumberOfBytes {
			return 0, constraint("numberOfBytes", fmt.Sprintf("Member must have value between 1 and %d", maxNumberOfBytes))
		}
		return *bytes, nil
	}
	switch spec {
	case "AES_256":
		return dataKeyAES256, nil
	case "AES_128":
		return dataKeyAES128, nil
	}
	return 0, constraint("keySpec", fmt.Sprintf(enumRule, "AES_256, AES_128"))
}
