// Command kmsd serves the AWS KMS of package kmsserver on loopback, for tests
// and demonstrations with programs that are not Go: the aws command line,
// shell scripts, kmsfs itself. It is a test tool and protects no keys.
//
//	kmsd --port-file port --log calls.jsonl &
//	eval "$(kmsd env --url http://127.0.0.1:$(cat port))"
//	aws kms create-key
//	kmsd ctl --url http://127.0.0.1:$(cat port) fault set '{"latency_ms": 50}'
package main
