// Package placement reads and writes the headers of store files where a store
// keeps them (docs/format.md, F-18 to F-21): before the chunks, in an extended
// attribute, or in a file of its own. It moves header blocks; what is in them is
// crypto/envelope's.
//
// A Place holds no state and is safe for concurrent use. Whoever changes a file
// sees to it that nobody else writes that file's header meanwhile.
package placement
