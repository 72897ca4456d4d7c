package kmsserver

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/kms"
)

// user adds a principal of the server's account with an optional policy.
func user(t *testing.T, s *Server, name, policy string) Principal {
	t.Helper()
	p := Principal{
		AccessKeyID: "AKIA" + strings.ToUpper(name), SecretAccessKey: "secret of " + name,
		ARN: "arn:aws:iam::" + DefaultAccount + ":user/" + name, Policy: json.RawMessage(policy),
	}
	if err := s.AddPrincipal(p); err != nil {
		t.Fatalf("AddPrincipal: %v", err)
	}
	return p
}

// allow is a statement for one user.
func allow(name, actions, condition string) string {
	st := fmt.Sprintf(`{"Effect":"Allow","Principal":{"AWS":"arn:aws:iam::%s:user/%s"},"Action":[%s],"Resource":"*"`, DefaultAccount, name, actions)
	if condition != "" {
		st += `,"Condition":{` + condition + `}`
	}
	return st + "}"
}

func policyOf(statements ...string) string {
	return `{"Version":"2012-10-17","Statement":[` + strings.Join(statements, ",") + `]}`
}

func generate(c *kms.Client, keyID string, ec map[string]string) ([]byte, error) {
	out, err := c.GenerateDataKey(context.Background(), &kms.GenerateDataKeyInput{KeyId: &keyID, KeySpec: "AES_256", EncryptionContext: ec})
	if err != nil {
		return nil, err
	}
	return out.CiphertextBlob, nil
}

// TestWriteOnly is a key whose user may make data keys but not open them.
func TestWriteOnly(t *testing.T) {
	s := StartT(t, Options{})
	p := user(t, s, "writer", "")
	c := client(s, p, s.Region())
	arn := newKey(t, s, KeyOptions{Policy: json.RawMessage(policyOf(allow("writer", `"kms:GenerateDataKey*"`, "")))})
	blob, err := generate(c, arn, phi)
	wantCode(t, "GenerateDataKey", err, "")
	_, err = decrypt(c, arn, blob, phi)
	wantCode(t, "Decrypt", err, "AccessDeniedException")
	want := "User: " + p.ARN + " is not authorized to perform: kms:Decrypt on resource: " + arn + " because no resource-based policy allows the kms:Decrypt action"
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("text = %v, want %q in it", err, want)
	}
	_, err = decrypt(c, "", blob, phi)
	wantCode(t, "Decrypt without key id", err, "AccessDeniedException")
	_, err = generate(client(s, DefaultPrincipal(), s.Region()), arn, nil)
	wantCode(t, "administrator, whom the policy does not name", err, "AccessDeniedException")
}

// TestOneClassOnly is a key whose user may open one class only.
func TestOneClassOnly(t *testing.T) {
	s := StartT(t, Options{})
	c := client(s, user(t, s, "reader", ""), s.Region())
	arn := newKey(t, s, KeyOptions{Policy: json.RawMessage(policyOf(
		allow("reader", `"kms:GenerateDataKey"`, ""),
		allow("reader", `"kms:Decrypt"`, `"StringEquals":{"kms:EncryptionContext:kmsfs:class":"general"}`),
	))})
	for class, want := range map[string]string{"general": "", "phi": "AccessDeniedException"} {
		ec := map[string]string{"kmsfs:class": class}
		blob, err := generate(c, arn, ec)
		wantCode(t, "GenerateDataKey "+class, err, "")
		_, err = decrypt(c, arn, blob, ec)
		wantCode(t, "Decrypt "+class, err, want)
	}
	blob, err := generate(c, arn, nil)
	wantCode(t, "GenerateDataKey without context", err, "")
	_, err = decrypt(c, arn, blob, nil)
	wantCode(t, "Decrypt without context", err, "AccessDeniedException")
}

func TestConditionsOfACall(t *testing.T) {
	s := StartT(t, Options{})
	c := client(s, user(t, s, "u", ""), s.Region())
	arn := newKey(t, s, KeyOptions{Alias: "alias/u"})
	for condition, want := range map[string]string{
		`"StringEquals":{"kms:CallerAccount":"111122223333"}`:                                           "",
		`"StringEquals":{"kms:CallerAccount":"444455556666"}`:                                           "AccessDeniedException",
		`"StringEquals":{"kms:ViaService":"s3.us-east-1.amazonaws.com"}`:                                "AccessDeniedException",
		`"Null":{"kms:EncryptionContext:kmsfs:store":"false"}`:                                          "",
		`"ForAnyValue:StringEquals":{"kms:EncryptionContextKeys":"kmsfs:id"}`:                           "",
		`"ForAllValues:StringEquals":{"kms:EncryptionContextKeys":["kmsfs:id","kmsfs:store"]}`:          "AccessDeniedException",
		`"StringLike":{"kms:EncryptionContext:kmsfs:store":"00*"}`:                                      "",
		`"StringEquals":{"kms:RequestAlias":"alias/u"}`:                                                 "AccessDeniedException",
		`"ForAnyValue:StringEquals":{"kms:ResourceAliases":"alias/u"}`:                                  "",
		`"StringEquals":{"aws:RequestedRegion":"eu-west-1"}`:                                            "AccessDeniedException",
		`"ArnLike":{"aws:PrincipalArn":"arn:aws:iam::*:user/u"},"Bool":{"aws:SecureTransport":"false"}`: "",
	} {
		must(t, 0, s.SetPolicy(arn, policyOf(allow("u", `"kms:*"`, condition))))
		_, err := generate(c, arn, phi)
		wantCode(t, condition, err, want)
	}
	must(t, 0, s.SetPolicy(arn, policyOf(allow("u", `"kms:*"`, `"StringEquals":{"kms:RequestAlias":"alias/u"}`))))
	_, err := generate(c, "alias/u", phi)
	wantCode(t, "by alias", err, "")
}

