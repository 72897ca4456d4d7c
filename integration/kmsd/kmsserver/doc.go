// Package kmsserver is an AWS KMS of its own for tests: it speaks the wire
// protocol (JSON 1.1, SigV4) on loopback to the real SDKs and the aws command
// line, keeps keys with policies, rotation, deletion and multi-Region replicas,
// logs calls as CloudTrail does, and fails on demand. It is a test tool: keys
// lie in memory, and in the state file, unprotected. It never ships in kmsfs
// and imports nothing of it.
//
// In a test:
//
//	s := kmsserver.StartT(t, kmsserver.Options{})
//	arn, err := s.CreateKey(kmsserver.KeyOptions{Alias: "alias/phi"})
//	cmd.Env = append(os.Environ(), s.Env(kmsserver.DefaultPrincipal())...)
//	…
//	s.SetFaults(kmsserver.Faults{Outage: kmsserver.OutageRefuse})
//	for _, call := range s.Calls() { … }
//
// Principals. A call is made by the Principal whose access key signs it. The
// key's policy decides; the default policy allows the account's root, which
// delegates to the account: a principal without a policy of its own then may
// do everything, one with a policy what that allows. A key policy that is set
// explicitly denies whatever it does not allow. Operations without a key
// (CreateKey, ListKeys, ListAliases) ask the principal's own policy only.
//
// Regions. The Region of a call is that of its credential scope; one server
// holds all Regions of one account.
//
// Differences from AWS: changes show at once; rotation on demand is immediate;
// grants, asymmetric and HMAC keys and custom key stores do not exist; client
// errors are HTTP 400 as AWS answers them on the wire (its model says 404 and
// 409 for some), except DryRunOperationException, which is 412.
//
// All methods of Server are safe for concurrent use.
package kmsserver
