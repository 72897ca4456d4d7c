package awskms

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"strings"

	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/credentials/processcreds"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"
	"github.com/aws/smithy-go"

	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

var errNoRegion = errors.New("no Region is configured")

// verdict is what a failed attempt means.
type verdict struct {
	err   error // a sentinel of keywrap
	retry bool  // another attempt may succeed
}

// codes maps KMS's error codes, without the suffix "Exception" that some
// protocols and servers leave out. Sources: the Errors section of each operation
// in the KMS API Reference, and its page Common Errors.
var codes = map[string]verdict{
	"AccessDenied":      {keywrap.ErrDenied, false},
	"NotAuthorized":     {keywrap.ErrDenied, false},
	"InvalidGrantToken": {keywrap.ErrDenied, false},
	"OptInRequired":     {keywrap.ErrDenied, false},

	"ExpiredToken":               {keywrap.ErrCredentials, false},
	"UnrecognizedClient":         {keywrap.ErrCredentials, false},
	"InvalidClientTokenId":       {keywrap.ErrCredentials, false},
	"InvalidAccessKeyId":         {keywrap.ErrCredentials, false},
	"IncompleteSignature":        {keywrap.ErrCredentials, false},
	"InvalidSignature":           {keywrap.ErrCredentials, false},
	"SignatureDoesNotMatch":      {keywrap.ErrCredentials, false},
	"MissingAuthenticationToken": {keywrap.ErrCredentials, false},
	"RequestExpired":             {keywrap.ErrCredentials, false},
	"RequestTimeTooSkewed":       {keywrap.ErrCredentials, false},

	"NotFound":         {keywrap.ErrNotFound, false},
	"InvalidArn":       {keywrap.ErrBadURI, false},
	"InvalidAliasName": {keywrap.ErrBadURI, false},
	"Disabled":         {keywrap.ErrDisabled, false},

	"InvalidCiphertext": {keywrap.ErrCiphertext, false},
	"IncorrectKey":      {keywrap.ErrWrongKey, false},

	"InvalidKeyUsage":      {keywrap.ErrUnsupported, false},
	"UnsupportedOperation": {keywrap.ErrUnsupported, false},
	"UnknownOperation":     {keywrap.ErrUnsupported, false},
	"InvalidAction":        {keywrap.ErrUnsupported, false},
	"Validation":           {keywrap.ErrUnsupported, false},
	"ValidationError":      {keywrap.ErrUnsupported, false},

	"Throttling":           {keywrap.ErrThrottled, true},
	"Throttled":            {keywrap.ErrThrottled, true},
	"RequestThrottled":     {keywrap.ErrThrottled, true},
	"RequestLimitExceeded": {keywrap.ErrThrottled, true},
	"LimitExceeded":        {keywrap.ErrThrottled, true},
	"TooManyRequests":      {keywrap.ErrThrottled, true},
	"SlowDown":             {keywrap.ErrThrottled, true},

	"KMSInternal":         {keywrap.ErrUnavailable, true},
	"InternalFailure":     {keywrap.ErrUnavailable, true},
	"InternalServerError": {keywrap.ErrUnavailable, true},
	"ServiceUnavailable":  {keywrap.ErrUnavailable, true},
	"DependencyTimeout":   {keywrap.ErrUnavailable, true},
	"KeyUnavailable":      {keywrap.ErrUnavailable, true},
	"RequestTimeout":      {keywrap.ErrUnavailable, true},
	"ConnectionError":     {keywrap.ErrUnavailable, true},
}

// classify says what err, as the SDK returns it, means. It does not look at the
// caller's context: see Provider.fail.
func classify(err error) verdict {
	var (
		cred *credentialError
		api  smithy.APIError
		skew interface{ RetryableError() bool }
	)
	switch {
	case errors.As(err, &cred):
		return classifyCredentials(cred.err)
	case isCancelled(err):
		return verdict{keywrap.ErrUnavailable, false}
	case errors.As(err, &api):
		v := classifyAPI(api, httpStatus(err))
		// The SDK marks what it can mend by itself: a request refused because
		// this machine's clock is wrong goes again with the server's time.
		if errors.As(err, &skew) && skew.RetryableError() {
			v.retry = true
		}
		return v
	case httpStatus(err) >= 400:
		return classifyStatus(httpStatus(err))
	}
	return classifyTransport(err)
}

func classifyAPI(api smithy.APIError, status int) verdict {
	code := strings.TrimSuffix(api.ErrorCode(), "Exception")
	if v, ok := codes[code]; ok {
		return v
	}
	switch {
	case code == "KMSInvalidState", code == "InvalidState":
		return verdict{stateError(stateInMessage(api.ErrorMessage())), false}
	case strings.HasPrefix(code, "CloudHsm"), strings.HasPrefix(code, "CustomKeyStore"), strings.HasPrefix(code, "Xks"):
		return verdict{keywrap.ErrUnavailable, false} // an administrator's matter
	}
	return classifyStatus(status)
}

