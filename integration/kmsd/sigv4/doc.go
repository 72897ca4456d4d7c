// Package sigv4 verifies AWS Signature Version 4 on incoming requests (AWS
// General Reference, "Signature Version 4 signing process"), from the
// specification and not through the signer of an SDK, so that tests of a
// client do not check the SDK against itself.
//
// It is part of a test tool: header signatures only, no presigned queries and
// no chunked payloads.
package sigv4
