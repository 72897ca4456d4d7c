// Package salvage reads whatever can still be read of a store, or of copies of
// its files, and writes it to a directory of plaintext files.
//
// It needs nothing but a file, its header and the key service: no store record,
// no directory records, no order among the files. What is missing costs what it
// was for. Without a directory's record, or the class's name key, names are lost
// and files are called by their ids; without the store record the journal cannot
// be read, and nothing tells which keys are the right ones but what the caller
// trusts; a chunk that is damaged is a hole, and listed.
//
// Every byte written was authenticated under its file's key, or is a zero that
// the report lists. Where a file ends is authenticated only if the report does
// not call it truncated. What lies in the source is never changed.
package salvage
