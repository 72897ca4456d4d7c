package kmsserver

import (
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"
)

// admin makes one call of the admin API and returns status and body.
func admin(t *testing.T, base, method, path, body string) (int, string) {
	t.Helper()
	req, err := http.NewRequest(method, base+"/admin/"+path, strings.NewReader(body))
	must(t, req, err)
	resp, err := http.DefaultClient.Do(req)
	must(t, resp, err)
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(must(t, text, err))
}

func TestAdmin(t *testing.T) {
	s, c := start(t)
	for _, base := range []string{s.URL(), s.AdminURL()} {
		ok := func(method, path, body string) string {
			t.Helper()
			status, text := admin(t, base, method, path, body)
			if status != 200 {
				t.Errorf("%s %s: %d %s", method, path, status, text)
			}
			return text
		}
		var made struct{ ARN string }
		if err := json.Unmarshal([]byte(ok("POST", "keys", `{"description":"d"}`)), &made); err != nil {
			t.Fatal(err)
		}
		if got := ok("GET", "status", ""); !strings.Contains(got, s.URL()) {
			t.Errorf("status = %s", got)
		}
		ok("PUT", "faults", `{"rules":[{"error":"ThrottlingException"}]}`)
		_, err := generate(c, made.ARN, nil)
		wantCode(t, "PUT faults", err, "ThrottlingException")
		if got := ok("GET", "calls", ""); !strings.Contains(got, `"injected":"error"`) {
			t.Errorf("calls = %s", got)
		}
		ok("DELETE", "calls", "")
		if got := ok("GET", "calls", ""); strings.Contains(got, "eventName") {
			t.Errorf("calls after reset = %s", got)
		}
		ok("DELETE", "faults", "")
		var added struct{ ID json.Number }
		if err := json.Unmarshal([]byte(ok("POST", "faults", `{"error":"KMSInternalException"}`)), &added); err != nil {
			t.Fatal(err)
		}
		if got := ok("GET", "faults", ""); !strings.Contains(got, "KMSInternalException") {
			t.Errorf("faults = %s", got)
		}
		ok("DELETE", "faults/"+added.ID.String(), "")
		if status, _ := admin(t, base, "DELETE", "faults/"+added.ID.String(), ""); status != 404 {
			t.Errorf("removing a fault twice: %d", status)
		}
		ok("POST", "keys/material-expired", `{"key":"`+made.ARN+`","expired":true}`)
		_, err = generate(c, made.ARN, nil)
		wantCode(t, "material expired", err, "KMSInvalidStateException")
		ok("POST", "keys/material-expired", `{"key":"`+made.ARN+`"}`)
		ok("POST", "principals", `{"access_key_id":"AKIABOB","secret_access_key":"secret of bob","arn":"arn:aws:iam::111122223333:user/bob"}`)
		bob := client(s, Principal{AccessKeyID: "AKIABOB", SecretAccessKey: "secret of bob"}, s.Region())
		_, err = generate(bob, made.ARN, nil)
		wantCode(t, "bob", err, "")
		if got := ok("GET", "principals", ""); strings.Contains(got, "secret of bob") || !strings.Contains(got, "user/bob") {
			t.Errorf("principals = %s", got)
		}
		ok("POST", "principals/AKIABOB/expired", `{"expired":true}`)
		_, err = generate(bob, made.ARN, nil)
		wantCode(t, "bob expired", err, "ExpiredTokenException")
		ok("POST", "keys/policy", `{"key":"`+made.ARN+`","policy":`+policyOf(allow("bob", `"kms:*"`, ""))+`}`)
		_, err = generate(c, made.ARN, nil)
		wantCode(t, "policy", err, "AccessDeniedException")
		ok("POST", "clock", `{"advance_s":60}`)
	}
}

func TestAdminRefusals(t *testing.T) {
	s := StartT(t, Options{})
	for path, body := range map[string]string{
		"faults": `{"latency":1}`, "keys": `{"alias":"phi"}`, "clock": `{"advance_s":-1}`, "principals": `{}`,
		"keys/policy": `{"key":"alias/none","policy":{}}`, "keys/material-expired": `{"key":"nonsense"}`, "principals/AKIANOBODY/expired": `{}`,
	} {
		status, text := admin(t, s.URL(), "POST", path, body)
		if status != 400 || !strings.Contains(text, `"error"`) {
			t.Errorf("POST %s %s: %d %s, want 400", path, body, status, text)
		}
	}
	req, err := http.NewRequest("DELETE", s.URL()+"/admin/calls", nil)
	must(t, req, err)
	req.Header.Set("Origin", "http://example.com")
	resp, err := http.DefaultClient.Do(req)
	if must(t, resp, err); resp.StatusCode != http.StatusForbidden {
		t.Errorf("a browser may drive the admin API: %s", resp.Status)
	}
	resp.Body.Close()
}
