package kmsserver

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// network owns the two listeners. The endpoint's can be closed and opened
// again on the same port.
type network struct {
	url, adminURL string

	mu       sync.Mutex
	addr     string
	holder   int // socket that keeps the port reserved while nobody listens; -1: none
	handler  http.Handler
	endpoint *serving // nil while refusing
	admin    *serving
	closed   bool
	wg       sync.WaitGroup
}

func (n *network) open(listen, adminListen string, handler, admin http.Handler) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.holder = -1
	n.handler = n.counted(handler)
	var err error
	if n.holder, n.addr, err = holdPort(listen); err != nil {
		return err
	}
	l, err := net.Listen("tcp", adminListen)
	if err != nil {
		return err
	}
	// Handlers read both without a lock: they are set before anything serves.
	n.url, n.adminURL = "http://"+n.addr, "http://"+l.Addr().String()
	n.admin = n.run(l, n.counted(admin))
	return n.listenLocked()
}

// counted lets close wait for the handlers, which http.Server.Close does not.
func (n *network) counted(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n.mu.Lock()
		if n.closed {
			n.mu.Unlock()
			return
		}
		n.wg.Add(1)
		n.mu.Unlock()
		defer n.wg.Done()
		h.ServeHTTP(w, r)
	})
}

// serving is an HTTP server with its listener and connections, which
// http.Server knows too, but cannot close one by one.
type serving struct {
	*http.Server
	listener net.Listener

	mu    sync.Mutex
	conns map[net.Conn]bool // true: serves an admin request
	gone  bool
}

type connKey struct{}

// cut closes the listener and all connections but those that serve an admin
// request: the one that ordered the cut gets its answer.
func (s *serving) cut() {
	s.listener.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gone = true
	for c, admin := range s.conns {
		if !admin {
			c.Close()
		}
	}
}

// close closes everything.
func (s *serving) close() {
	s.cut()
	s.Server.Close() // reports the listener closed twice, nothing else
}

func (s *serving) track(c net.Conn, state http.ConnState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch state {
	case http.StateNew:
		s.conns[c] = false
		if s.gone { // accepted while the listener closed
			c.Close()
		}
	case http.StateClosed, http.StateHijacked:
		delete(s.conns, c)
	}
}

// spareAdmin keeps the request's connection through a cut, for this one
// request.
func (s *serving) spareAdmin(w http.ResponseWriter, r *http.Request) {
	c, ok := r.Context().Value(connKey{}).(net.Conn)
	if !ok || !strings.HasPrefix(r.URL.Path, "/admin/") {
		return
	}
	w.Header().Set("Connection", "close")
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, open := s.conns[c]; open {
		s.conns[c] = true
	}
}

func (n *network) run(l net.Listener, h http.Handler) *serving {
	s := &serving{listener: l, conns: map[net.Conn]bool{}}
	s.Server = &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			s.spareAdmin(w, r)
			h.ServeHTTP(w, r)
		}),
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       time.Minute,
		ConnState:         s.track,
		ConnContext:       func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) },
	}
	n.wg.Add(1)
	go func() {
		defer n.wg.Done()
		_ = s.Serve(l) // ends when the listener is closed
	}()
	return s
}

func (n *network) listenLocked() error {
	l, err := net.Listen("tcp", n.addr)
	if err != nil {
		return err
	}
	n.endpoint = n.run(l, n.handler)
	return nil
}

// refuse closes the endpoint's listener and all its connections, or opens it
// again.
func (n *network) refuse(on bool) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case n.closed:
		return nil
	case on && n.endpoint != nil:
		n.endpoint.cut()
		n.endpoint = nil
	case !on && n.endpoint == nil:
		return n.listenLocked()
	}
	return nil
}

func (n *network) close() {
	n.mu.Lock()
	if !n.closed {
		n.closed = true
		for _, srv := range []*serving{n.endpoint, n.admin} {
			if srv != nil {
				srv.close()
			}
		}
		if n.handler != nil && n.holder >= 0 {
			syscall.Close(n.holder)
		}
	}
	n.mu.Unlock()
	n.wg.Wait()
}

// holdPort binds addr without listening. The port then belongs to this
// process for as long as the socket lives: connections are refused, other
// processes do not get it as an ephemeral port, and net.Listen, which sets
// SO_REUSEADDR too, may listen on it and stop again.
func holdPort(addr string) (fd int, bound string, err error) {
	host, portText, err := net.SplitHostPort(addr)
	if err != nil {
		return -1, "", err
	}
	port, err := strconv.ParseUint(portText, 10, 16)
	if err != nil {
		return -1, "", fmt.Errorf("%w: port %q", ErrOptions, portText)
	}
	family, sa := sockaddr(net.ParseIP(host), int(port))
	syscall.ForkLock.RLock()
	fd, err = syscall.Socket(family, syscall.SOCK_STREAM, 0)
	if err == nil {
		syscall.CloseOnExec(fd)
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		return -1, "", fmt.Errorf("kmsserver: socket: %w", err)
	}
	if err = syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1); err == nil {
		err = syscall.Bind(fd, sa)
	}
	if err == nil {
		sa, err = syscall.Getsockname(fd)
	}
	if err != nil {
		syscall.Close(fd)
		return -1, "", fmt.Errorf("kmsserver: bind %s: %w", addr, err)
	}
	switch sa := sa.(type) {
	case *syscall.SockaddrInet4:
		port = uint64(sa.Port)
	case *syscall.SockaddrInet6:
		port = uint64(sa.Port)
	}
	return fd, net.JoinHostPort(host, strconv.FormatUint(port, 10)), nil
}

func sockaddr(ip net.IP, port int) (family int, sa syscall.Sockaddr) {
	if v4 := ip.To4(); v4 != nil {
		return syscall.AF_INET, &syscall.SockaddrInet4{Port: port, Addr: [4]byte(v4)}
	}
	return syscall.AF_INET6, &syscall.SockaddrInet6{Port: port, Addr: [16]byte(ip.To16())}
}
