package metrics

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"
)

const (
	readTime    = 5 * time.Second  // for a request's header
	answerTime  = 10 * time.Second // for an answer
	closeTime   = time.Second      // for answers under way when the server closes
	maxRequests = 4                // at once; others get 503
)

// server is the HTTP server, if there is one.
type server struct {
	mu     sync.Mutex
	http   *http.Server
	served chan struct{} // closed when http has ended
	stop   func() bool   // takes the watch of the context away
}

// Serve starts a server of Handler on addr, HOST:PORT, and returns the address
// that it listens on: with port 0 the system picks one. Without a HOST it is
// 127.0.0.1, so that nobody listens to the network who did not write an address
// of it. The server closes when ctx ends or Close is called.
//
// Errors: ErrAddress; the system's, if it cannot listen; ErrAddress as well for a
// second server.
func (m *Metrics) Serve(ctx context.Context, addr string) (net.Addr, error) {
	addr, err := listenAddress(addr)
	if err != nil {
		return nil, err
	}
	s := &m.server
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.http != nil {
		return nil, fmt.Errorf("%s: a server runs already: %w", addr, ErrAddress)
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	s.http = &http.Server{
		Handler: m.Handler(), ReadHeaderTimeout: readTime, ReadTimeout: readTime, WriteTimeout: answerTime + time.Second,
		IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 16 << 10,
		ErrorLog: slog.NewLogLogger(m.log.Handler(), slog.LevelDebug), // whoever connects could fill the log
	}
	s.served = make(chan struct{})
	srv, served := s.http, s.served
	go func() {
		defer close(served)
		if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			m.log.Error("the metrics server ended", "err", err)
		}
	}()
	s.stop = context.AfterFunc(ctx, m.Close)
	return l.Addr(), nil
}

// listenAddress checks a HOST:PORT and puts in the HOST that is not there.
func listenAddress(addr string) (string, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return "", fmt.Errorf("%q: %w", addr, ErrAddress)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil {
		return "", fmt.Errorf("%q: port %d: %w", addr, n, ErrAddress)
	}
	if host == "" {
		host = "127.0.0.1"
	}
	return net.JoinHostPort(host, port), nil
}

// Close ends the server, if there is one, and waits for it: answers under way
// get a second.
func (m *Metrics) Close() {
	s := &m.server
	s.mu.Lock()
	srv, served, stop := s.http, s.served, s.stop
	s.mu.Unlock()
	if srv == nil {
		return
	}
	stop()
	ctx, cancel := context.WithTimeout(context.Background(), closeTime)
	defer cancel()
	if err := srv.Shutdown(ctx); err != nil {
		_ = srv.Close()
	}
	<-served
}

// health answers whether the volume does. It says nothing about the key service:
// a mount with its key service away works on with what is open, and nobody
// should end it for that. `kmsfs health` asks the key service.
func (m *Metrics) health(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	if err := m.alive(r.Context()); err != nil {
		w.WriteHeader(http.StatusServiceUnavailable)
		_, _ = io.WriteString(w, err.Error()+"\n") // the client may be gone
		return
	}
	_, _ = io.WriteString(w, "ok\n")
}

// alive asks the volume for its status, under a deadline: a volume whose locks
// are stuck does not answer.
func (m *Metrics) alive(ctx context.Context) error {
	if m.opts.Status == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, readTime)
	defer cancel()
	answered := make(chan struct{})
	go func() {
		m.opts.Status()
		close(answered)
	}()
	select {
	case <-answered:
		return nil
	case <-ctx.Done():
		return errNoAnswer
	}
}
