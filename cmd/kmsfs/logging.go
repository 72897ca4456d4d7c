package main

import (
	"io"
	"log/slog"
)

// newLogger returns a logger that writes format ("text" or "json") at level
// ("" is warn: commands report their failures themselves) to w.
func newLogger(w io.Writer, format, level string) *slog.Logger {
	if level == "" {
		level = "warn"
	}
	l, err := parseLevel(level)
	if err != nil {
		l = slog.LevelInfo // prepare has refused it already
	}
	o := &slog.HandlerOptions{Level: l}
	if format == "json" {
		return slog.New(slog.NewJSONHandler(w, o))
	}
	return slog.New(slog.NewTextHandler(w, o))
}
