package envelope_test

import (
	"context"
	"strings"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// kmsBench is a file as AWS KMS would wrap it, for two Regions.
func kmsBench(b testing.TB) (*bench, *envelope.Header) {
	s := newBench(b, envelope.Options{})
	s.svc.blobLen = 184
	for _, region := range []string{"us-east-1", "us-west-2"} {
		s.class.Allowed = append(s.class.Allowed, "arn:aws:kms:"+region+":111122223333:key/1234abcd-12ab-34cd-56ef-"+strings.Repeat("0", 12))
	}
	s.class.Keys = s.class.Allowed[2:]
	return s, s.create()
}

func BenchmarkParse(b *testing.B) {
	_, h := kmsBench(b)
	block, err := h.Encode(h.BlockSize)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := envelope.Parse(block); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkOpenHit(b *testing.B) {
	s, h := kmsBench(b)
	s.mustOpen(h)
	b.ReportAllocs()
	for b.Loop() {
		k, err := s.m.Open(context.Background(), s.class, keywrap.PurposeData, h)
		if err != nil {
			b.Fatal(err)
		}
		k.Wipe()
	}
	if got := s.svc.count("Decrypt", s.class.Keys[0]); got != 1 {
		b.Fatalf("got %d calls, want 1: the benchmark did not hit the cache", got)
	}
}

func BenchmarkOpenHitParallel(b *testing.B) {
	s, h := kmsBench(b)
	s.mustOpen(h)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			k, err := s.m.Open(context.Background(), s.class, keywrap.PurposeData, h)
			if err != nil {
				b.Error(err)
			}
			k.Wipe()
		}
	})
}

// BenchmarkCreate is a creation that finds its key in the pool, or the branch
// key, and no service in the way.
func BenchmarkCreate(b *testing.B) {
	for _, name := range []string{"pool", "shared"} {
		b.Run(name, func(b *testing.B) {
			s := newBench(b, envelope.Options{})
			s.class.Shared = name == "shared"
			b.ReportAllocs()
			for b.Loop() {
				s.mustAnyFile()
			}
			st := s.m.Stats()
			b.ReportMetric(float64(st.PoolMisses)/float64(b.N), "misses/op")
		})
	}
}
