package iampolicy

import (
	"errors"
	"strings"
	"testing"
)

const (
	alice = "arn:aws:iam::111122223333:user/alice"
	keyA  = "arn:aws:kms:us-east-1:111122223333:key/aaaa"
)

func TestPrincipalsActionsResources(t *testing.T) {
	for _, tc := range []struct {
		name, statement string
		caller, action  string
		want            Result
	}{
		{"everybody", `"Effect":"Allow","Principal":"*","Action":"kms:*","Resource":"*"`, alice, "kms:Decrypt", Result{Allow: true}},
		{"everybody as AWS", `"Effect":"Allow","Principal":{"AWS":"*"},"Action":"*","Resource":"*"`, alice, "kms:Decrypt", Result{Allow: true}},
		{"by ARN", `"Effect":"Allow","Principal":{"AWS":["x","` + alice + `"]},"Action":"kms:Decrypt","Resource":"*"`, alice, "kms:Decrypt", Result{Allow: true}},
		{"another ARN", `"Effect":"Allow","Principal":{"AWS":"` + alice + `2"},"Action":"kms:*","Resource":"*"`, alice, "kms:Decrypt", Result{}},
		{"account", `"Effect":"Allow","Principal":{"AWS":"111122223333"},"Action":"kms:*","Resource":"*"`, alice, "kms:Decrypt", Result{Delegated: true}},
		{"root", `"Effect":"Allow","Principal":{"AWS":"arn:aws:iam::111122223333:root"},"Action":"kms:*","Resource":"*"`, alice, "kms:Decrypt", Result{Delegated: true}},
		{"another root", `"Effect":"Allow","Principal":{"AWS":"arn:aws:iam::444455556666:root"},"Action":"kms:*","Resource":"*"`, alice, "kms:Decrypt", Result{}},
		{"deny by account", `"Effect":"Deny","Principal":{"AWS":"111122223333"},"Action":"kms:*","Resource":"*"`, alice, "kms:Decrypt", Result{Deny: true}},
		{"service", `"Effect":"Allow","Principal":{"Service":"s3.amazonaws.com"},"Action":"kms:*","Resource":"*"`, alice, "kms:Decrypt", Result{}},
		{"not alice", `"Effect":"Deny","NotPrincipal":{"AWS":"` + alice + `"},"Action":"kms:*","Resource":"*"`, alice, "kms:Decrypt", Result{}},
		{"not bob", `"Effect":"Deny","NotPrincipal":{"AWS":"arn:aws:iam::111122223333:user/bob"},"Action":"kms:*","Resource":"*"`, alice, "kms:Decrypt", Result{Deny: true}},
		{"role session", `"Effect":"Allow","Principal":{"AWS":"arn:aws:iam::111122223333:role/r"},"Action":"kms:*","Resource":"*"`, "arn:aws:sts::111122223333:assumed-role/r/s", "kms:Decrypt", Result{Allow: true}},
		{"prefix", `"Effect":"Allow","Principal":"*","Action":"kms:GenerateDataKey*","Resource":"*"`, alice, "kms:GenerateDataKeyWithoutPlaintext", Result{Allow: true}},
		{"prefix, another", `"Effect":"Allow","Principal":"*","Action":["kms:GenerateDataKey*"],"Resource":"*"`, alice, "kms:Decrypt", Result{}},
		{"case of actions", `"Effect":"Allow","Principal":"*","Action":"KMS:decrypt","Resource":"*"`, alice, "kms:Decrypt", Result{Allow: true}},
		{"NotAction", `"Effect":"Deny","Principal":"*","NotAction":"kms:Decrypt","Resource":"*"`, alice, "kms:Decrypt", Result{}},
		{"NotAction, another", `"Effect":"Deny","Principal":"*","NotAction":"kms:Decrypt","Resource":"*"`, alice, "kms:Encrypt", Result{Deny: true}},
		{"resource", `"Effect":"Allow","Principal":"*","Action":"*","Resource":"arn:aws:kms:*:111122223333:key/aaa?"`, alice, "kms:Decrypt", Result{Allow: true}},
		{"another resource", `"Effect":"Allow","Principal":"*","Action":"*","Resource":"arn:aws:kms:*:key/bbbb"`, alice, "kms:Decrypt", Result{}},
		{"NotResource", `"Effect":"Allow","Principal":"*","Action":"*","NotResource":"` + keyA + `"`, alice, "kms:Decrypt", Result{}},
	} {
		doc, err := Parse([]byte(`{"Version":"2012-10-17","Statement":{` + tc.statement + `}}`))
		if err != nil {
			t.Errorf("%s: %v", tc.name, err)
			continue
		}
		got := doc.Evaluate(Request{Action: tc.action, Resource: keyA, Principal: tc.caller})
		if got != tc.want {
			t.Errorf("%s: %+v, want %+v", tc.name, got, tc.want)
		}
	}
}