func classifyStatus(status int) verdict {
	switch {
	case status == http.StatusTooManyRequests:
		return verdict{keywrap.ErrThrottled, true}
	case status >= 500, status == http.StatusRequestTimeout, status == 0:
		return verdict{keywrap.ErrUnavailable, true}
	case status == http.StatusUnauthorized, status == http.StatusForbidden, status == http.StatusProxyAuthRequired:
		return verdict{keywrap.ErrDenied, false}
	case status < 400: // a captive portal's redirect
		return verdict{keywrap.ErrUnavailable, false}
	}
	return verdict{keywrap.ErrUnsupported, false}
}

// classifyTransport is about everything between here and KMS. A name that does
// not exist and a certificate that is not trusted will not change in seconds.
func classifyTransport(err error) verdict {
	var (
		dns  *net.DNSError
		cert *tls.CertificateVerificationError
	)
	switch {
	case errors.As(err, &dns) && dns.IsNotFound, errors.As(err, &cert):
		return verdict{keywrap.ErrUnavailable, false}
	case errors.Is(err, errBadAnswer):
		return verdict{keywrap.ErrUnavailable, false}
	}
	return verdict{keywrap.ErrUnavailable, true}
}

// classifyCredentials tells "there are no credentials" from "the service that
// gives them cannot be reached". The instance metadata service is none such: it
// is the last link of the chain, absent on most machines.
func classifyCredentials(err error) verdict {
	var op *smithy.OperationError
	if errors.As(err, &op) && (op.ServiceID == "STS" || strings.HasPrefix(op.ServiceID, "SSO")) && !isCancelled(op.Err) {
		if v := classify(op.Err); errors.Is(v.err, keywrap.ErrUnavailable) || errors.Is(v.err, keywrap.ErrThrottled) {
			return v
		}
	}
	return verdict{keywrap.ErrCredentials, false}
}

// isCancelled reports whether the call's context ended it, rather than a
// timeout of one attempt.
func isCancelled(err error) bool {
	var c interface{ CanceledError() bool }
	return errors.As(err, &c) && c.CanceledError() || errors.Is(err, context.Canceled)
}

func httpStatus(err error) int {
	var r interface{ HTTPStatusCode() int }
	if errors.As(err, &r) {
		return r.HTTPStatusCode()
	}
	return 0
}

func requestID(err error) string {
	var r *awshttp.ResponseError
	if errors.As(err, &r) {
		return clean(r.ServiceRequestID(), 100)
	}
	return ""
}

// stateInMessage finds the key state in the message of KMSInvalidState, which
// has no field for it: "… is pending deletion."
func stateInMessage(msg string) types.KeyState {
	msg = strings.ToLower(strings.ReplaceAll(msg, " ", ""))
	for _, s := range []types.KeyState{types.KeyStatePendingReplicaDeletion, types.KeyStatePendingDeletion,
		types.KeyStatePendingImport, types.KeyStateDisabled} {
		if strings.Contains(msg, strings.ToLower(string(s))) {
			return s
		}
	}
	return ""
}

// stateError is what a key state means to a caller; ErrUnavailable if it is
// none of those that are someone's decision.
func stateError(s types.KeyState) error {
	switch s {
	case types.KeyStatePendingDeletion, types.KeyStatePendingReplicaDeletion:
		return keywrap.ErrPending
	case types.KeyStatePendingImport:
		return keywrap.ErrExpired
	case types.KeyStateDisabled:
		return keywrap.ErrDisabled
	}
	return keywrap.ErrUnavailable
}

// words returns what the service, or the system, said: for people, without line
// breaks, and short. op and its input are considered because KMS quotes invalid
// parameters, of which Encrypt's is a data key.
func words(op string, err error) string {
	var (
		api  smithy.APIError
		proc *processcreds.ProviderError
		cred *credentialError
	)
	switch {
	case errors.As(err, &proc): // quotes the process's output, credentials and all
		return "credential_process failed"
	case errors.As(err, &cred):
		return clean(cred.Error(), 400)
	case errors.As(err, &api):
		if op == opEncrypt && strings.HasPrefix(api.ErrorCode(), "Validation") {
			return clean(api.ErrorCode(), 100)
		}
		return clean(api.ErrorCode()+": "+api.ErrorMessage(), 400)
	}
	var opErr *smithy.OperationError
	if errors.As(err, &opErr) {
		err = opErr.Err
	}
	return clean(err.Error(), 400)
}

func clean(s string, limit int) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	if len(s) > limit {
		s = strings.ToValidUTF8(s[:limit], "") + "…"
	}
	return strings.TrimSuffix(s, ": ")
}
