// Package doctor looks for what keeps a store from working: this machine's
// FUSE, memory and clock, the store's file system and record, and its keys. It
// changes nothing, unwraps no key, and calls no key that it was not given.
//
// Every check answers findings, the good ones too, each with a remedy where
// there is something to do. Checks run at the same time and are bounded in
// time: a hung disk or network is itself a finding.
package doctor
