package awskms

import (
	"errors"

	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

var actions = map[string]string{
	opGenerate: "kms:GenerateDataKey",
	opEncrypt:  "kms:Encrypt",
	opDecrypt:  "kms:Decrypt",
	opReEncrypt: "kms:ReEncryptFrom on the key that the wrapped key is under and kms:ReEncryptTo on the new one; " +
		"between Regions kms:Decrypt and kms:Encrypt",
	opDescribe: "kms:DescribeKey",
}

var hints = []struct {
	err  error
	text string
}{
	{errNoRegion, "set AWS_REGION or the profile's region, or use a key ARN instead of an alias"},
	{keywrap.ErrCredentials, "check the credentials: aws sts get-caller-identity, aws sso login, AWS_PROFILE"},
	{keywrap.ErrNotFound, "check the key's ARN, account and Region: aws kms describe-key"},
	{keywrap.ErrDisabled, "aws kms enable-key makes the key usable again"},
	{keywrap.ErrPending, "aws kms cancel-key-deletion, then aws kms enable-key, keeps the key"},
	{keywrap.ErrExpired, "import the key material again: aws kms import-key-material"},
	{keywrap.ErrCiphertext, "the file's header was damaged, or moved from another file, class or store"},
	{keywrap.ErrWrongKey, "the file's header names another key than the one its data key is wrapped under"},
	{keywrap.ErrUnsupported, "use a symmetric encryption key (SYMMETRIC_DEFAULT, ENCRYPT_DECRYPT)"},
	{keywrap.ErrThrottled, "lengthen the class's cache time, or ask AWS for a higher request quota"},
	{keywrap.ErrUnavailable, "check the network, the proxy and the endpoint; the AWS Health Dashboard tells about outages"},
	{keywrap.ErrBadURI, "use a key ARN or alias/NAME"},
}

// hint returns what a user can do about err, in one sentence.
func hint(op string, err error) string {
	if errors.Is(err, keywrap.ErrDenied) {
		return "the caller needs " + actions[op] + ", in IAM and in the key policy, with this encryption context"
	}
	for _, h := range hints {
		if errors.Is(err, h.err) {
			return h.text
		}
	}
	return ""
}
