package soak

import (
	"errors"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/integration/kmsd/kmsserver"
)

// errAway is a worker's: a step was not done, because its key service was away.
var errAway = errors.New("the key service is away")

func isAway(err error) bool { return errors.Is(err, errAway) }

// patience is for how long after an outage a file's key may still fail: calls
// that hang, the mount's own patience, the pause of its circuit breaker.
const patience = 30 * time.Second

// faults makes the key service misbehave, one way after another.
type faults struct {
	kms   *kmsserver.Server
	phi   string // key whose service goes away
	every time.Duration
	hangs bool // calls may get no answer at all, which takes long
	rnd   *rand.Rand
	away  atomic.Int64 // when phi was away last, in nanoseconds since 1970
	count map[string]int
	now   atomic.Value // string
}

const faultLatencyMS = 10

// run goes through the faults while a mount lives. There are none when it
// returns.
func (f *faults) run(l *life) {
	if f.count == nil {
		f.count = map[string]int{}
	}
	for calm := true; !l.stopping.Load(); calm = !calm {
		name, set := f.pick()
		if calm {
			name, set = "slow", slow()
		}
		f.count[name]++
		f.now.Store(name)
		f.set(set)
		for start := time.Now(); time.Since(start) < f.every && !l.stopping.Load(); {
			if len(set.Rules) > 0 {
				f.away.Store(time.Now().UnixNano())
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	f.now.Store("")
	f.set(kmsserver.Faults{})
}

func (f *faults) set(set kmsserver.Faults) {
	if err := f.kms.SetFaults(set); err != nil {
		panic(err) // they are written below
	}
}

// slow is how the service is every other time.
func slow() kmsserver.Faults {
	return kmsserver.Faults{LatencyMS: faultLatencyMS, JitterMS: faultLatencyMS}
}

// pick chooses a fault.
func (f *faults) pick() (string, kmsserver.Faults) {
	set := slow()
	away := func(code string) kmsserver.Faults {
		set.Rules = []kmsserver.Fault{{Key: f.phi, Error: code}}
		return set
	}
	switch f.rnd.IntN(6) {
	case 0:
		return "unavailable", away("ServiceUnavailableException")
	case 1:
		return "reset", away(kmsserver.CodeReset)
	case 2:
		if f.hangs {
			return "hang", away(kmsserver.CodeHang)
		}
		set.LatencyMS = 300
		return "very slow", set
	case 3:
		set.LatencyMS = 300
		return "very slow", set
	default:
		set.RateLimit, set.Burst = 40, 5
		return "throttle", set
	}
}

// excuse turns the failure of an open into errAway where the key service was
// away of late. A nil receiver excuses nothing.
func (f *faults) excuse(err error) error {
	if f != nil && errors.Is(err, unix.ETIMEDOUT) && f.recent() {
		return errAway
	}
	return err
}

func (f *faults) recent() bool {
	return f != nil && time.Since(time.Unix(0, f.away.Load())) < patience
}