func TestReEncryptPermissions(t *testing.T) {
	ctx := context.Background()
	s := StartT(t, Options{})
	c := client(s, user(t, s, "mover", ""), s.Region())
	a, b := newKey(t, s, KeyOptions{}), newKey(t, s, KeyOptions{})
	blob, err := generate(client(s, DefaultPrincipal(), s.Region()), a, phi)
	wantCode(t, "GenerateDataKey", err, "")
	for _, tc := range []struct{ from, to, want string }{
		{`"kms:ReEncryptFrom"`, `"kms:ReEncryptTo"`, ""},
		{`"kms:ReEncrypt*"`, `"kms:ReEncrypt*"`, ""},
		{`"kms:ReEncryptTo"`, `"kms:ReEncryptTo"`, "AccessDeniedException"},
		{`"kms:ReEncryptFrom"`, `"kms:ReEncryptFrom"`, "AccessDeniedException"},
		{`"kms:Decrypt"`, `"kms:Encrypt"`, "AccessDeniedException"},
	} {
		must(t, 0, s.SetPolicy(a, policyOf(allow("mover", tc.from, ""))))
		must(t, 0, s.SetPolicy(b, policyOf(allow("mover", tc.to, ""))))
		_, err := c.ReEncrypt(ctx, &kms.ReEncryptInput{CiphertextBlob: blob, SourceEncryptionContext: phi, DestinationKeyId: &b})
		wantCode(t, tc.from+" to "+tc.to, err, tc.want)
	}
}

func TestIdentityPolicies(t *testing.T) {
	ctx := context.Background()
	s := StartT(t, Options{})
	arn := newKey(t, s, KeyOptions{})
	other := newKey(t, s, KeyOptions{})
	only := `{"Statement":[{"Effect":"Allow","Action":"kms:*","Resource":"` + arn + `"}]}`
	c := client(s, user(t, s, "limited", only), s.Region())
	_, err := generate(c, arn, nil)
	wantCode(t, "the key allowed", err, "")
	_, err = generate(c, other, nil)
	wantCode(t, "another key", err, "AccessDeniedException")
	_, err = c.CreateKey(ctx, &kms.CreateKeyInput{})
	wantCode(t, "CreateKey", err, "AccessDeniedException")
	_, err = c.ListKeys(ctx, &kms.ListKeysInput{})
	wantCode(t, "ListKeys", err, "AccessDeniedException")
	// A key policy that names the user allows by itself.
	must(t, 0, s.SetPolicy(other, policyOf(allow("limited", `"kms:*"`, ""))))
	_, err = generate(c, other, nil)
	wantCode(t, "named by the key policy", err, "")
	user(t, s, "limited", `{"Statement":[{"Effect":"Deny","Action":"kms:GenerateDataKey","Resource":"*"}]}`)
	_, err = generate(c, other, nil)
	wantCode(t, "denied by the user's policy", err, "AccessDeniedException")
	// An explicit deny of the key policy wins over its allow.
	must(t, 0, s.SetPolicy(arn, policyOf(`{"Effect":"Allow","Principal":"*","Action":"kms:*","Resource":"*"}`,
		`{"Effect":"Deny","Principal":"*","Action":"kms:GenerateDataKey","Resource":"*"}`)))
	_, err = generate(client(s, DefaultPrincipal(), s.Region()), arn, nil)
	wantCode(t, "explicit deny", err, "AccessDeniedException")
}

