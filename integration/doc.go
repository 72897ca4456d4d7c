// Package integration holds the tests that cross packages: the layering table,
// the threat model on real stores, and kmsfs in the hands of real programs.
package integration