func TestConditions(t *testing.T) {
	context := map[string][]string{
		"kms:encryptioncontext:kmsfs:class": {"phi"},
		"kms:encryptioncontextkeys":         {"kmsfs:class", "kmsfs:store"},
		"kms:calleraccount":                 {"111122223333"},
		"aws:securetransport":               {"false"},
	}
	for condition, want := range map[string]bool{
		`"StringEquals":{"kms:EncryptionContext:kmsfs:class":"phi"}`:                                              true,
		`"StringEquals":{"KMS:encryptioncontext:KMSFS:CLASS":["pci","phi"]}`:                                      true,
		`"StringEquals":{"kms:EncryptionContext:kmsfs:class":"PHI"}`:                                              false,
		`"StringEqualsIgnoreCase":{"kms:EncryptionContext:kmsfs:class":"PHI"}`:                                    true,
		`"StringEquals":{"kms:EncryptionContext:kmsfs:purpose":"data"}`:                                           false,
		`"StringEqualsIfExists":{"kms:EncryptionContext:kmsfs:purpose":"data"}`:                                   true,
		`"StringEqualsIfExists":{"kms:EncryptionContext:kmsfs:class":"pci"}`:                                      false,
		`"StringNotEquals":{"kms:EncryptionContext:kmsfs:class":["pci","phi"]}`:                                   false,
		`"StringNotEquals":{"kms:EncryptionContext:kmsfs:class":"pci"}`:                                           true,
		`"StringNotEquals":{"kms:ViaService":"s3.us-east-1.amazonaws.com"}`:                                       true,
		`"StringEquals":{"kms:ViaService":"s3.us-east-1.amazonaws.com"}`:                                          false,
		`"StringLike":{"kms:EncryptionContext:kmsfs:class":"p?i"}`:                                                true,
		`"StringLike":{"kms:EncryptionContext:kmsfs:class":"*x"}`:                                                 false,
		`"StringNotLike":{"kms:EncryptionContext:kmsfs:class":"p*"}`:                                              false,
		`"Null":{"kms:ViaService":"true"}`:                                                                        true,
		`"Null":{"kms:ViaService":false}`:                                                                         false,
		`"Null":{"kms:EncryptionContext:kmsfs:class":"false"}`:                                                    true,
		`"Bool":{"aws:SecureTransport":"true"}`:                                                                   false,
		`"Bool":{"aws:SecureTransport":false}`:                                                                    true,
		`"BoolIfExists":{"aws:MultiFactorAuthPresent":"true"}`:                                                    true,
		`"ForAllValues:StringEquals":{"kms:EncryptionContextKeys":["kmsfs:class","kmsfs:store","kmsfs:id"]}`:      true,
		`"ForAllValues:StringEquals":{"kms:EncryptionContextKeys":"kmsfs:class"}`:                                 false,
		`"ForAllValues:StringEquals":{"kms:RequestAlias":"alias/x"}`:                                              true,
		`"ForAnyValue:StringEquals":{"kms:EncryptionContextKeys":"kmsfs:store"}`:                                  true,
		`"ForAnyValue:StringEquals":{"kms:EncryptionContextKeys":"other"}`:                                        false,
		`"ForAnyValue:StringEquals":{"kms:RequestAlias":"alias/x"}`:                                               false,
		`"ForAllValues:StringNotEquals":{"kms:EncryptionContextKeys":"kmsfs:class"}`:                              false,
		`"ForAnyValue:StringNotEquals":{"kms:EncryptionContextKeys":"kmsfs:class"}`:                               true,
		`"StringEquals":{"kms:CallerAccount":"111122223333","kms:EncryptionContext:kmsfs:class":"phi"}`:           true,
		`"StringEquals":{"kms:CallerAccount":"111122223333","kms:EncryptionContext:kmsfs:class":"pci"}`:           false,
		`"StringEquals":{"kms:CallerAccount":"111122223333"},"Null":{"kms:EncryptionContext:kmsfs:class":"true"}`: false,
	} {
		doc, err := Parse([]byte(`{"Statement":[{"Effect":"Allow","Principal":"*","Action":"*","Resource":"*","Condition":{` + condition + `}}]}`))
		if err != nil {
			t.Errorf("%s: %v", condition, err)
			continue
		}
		got := doc.Evaluate(Request{Action: "kms:Decrypt", Resource: keyA, Principal: alice, Context: context})
		if got.Allow != want {
			t.Errorf("%s: %v, want %v", condition, got.Allow, want)
		}
	}
}

