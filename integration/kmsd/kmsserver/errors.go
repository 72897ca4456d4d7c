package kmsserver

import (
	"errors"
	"fmt"
	"net/http"
)

// What Start and the methods of Server refuse.
var (
	ErrNotLoopback = errors.New("kmsserver: listens on loopback only")
	ErrOptions     = errors.New("kmsserver: invalid option")
	ErrState       = errors.New("kmsserver: state file cannot be read")
	ErrNoKey       = errors.New("kmsserver: no such key")
	ErrNoPrincipal = errors.New("kmsserver: no such principal")
)

// apiError is an answer of the service that is no success.
type apiError struct {
	code    string
	message string
	status  int // 0: statusOf(code)
}

func (e *apiError) Error() string { return e.code + ": " + e.message }

func (e *apiError) httpStatus() int {
	if e.status != 0 {
		return e.status
	}
	return statusOf(e.code)
}

func statusOf(code string) int {
	switch code {
	case "KMSInternalException", "KeyUnavailableException", "InternalFailure":
		return http.StatusInternalServerError
	case "DependencyTimeoutException", "ServiceUnavailableException":
		return http.StatusServiceUnavailable
	case "DryRunOperationException":
		return http.StatusPreconditionFailed
	case "UnknownOperationException":
		return http.StatusNotFound
	case "RequestEntityTooLargeException":
		return http.StatusRequestEntityTooLarge
	}
	return http.StatusBadRequest
}

func fail(code, format string, args ...any) *apiError {
	return &apiError{code: code, message: fmt.Sprintf(format, args...)}
}

func invalid(format string, args ...any) *apiError {
	return fail("ValidationException", format, args...)
}

// constraint words a limit as AWS does.
func constraint(field, rule string) *apiError {
	return invalid("1 validation error detected: Value at '%s' failed to satisfy constraint: %s", field, rule)
}

// defaultMessage is the text of an injected error whose Fault gives none.
func defaultMessage(code, keyARN string) string {
	if keyARN == "" {
		keyARN = "The key"
	}
	switch code {
	case "ThrottlingException":
		return "You have exceeded the rate at which you may call KMS. Reduce the frequency of your calls."
	case "KMSInvalidStateException":
		return keyARN + " is pending import."
	case "DisabledException":
		return keyARN + " is disabled."
	case "NotFoundException":
		return fmt.Sprintf("Key '%s' does not exist", keyARN)
	case "ExpiredTokenException":
		return "The security token included in the request is expired"
	case "UnrecognizedClientException":
		return "The security token included in the request is invalid."
	case "InvalidCiphertextException":
		return ""
	}
	return "injected by kmsd"
}
