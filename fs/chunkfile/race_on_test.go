//go:build race

package chunkfile_test

const raceEnabled = true
