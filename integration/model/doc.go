// Package model holds a test: random operations on a mount against a plain tree
// in memory.
package model
