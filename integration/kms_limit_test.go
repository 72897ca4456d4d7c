package integration

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/crypto/keywrap/awskms"
	"github.com/kmsfs/kmsfs/crypto/keywrap/keywraptest"
	"github.com/kmsfs/kmsfs/crypto/keywrap/limit"
	"github.com/kmsfs/kmsfs/integration/kmsd/kmsserver"
)

// limited is AWS KMS as a mount uses it: throttling is the limiter's.
func limited(t *testing.T, s *kmsserver.Server, o limit.Options) *limit.Provider {
	t.Helper()
	setEnv(t, s.Env(kmsserver.DefaultPrincipal()))
	p, err := awskms.New(context.Background(), awskms.Options{ReturnThrottling: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	return limit.New(p, o)
}

func TestContractAWSLimited(t *testing.T) {
	s := kmsserver.StartT(t, kmsserver.Options{})
	setup := awsSetup(admin(s))
	setup.Provider = limited(t, s, limit.Options{})
	setup.Unknown = "arn:aws:kms:us-east-1:" + s.Account() + ":key/00000000-0000-0000-0000-000000000000"
	keywraptest.Run(t, setup)
}

// TestThrottledKMS: a KMS that takes 200 calls a second and sometimes fails,
// under a scan by 64: no error reaches a caller, the client settles, and the
// attempts that the calls tell of are the service's log, line by line.
func TestThrottledKMS(t *testing.T) {
	s := kmsserver.StartT(t, kmsserver.Options{})
	key, err := s.CreateKey(kmsserver.KeyOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	attempts := map[string]keywrap.Attempt{}
	p := limited(t, s, limit.Options{Budget: time.Minute, Observe: func(c limit.Call) {
		mu.Lock()
		defer mu.Unlock()
		for _, a := range c.Attempts {
			if _, twice := attempts[a.RequestID]; twice || a.RequestID == "" {
				t.Errorf("attempt %+v: request id is not its own", a)
			}
			attempts[a.RequestID] = a
		}
	}})
	ec := keywrap.Context{Store: strings.Repeat("0", 32), Class: "phi", Purpose: keywrap.PurposeData, ID: strings.Repeat("1", 32)}
	dk, err := p.GenerateDataKey(context.Background(), key, ec)
	if err != nil {
		t.Fatal(err)
	}
	defer dk.Plain.Wipe()
	if err := s.SetFaults(kmsserver.Faults{LatencyMS: 5, RateLimit: 200, Burst: 20,
		Rules: []kmsserver.Fault{{Error: "KMSInternalException", Skip: 50, Times: 3}}}); err != nil {
		t.Fatal(err)
	}
	const readers, each = 64, 12
	var wg sync.WaitGroup
	for range readers {
		wg.Go(func() {
			for range each {
				plain, err := p.Decrypt(context.Background(), dk.Wrapped, ec)
				if err != nil {
					t.Error(err)
				}
				plain.Wipe()
			}
		})
	}
	wg.Wait()
	count := s.Counts()["Decrypt"]
	if count.OK != readers*each || count.Throttled == 0 || count.Throttled > count.OK/2 {
		t.Errorf("calls at the service: %+v, want %d successes and few throttled", count, readers*each)
	}
	calls := s.Calls()
	for _, c := range calls {
		a, ok := attempts[c.RequestID]
		if !ok || a.Op != c.EventName || a.Key != c.KeyID || a.Code != c.ErrorCode {
			t.Errorf("the service's log has %+v, the client %+v", c, a)
		}
	}
	if len(calls) != len(attempts) {
		t.Errorf("%d calls in the service's log, %d attempts", len(calls), len(attempts))
	}
	if st := p.Stats(); st.Throttled != uint64(count.Throttled) || st.Failed != 0 || st.State != "closed" {
		t.Errorf("stats %+v, service %+v", st, count)
	}
}

// TestKMSOutageLimited: through the real SDK, an outage costs one call, then
// nothing is sent, and the service is found again.
func TestKMSOutageLimited(t *testing.T) {
	for _, kind := range []kmsserver.Outage{kmsserver.OutageHang, kmsserver.OutageRefuse, kmsserver.OutageUnavailable} {
		t.Run(string(kind), func(t *testing.T) {
			s := kmsserver.StartT(t, kmsserver.Options{})
			key, err := s.CreateKey(kmsserver.KeyOptions{})
			if err != nil {
				t.Fatal(err)
			}
			p := limited(t, s, limit.Options{Budget: time.Second})
			generate := func() error {
				dk, err := p.GenerateDataKey(context.Background(), key, keywrap.Context{Class: "phi"})
				dk.Plain.Wipe()
				return err
			}
			if err := s.SetFaults(kmsserver.Faults{Outage: kind}); err != nil {
				t.Fatal(err)
			}
			first := generate()
			if !errors.Is(first, keywrap.ErrUnavailable) || p.Stats().State != "open" {
				t.Fatalf("%v, stats %+v", first, p.Stats())
			}
			sent := s.Count("")
			for range 100 {
				if err := generate(); !errors.Is(err, keywrap.ErrUnavailable) {
					t.Errorf("during the outage: %v", err)
				}
			}
			if got := s.Count(""); got > sent+100 || p.Stats().Refused < 50 {
				t.Errorf("%d requests in the outage, stats %+v", got-sent, p.Stats())
			}
			if err := s.SetFaults(kmsserver.Faults{}); err != nil {
				t.Fatal(err)
			}
			deadline := time.Now().Add(time.Minute)
			for err := generate(); err != nil; err = generate() {
				if time.Now().After(deadline) {
					t.Fatalf("no recovery: %v", err)
				}
				time.Sleep(50 * time.Millisecond)
			}
			if st := p.Stats(); st.State != "closed" {
				t.Errorf("after the outage: %+v", st)
			}
			for range 10 {
				if err := generate(); err != nil {
					t.Error(err)
				}
			}
			if got := fmt.Sprint(first); !strings.Contains(got, key) {
				t.Errorf("the failure does not name the key: %s", got)
			}
		})
	}
}