var malformed = []string{
	``, `null`, `{}`, `[]`, `{"Statement":[]}`, `{"Statement":"x"}`, `{"Statement":[null]}`,
	`{"Version":"2020-01-01","Statement":{"Effect":"Allow","Principal":"*","Action":"*","Resource":"*"}}`,
	`{"Statement":{"Effect":"Maybe","Principal":"*","Action":"*","Resource":"*"}}`,
	`{"Statement":{"Effect":"Allow","Action":"*","Resource":"*"}}`,
	`{"Statement":{"Effect":"Allow","Principal":"*","NotPrincipal":"*","Action":"*","Resource":"*"}}`,
	`{"Statement":{"Effect":"Allow","Principal":"alice","Action":"*","Resource":"*"}}`,
	`{"Statement":{"Effect":"Allow","Principal":{},"Action":"*","Resource":"*"}}`,
	`{"Statement":{"Effect":"Allow","Principal":{"AWS":"arn:aws:iam::1:user/*"},"Action":"*","Resource":"*"}}`,
	`{"Statement":{"Effect":"Allow","Principal":{"GCP":"x"},"Action":"*","Resource":"*"}}`,
	`{"Statement":{"Effect":"Allow","Principal":"*","Resource":"*"}}`,
	`{"Statement":{"Effect":"Allow","Principal":"*","Action":"*"}}`,
	`{"Statement":{"Effect":"Allow","Principal":"*","Action":{"x":1},"Resource":"*"}}`,
	`{"Statement":{"Effect":"Allow","Principal":"*","Action":"*","Resource":"*","Condtion":{}}}`,
	`{"Statement":{"Effect":"Allow","Principal":"*","Action":"*","Resource":"*","Condition":{"NumericEquals":{"a:b":"1"}}}}`,
	`{"Statement":{"Effect":"Allow","Principal":"*","Action":"*","Resource":"*","Condition":{"StringEquals":{"ab":"1"}}}}`,
	`{"Statement":{"Effect":"Allow","Principal":"*","Action":"*","Resource":"*","Condition":{"StringEquals":{"a:b":[]}}}}`,
	`{"Statement":{"Effect":"Allow","Principal":"*","Action":"*","Resource":"*","Condition":{"StringEquals":{"a:b":"${aws:username}"}}}}`,
	`{"Statement":{"Effect":"Allow","Principal":"*","Action":"*","Resource":"*","Condition":{"Bool":{"a:b":"maybe"}}}}`,
	`{"Statement":{"Effect":"Allow","Principal":"*","Action":"*","Resource":"*","Condition":{"ForAnyValue:Null":{"a:b":"true"}}}}`,
	`{"Statement":{"Effect":"Allow","Principal":"*","Action":"*","Resource":"*"}} x`,
}

func TestMalformed(t *testing.T) {
	for _, text := range malformed {
		if _, err := Parse([]byte(text)); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v, want malformed", text, err)
		}
	}
	if _, err := Parse([]byte(strings.Repeat(" ", MaxLen+1))); !errors.Is(err, ErrMalformed) {
		t.Errorf("too long: %v", err)
	}
	withPrincipal := `{"Statement":{"Effect":"Allow","Principal":"*","Action":"*","Resource":"*"}}`
	if _, err := ParseIdentity([]byte(withPrincipal)); !errors.Is(err, ErrMalformed) {
		t.Errorf("identity policy with a principal: %v", err)
	}
	doc, err := ParseIdentity([]byte(strings.Replace(withPrincipal, `"Principal":"*",`, "", 1)))
	if err != nil || !doc.Evaluate(Request{Action: "kms:Decrypt", Resource: keyA, Principal: alice}).Allow {
		t.Errorf("identity policy: %v", err)
	}
}

func TestGlob(t *testing.T) {
	for _, tc := range []struct {
		pattern, s string
		want       bool
	}{
		{"", "", true}, {"*", "", true}, {"?", "", false}, {"a*c", "abbc", true}, {"a*c", "abbcd", false},
		{"*a*b*", "xxaxxb", true}, {"a?c", "abc", true}, {"a?c", "ac", false}, {"**", "x", true},
		{strings.Repeat("*a", 50), strings.Repeat("a", 2000) + "b", false},
	} {
		if got := glob(tc.pattern, tc.s); got != tc.want {
			t.Errorf("glob(%.20q, %.20q) = %v", tc.pattern, tc.s, got)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, text := range malformed {
		f.Add([]byte(text))
	}
	f.Add([]byte(`{"Statement":[{"Effect":"Allow","Principal":{"AWS":"*"},"Action":["kms:*"],"Resource":"*","Condition":{"ForAllValues:StringLikeIfExists":{"a:b":["*",1,true]}}}]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		for _, parse := range []func([]byte) (*Document, error){Parse, ParseIdentity} {
			doc, err := parse(text)
			if err == nil {
				doc.Evaluate(Request{Action: "kms:Decrypt", Resource: keyA, Principal: alice, Context: map[string][]string{"a:b": {"x"}}})
			} else if !errors.Is(err, ErrMalformed) {
				t.Errorf("error %v does not wrap ErrMalformed", err)
			}
		}
	})
}
