// Package keypolicy writes AWS KMS key policies for the roles of a store: who
// opens files, who only brings them in, who wraps data keys anew, who looks.
// It does no I/O and asks no service.
//
// A policy gives its role what the program asks for and nothing else:
// every statement about data keys names the store, the classes and the purposes
// in the encryption context, and closes the set of context keys, so that a call
// that is none of kmsfs's is denied. kms:ViaService is never a condition: it
// holds only for calls that other AWS services make.
//
// Sources: AWS KMS Developer Guide, "Key policies in AWS KMS", "Condition keys
// for AWS KMS" and "AWS KMS permissions".
package keypolicy
