package classify_test

import (
	"fmt"

	"github.com/kmsfs/kmsfs/fs/classify"
)

func ExamplePolicy_ClassOf() {
	p, err := classify.Parse([]byte(`
version: 1
default: general
classes:
  general: { keys: ["keyring:general"] }
  phi: { keys: ["keyring:phi"], cache: 0s }
directories:
  /patients: phi
`))
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(p.ClassOf("/patients/2024"), p.ClassOf("/patients2"))
	// Output: phi general
}

func ExampleParse_error() {
	_, err := classify.Parse([]byte("version: 1\ndefault: phi\nclasses:\n  phi: { keys: [phi] }\n"))
	fmt.Println(err)
	// Output: policy: line 4: classes.phi.keys[0]: "phi" is no key URI; write an AWS KMS key ARN, alias/NAME or keyring:NAME
}
