// Package iampolicy evaluates AWS IAM policy documents as far as key policies
// for a file system need them: Allow and Deny statements with principals,
// actions and resources (each also as Not…), and conditions on strings, ARNs,
// booleans and presence, with IfExists and the set operators.
//
// It is part of a test tool. What it does not know (an operator, a statement
// element, a policy variable) it refuses when parsing, so that no policy is
// silently weaker or stronger here than at AWS.
package iampolicy
