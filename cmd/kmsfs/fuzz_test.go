package main

import (
	"bytes"
	"reflect"
	"strings"
	"testing"
)

func FuzzParseKnownStores(f *testing.F) {
	f.Add([]byte(knownStoresHeader + "\n"))
	f.Add([]byte(knownStoresHeader + "\n{\"id\":\"" + idA + "\",\"keys\":{\"g\":[\"keyring:g\"]},\"path\":\"/s\",\"time\":\"2026-01-02T03:04:05Z\"}\n"))
	f.Add([]byte(knownStoresHeader + "\n{\"id\":\"" + idB + "\",\"keys\":{\"g\":[null]}}\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		k, err := parseKnownStores(text)
		if err != nil {
			return
		}
		again, err := k.encode()
		if err != nil {
			t.Fatalf("what was parsed cannot be written: %v", err)
		}
		back, err := parseKnownStores(again)
		if err != nil {
			t.Fatalf("what was written does not parse: %v\n%s", err, again)
		}
		third, err := back.encode()
		if err != nil || !bytes.Equal(again, third) {
			t.Fatalf("written differently the second time: %v\n%s\n%s", err, again, third)
		}
	})
}

func FuzzMountOptions(f *testing.F) {
	f.Add("ro,allow_other,keyring=/k\\,x,x-systemd.automount,_netdev")
	f.Fuzz(func(t *testing.T, list string) {
		var o mountOptions
		var g globalOptions
		if o.apply(&g, list) != nil {
			return
		}
		for _, option := range o.passthrough {
			if option == "" || strings.HasPrefix(option, "keyring=") {
				t.Errorf("%q was handed to the kernel", option)
			}
		}
		var o2 mountOptions
		var g2 globalOptions
		if err := o2.apply(&g2, list); err != nil || !reflect.DeepEqual(o, o2) || g != g2 {
			t.Error("the same options read differently the second time")
		}
	})
}

func FuzzParseMountinfo(f *testing.F) {
	f.Add("36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n")
	f.Add("22 1 0:20 / /m\\040t rw - fuse.kmsfs /s\\134x rw,user_id=0\n")
	f.Fuzz(func(_ *testing.T, text string) {
		_, _ = parseMountinfo(strings.NewReader(text)) // it must not panic
	})
}
