package pkcs11

import (
	"sync"
	"time"
)

// library is a loaded module. There is one for each shared library of the
// process: C_Initialize and C_Finalize act on all of it. Whoever uses sessions
// holds use for as long, so that no session handle outlives its meaning: after
// C_Finalize another session may get the same number.
type library struct {
	cryptoki

	mu         sync.RWMutex // held for reading while the module is in use
	generation uint64       // counts initializations; handles belong to one
	failed     error        // of the last C_Initialize
	restarted  time.Time
}

// newLibrary initializes the module.
func newLibrary(c cryptoki) (*library, error) {
	l := &library{cryptoki: c, generation: 1}
	if err := initialize(c); err != nil {
		return nil, err
	}
	return l, nil
}

func initialize(c cryptoki) error {
	if err := c.Initialize(); err != nil && !is(err, rvAlreadyInitialized) {
		return err
	}
	return nil
}

// restartPause is how often at most a module is started again to look for a
// token that was not there.
const restartPause = time.Second

// restart finalizes and initializes the module, unless somebody did since
// generation seen, or within restartPause. Many modules know only the tokens
// that were there at C_Initialize. It waits for all calls under way.
func (l *library) restart(seen uint64, now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.generation != seen || now.Sub(l.restarted) < restartPause && now.After(l.restarted) {
		return
	}
	_ = l.Finalize() // fails if it is down already, which is as good
	l.failed = initialize(l.cryptoki)
	l.generation++
	l.restarted = now
}

// close finalizes the module; the library is not used any more.
func (l *library) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	_ = l.Finalize() // nothing is left to be told
	l.generation++
}
