package audit

import (
	"bytes"
	"encoding/json"
	"testing"
)

func seeds() [][]byte {
	a, end, err := appendLine(nil, link{}, use(1))
	if err != nil {
		panic(err)
	}
	b, _, err := appendLine(a, end, Event{Kind: KindTorn, Torn: new(garbage).torn()})
	if err != nil {
		panic(err)
	}
	return [][]byte{a, b, b[:len(b)-1], b[:len(b)-20], nil, []byte("\n\n"), []byte(`{"seq":1,"hash":"` + string(make([]byte, 64)) + `"}`)}
}

// FuzzParseLine: whatever parses keeps its number and hash when it is chained.
func FuzzParseLine(f *testing.F) {
	for _, s := range seeds() {
		f.Add(s)
		f.Add(bytes.TrimSuffix(s, []byte("\n")))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		before := bytes.Clone(line)
		p, err := parseLine(line)
		if !bytes.Equal(before, line) {
			t.Fatal("the line was changed")
		}
		if err != nil {
			return
		}
		if len(line) >= MaxLine || p.Seq == 0 || p.link.seq != p.Seq {
			t.Fatalf("accepted a line of %d bytes, number %d", len(line), p.Seq)
		}
		if !json.Valid(line) {
			t.Fatal("accepted what is no JSON")
		}
	})
}

// FuzzVerify: any bytes in any two files are judged without a panic, counted,
// and unless they are a chain from line 1, they are a problem.
func FuzzVerify(f *testing.F) {
	for _, s := range seeds() {
		f.Add(s, s)
		f.Add([]byte(nil), s)
	}
	f.Fuzz(func(t *testing.T, old, now []byte) {
		c := &checker{}
		for _, b := range [][]byte{old, now} {
			if err := c.file("log", bytes.NewReader(b)); err != nil {
				t.Fatal(err)
			}
		}
		c.finish("log.head", nil, nil)
		r := c.report
		if got := r.Files[0].Bytes + r.Files[1].Bytes; got != int64(len(old)+len(now)) {
			t.Fatalf("%d bytes of %d were read", got, len(old)+len(now))
		}
		if r.Lines > 0 && r.OK() {
			t.Fatal("a log without a head file is whole")
		}
	})
}
