// Package awskms is the key service AWS KMS.
//
// Settings come from the AWS SDK's own configuration, so that what works for
// the AWS CLI works here: the credential chain, profiles, AWS_REGION,
// AWS_ENDPOINT_URL and AWS_ENDPOINT_URL_KMS, FIPS and dual-stack endpoints,
// AWS_CA_BUNDLE, AWS_MAX_ATTEMPTS, AWS_RETRY_MODE. Nothing is read or sent
// before the first call. A key ARN is asked for in its own Region, an alias in
// the configured one.
//
// # What is checked
//
// Decrypt and ReEncrypt always name the key that the wrapped key is said to be
// under, and an answer that names another key is refused. Wrapped keys name a
// key ARN, never an alias, because an alias can be pointed at another key.
//
// # Time
//
// Every call has a budget (Options.Budget). Throttling and unavailability are
// tried again within it, after random, growing pauses; nothing else is. One
// attempt may take a third of the budget at most, so that a dead connection
// leaves time for another. When KMS says that the credentials are bad, they are
// read anew at the next call. With Options.ReturnThrottling a throttled call
// fails at once, for package limit to try it again at a rate that KMS bears.
//
// # What is recorded
//
// Every HTTP request, retries included, is an Attempt of the call's Trace, with
// KMS's request id, which CloudTrail has too, and KMS's error code.
//
// # Keys in memory
//
// The SDK receives a plaintext data key as JSON in ordinary Go memory. The
// decoded copy is wiped at once; the response body and, for Encrypt, the request
// body are left to the garbage collector, which the SDK gives no way to change.
package awskms
