package main

import "golang.org/x/sys/unix"

// echoOff stops the terminal fd from showing what is typed, as termios(3)
// describes.
func echoOff(fd int) error {
	t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return err
	}
	t.Lflag &^= unix.ECHO
	return unix.IoctlSetTermios(fd, unix.TCSETS, t)
}
