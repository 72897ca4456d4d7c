// Command kmsfs mounts directories in which every file is encrypted under a
// data key of its own, wrapped by AWS KMS or by an embedded keyring.
//
// The package holds flags, wiring and exit codes, and nothing else: one file
// per subcommand turns flags into an options struct and calls its run function.
// exit.go is the one place where an error becomes an exit code and two lines of
// text. docs/cli.md is the reference of every command, flag, environment
// variable and exit code.
package main
