// Package backing is the store's directory tree as Linux has it: directories
// and files by descriptor, one name at a time, never following a symlink and
// never joining a path that is opened again. It knows nothing of encryption.
//
// Dir and File methods are safe for concurrent use; Close must come after the
// last of them. Errors are the syscall.Errno, bare: store names are ciphertext, but
// may be many, and callers know which one they used.
package backing
