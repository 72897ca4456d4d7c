// Package limit keeps calls to one key service within what the service bears:
// a rate and a number of calls at a time, retries of throttled calls, and a
// breaker for outages. A Provider of this package wraps that of the service.
//
// # Admission
//
// A call waits until it is its turn, under its caller's context alone: 2,000
// callers at 50 calls a second all succeed although the last waits 40 s. Calls
// marked by Background have at most half of the places and let others go first,
// except that one of sixteen turns is theirs, so that nobody who came to wait
// for one waits for ever.
//
// # Throttling
//
// An answer that says "throttled" (keywrap.ErrThrottled) lowers a rate that is
// found in this way, a fifth below what the service answered in the last
// second, and is tried again after a random, growing pause, before calls that
// had no turn yet. The rate grows by a twentieth each second, twofold below
// where it was throttled before: it settles near the service's limit, and is
// lifted when it has become meaningless. A throttled call fails only when the
// service has given nobody another answer for a whole Options.Budget. The
// service's own provider must not retry throttling as well: see
// awskms.Options.ReturnThrottling.
//
// # Outages
//
// A call has Options.Budget from its turn on. When one fails with
// keywrap.ErrUnavailable, its key's breaker opens: calls that wait for a turn
// and new ones fail with the same error at once, those under way get two more
// seconds at most. One call a second goes through as a probe, for at most two
// seconds, and the first answer, be it a refusal, closes the breaker. So an
// outage costs one caller the budget and the others little, and its end shows
// within two seconds. Describe and Check pass an open breaker, with a probe's
// budget, because they are how one asks whether the service is there.
package limit
