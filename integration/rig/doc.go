// Package rig builds kmsfs and runs it for the integration tests as a user
// would: the program itself, real mounts, real programs on them, and the KMS
// test server. What a test starts, it ends, by process and mount id.
package rig