func TestKeyPolicies(t *testing.T) {
	ctx := context.Background()
	s, c := start(t)
	arn := newKey(t, s, KeyOptions{})
	get, err := c.GetKeyPolicy(ctx, &kms.GetKeyPolicyInput{KeyId: &arn})
	if must(t, get, err); !strings.Contains(*get.Policy, "Enable IAM User Permissions") || *get.PolicyName != "default" {
		t.Errorf("default policy = %s", *get.Policy)
	}
	put := func(policy string, bypass bool) error {
		_, err := c.PutKeyPolicy(ctx, &kms.PutKeyPolicyInput{KeyId: &arn, Policy: &policy, BypassPolicyLockoutSafetyCheck: bypass})
		return err
	}
	wantCode(t, "no policy", put("nonsense", false), "MalformedPolicyDocumentException")
	lock := policyOf(allow("nobody", `"kms:*"`, ""))
	wantCode(t, "locks the caller out", put(lock, false), "MalformedPolicyDocumentException")
	get, err = c.GetKeyPolicy(ctx, &kms.GetKeyPolicyInput{KeyId: &arn})
	if must(t, get, err); strings.Contains(*get.Policy, "nobody") {
		t.Error("a refused policy is in force")
	}
	_, err = c.CreateKey(ctx, &kms.CreateKeyInput{Policy: &lock})
	wantCode(t, "CreateKey locks the caller out", err, "MalformedPolicyDocumentException")
	if got := s.status().Keys; got != 1 {
		t.Errorf("%d keys, want 1", got)
	}
	wantCode(t, "bypass", put(lock, true), "")
	wantCode(t, "locked out", put(lock, true), "AccessDeniedException")
	_, err = c.GetKeyPolicy(ctx, &kms.GetKeyPolicyInput{KeyId: &arn, PolicyName: aws.String("other")})
	wantCode(t, "another policy name", err, "NotFoundException")
}

func TestCredentials(t *testing.T) {
	s := StartT(t, Options{})
	arn := newKey(t, s, KeyOptions{})
	admin := DefaultPrincipal()
	try := func(p Principal) error { _, err := generate(client(s, p, s.Region()), arn, nil); return err }

	wrong := admin
	wrong.SecretAccessKey += "x"
	wantCode(t, "wrong secret", try(wrong), "InvalidSignatureException")
	wrong = admin
	wrong.AccessKeyID = "AKIAUNKNOWN"
	wantCode(t, "unknown key", try(wrong), "UnrecognizedClientException")
	wrong = admin
	wrong.SessionToken = "token"
	wantCode(t, "a token where none belongs", try(wrong), "UnrecognizedClientException")
	must(t, 0, s.SetExpired(admin.AccessKeyID, true))
	wantCode(t, "expired", try(admin), "ExpiredTokenException")
	must(t, 0, s.SetExpired(admin.AccessKeyID, false))
	wantCode(t, "renewed", try(admin), "")

	session := Principal{AccessKeyID: "ASIASESSION", SecretAccessKey: "s", SessionToken: "t", ARN: "arn:aws:sts::111122223333:assumed-role/r/s"}
	must(t, 0, s.AddPrincipal(session))
	wantCode(t, "session", try(session), "")
	session.SessionToken = ""
	wantCode(t, "session without its token", try(session), "UnrecognizedClientException")
	_, err := generate(client(s, admin, "nowhere"), arn, nil)
	wantCode(t, "no Region", err, "InvalidSignatureException")
	for _, p := range []Principal{{}, {AccessKeyID: "AKIA", SecretAccessKey: "s"}, {AccessKeyID: "AKIA", SecretAccessKey: "s", ARN: admin.ARN, Policy: json.RawMessage(`{}`)}} {
		if err := s.AddPrincipal(p); err == nil {
			t.Errorf("AddPrincipal accepts %+v", p)
		}
	}
}

// TestRawRequests are requests that no SDK sends.
func TestRawRequests(t *testing.T) {
	s := StartT(t, Options{})
	for _, tc := range []struct {
		name, method, path, target, ctype, body string
		status                                  int
		want                                    string
	}{
		{"unsigned", "POST", "/", "TrentService.ListKeys", contentType, "{}", 400, "MissingAuthenticationTokenException"},
		{"GET", "GET", "/", "TrentService.ListKeys", contentType, "", 404, "UnknownOperationException"},
		{"path", "POST", "/x", "TrentService.ListKeys", contentType, "{}", 404, "UnknownOperationException"},
		{"content type", "POST", "/", "TrentService.ListKeys", "text/plain", "{}", 404, "UnknownOperationException"},
		{"no target", "POST", "/", "", contentType, "{}", 404, "UnknownOperationException"},
		{"another service", "POST", "/", "DynamoDB_20120810.ListTables", contentType, "{}", 404, "UnknownOperationException"},
		{"too large", "POST", "/", "TrentService.ListKeys", contentType, strings.Repeat(" ", maxBody+1), 413, "RequestEntityTooLargeException"},
	} {
		req, err := http.NewRequest(tc.method, s.URL()+tc.path, strings.NewReader(tc.body))
		must(t, req, err)
		req.Header.Set("X-Amz-Target", tc.target)
		req.Header.Set("Content-Type", tc.ctype)
		resp, err := http.DefaultClient.Do(req)
		must(t, resp, err)
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		var answer struct {
			Type string `json:"__type"`
		}
		if json.Unmarshal(must(t, body, err), &answer) != nil || answer.Type != tc.want || resp.StatusCode != tc.status {
			t.Errorf("%s: %s %s, want %d %s", tc.name, resp.Status, body, tc.status, tc.want)
		}
		if len(resp.Header.Get("X-Amzn-Requestid")) != 36 {
			t.Errorf("%s: no request id", tc.name)
		}
	}
}
