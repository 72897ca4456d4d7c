package kmsserver

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/kms"
)

func TestRestart(t *testing.T) {
	ctx := context.Background()
	file := filepath.Join(t.TempDir(), "state.json")
	config := Options{StateFile: file, Keys: []KeyOptions{{Alias: "alias/configured"}}}
	first, err := Start(ctx, config)
	must(t, first, err)
	c := client(first, DefaultPrincipal(), "us-east-1")
	rotated := dataKey(t, c, "alias/configured", phi)
	arn := *rotated.KeyId
	rot, err := c.RotateKeyOnDemand(ctx, &kms.RotateKeyOnDemandInput{KeyId: &arn})
	must(t, rot, err)
	mrk := newKey(t, first, KeyOptions{MultiRegion: true, Alias: "alias/mrk"})
	rep, err := c.ReplicateKey(ctx, &kms.ReplicateKeyInput{KeyId: &mrk, ReplicaRegion: aws.String("us-west-2")})
	must(t, rep, err)
	reader := user(t, first, "reader", "")
	must(t, 0, first.SetPolicy(mrk, policyOf(allow("reader", `"kms:*"`, ""))))
	must(t, 0, first.Advance(time.Hour))
	before := describe(t, c, arn)
	must(t, 0, first.Close())
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("state file: %v, %v", info, err)
	}

	second := StartT(t, config)
	c = client(second, DefaultPrincipal(), "us-east-1")
	out, err := decrypt(c, "alias/configured", rotated.CiphertextBlob, phi)
	if must(t, out, err); !bytes.Equal(out.Plaintext, rotated.Plaintext) || *out.KeyId != arn {
		t.Error("a blob from before the restart opens to something else")
	}
	if after := describe(t, c, arn); !reflect.DeepEqual(after, before) {
		t.Errorf("key = %+v, before %+v", after, before)
	}
	if got := second.status().Keys; got != 3 {
		t.Errorf("%d keys, want 3", got)
	}
	_, err = generate(c, mrk, nil)
	wantCode(t, "policy from before", err, "AccessDeniedException")
	east := client(second, reader, "us-east-1")
	blob, err := generate(east, mrk, nil)
	wantCode(t, "principal from before", err, "")
	rotReader, err := east.RotateKeyOnDemand(ctx, &kms.RotateKeyOnDemandInput{KeyId: &mrk})
	must(t, rotReader, err)
	fresh, err := generate(east, mrk, nil)
	wantCode(t, "GenerateDataKey", err, "")
	west := client(second, DefaultPrincipal(), "us-west-2")
	for _, b := range [][]byte{blob, fresh} {
		_, err = decrypt(west, "", b, nil)
		wantCode(t, "Regions share material after a restart", err, "")
	}
}

func TestDamagedState(t *testing.T) {
	file := filepath.Join(t.TempDir(), "state.json")
	s, err := Start(context.Background(), Options{StateFile: file})
	must(t, s, err)
	newKey(t, s, KeyOptions{Alias: "alias/a"})
	must(t, 0, s.Close())
	whole, err := os.ReadFile(file)
	must(t, whole, err)
	for name, bad := range map[string]string{
		"cut":             string(whole[:len(whole)/2]),
		"another account": strings.Replace(string(whole), DefaultAccount, "444455556666", 1),
		"version":         strings.Replace(string(whole), `"version": 1`, `"version": 2`, 1),
		"key id":          strings.Replace(string(whole), `"id": "`, `"id": "x`, 1),
		"no keys":         strings.Replace(string(whole), `"keys"`, `"yeks"`, 1),
		"no material":     strings.Replace(string(whole), `"versions"`, `"snoisrev"`, 1),
		"no bytes":        strings.Replace(string(whole), `"bytes"`, `"setyb"`, 1),
	} {
		if bad == string(whole) {
			t.Fatalf("%s: nothing changed", name)
		}
		must(t, 0, os.WriteFile(file, []byte(bad), 0o600))
		if _, err := Start(context.Background(), Options{StateFile: file}); !errors.Is(err, ErrState) {
			t.Errorf("%s: %v, want ErrState", name, err)
		}
	}
}

func TestLogFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "calls.jsonl")
	s := StartT(t, Options{LogFile: file})
	c := client(s, DefaultPrincipal(), "us-east-1")
	arn := newKey(t, s, KeyOptions{Alias: "alias/phi"})
	dk := dataKey(t, c, "alias/phi", phi)
	enc, err := c.Encrypt(context.Background(), &kms.EncryptInput{KeyId: &arn, Plaintext: []byte("a very secret secret"), EncryptionContext: phi})
	must(t, enc, err)
	_, err = decrypt(c, "", dk.CiphertextBlob, phi)
	wantCode(t, "Decrypt", err, "")
	_, err = decrypt(c, arn, dk.CiphertextBlob, nil)
	wantCode(t, "Decrypt without context", err, "InvalidCiphertextException")

	text, err := os.ReadFile(file)
	must(t, text, err)
	for what, secret := range map[string][]byte{"data key": dk.Plaintext, "plaintext": []byte("a very secret secret")} {
		if bytes.Contains(text, secret) || bytes.Contains(text, []byte(base64.StdEncoding.EncodeToString(secret))) {
			t.Errorf("the log holds the %s", what)
		}
	}
	var got []Call
	for sc := bufio.NewScanner(bytes.NewReader(text)); sc.Scan(); {
		var call Call
		if err := json.Unmarshal(sc.Bytes(), &call); err != nil {
			t.Fatalf("log line %q: %v", sc.Text(), err)
		}
		got = append(got, call)
	}
	if !reflect.DeepEqual(got, s.Calls()) || len(got) != 4 {
		t.Errorf("file: %+v\nmemory: %+v", got, s.Calls())
	}
	for i, call := range got {
		if call.KeyID != arn || call.UserIdentity.ARN != DefaultPrincipal().ARN || call.UserIdentity.AccessKeyID != DefaultPrincipal().AccessKeyID ||
			len(call.RequestID) != 36 || call.EventTime.IsZero() || call.AWSRegion != "us-east-1" {
			t.Errorf("call %d = %+v", i, call)
		}
	}
	if got[0].EventName != "GenerateDataKey" || !reflect.DeepEqual(got[0].EncryptionContext, phi) || got[0].ErrorCode != "" {
		t.Errorf("GenerateDataKey logged as %+v", got[0])
	}
	if got[2].KeyMaterialID != *dk.KeyMaterialId {
		t.Errorf("Decrypt logged as %+v", got[2])
	}
	if got[3].ErrorCode != "InvalidCiphertextException" || got[3].EncryptionContext != nil {
		t.Errorf("failure logged as %+v", got[3])
	}
	s.ResetCalls()
	if len(s.Calls()) != 0 || s.Count("") != 0 {
		t.Error("calls left after ResetCalls")
	}
}

func TestOptions(t *testing.T) {
	ctx := context.Background()
	for _, addr := range []string{"0.0.0.0:0", "[::]:0", ":0", "192.0.2.1:0", "example.com:0"} {
		for _, o := range []Options{{Listen: addr}, {AdminListen: addr}} {
			if s, err := Start(ctx, o); !errors.Is(err, ErrNotLoopback) {
				t.Errorf("%+v: %v, want ErrNotLoopback", o, err)
				if err == nil {
					s.Close()
				}
			}
		}
	}
	for _, o := range []Options{
		{Listen: "127.0.0.1"}, {Listen: "127.0.0.1:http"}, {Account: "1"}, {Region: "nowhere"}, {Principals: []Principal{{}}},
		{Keys: []KeyOptions{{Alias: "phi"}}}, {Keys: []KeyOptions{{Region: "x"}}}, {Keys: []KeyOptions{{Policy: json.RawMessage(`{}`)}}},
		{Faults: Faults{Outage: "x"}},
	} {
		if _, err := Start(ctx, o); !errors.Is(err, ErrOptions) {
			t.Errorf("%+v: %v, want ErrOptions", o, err)
		}
	}
	s := StartT(t, Options{})
	if _, err := Start(ctx, Options{Listen: strings.TrimPrefix(s.URL(), "http://")}); err == nil {
		t.Error("two servers on one port")
	}
}

// TestContextEnds: a server started with a context ends with it.
func TestContextEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	s, err := Start(ctx, Options{})
	must(t, s, err)
	arn := newKey(t, s, KeyOptions{})
	set(t, s, Faults{Outage: OutageHang})
	hung := make(chan error)
	go func() {
		_, err := generate(client(s, DefaultPrincipal(), "us-east-1"), arn, nil)
		hung <- err
	}()
	for s.Count("GenerateDataKey") == 0 {
		time.Sleep(time.Millisecond)
	}
	cancel()
	if err := <-hung; err == nil {
		t.Error("a hanging call was answered")
	}
	must(t, 0, s.Close())
}
