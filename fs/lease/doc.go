// Package lease keeps two machines from writing one store. flock(2) does that
// on one machine; where a disk is shared it may not reach the other. The owner
// keeps the file .kmsfs/lease (docs/format.md, section 16), counts a heartbeat in
// it, and looks whether it is still the file of that name: who finds it elsewhere
// waits to see the count move. Clocks are never compared.
//
// A lease is taken by link(2), which fails where there is one, so that of two
// only one gets it. It is renewed in place, through the descriptor of the file
// that the owner made: whoever took it over has another file, which a late write
// of the old owner cannot reach. It is released by removing it. A dead owner's
// lease is moved aside, compared with what was watched, and put back if it is
// another's by then.
//
// An owner is dead if
//   - it ran on this kernel, and the store's lock is free (the caller holds it):
//     on a local file system that is proof; on a network's, which may keep locks
//     per mount, its process must be gone as well;
//   - it ran on this machine before it booted, and the file system is local;
//     clones of a virtual machine often have one machine id, so that a shared disk
//     takes more;
//   - else, if its heartbeat stood still for three of its intervals.
//
// What a crash leaves: the owner's lease, which the next one takes over; a
// temporary (backing.TempPrefix); after a power cut, an empty or older lease. A
// lease that is neither whole nor authentic says nothing: on a local file system
// it is taken over with a warning, for the lock is held, and on a network's it is
// watched like another machine's, because a living owner may be behind it. To
// take every such file for an absent one would give a store away to whoever reads
// it while a disk fails; to take it for a living owner's would lock people out.
//
// The MAC keeps someone who can write the store, and has no key, from making a
// lease that looks like an owner's. It does not keep them from removing one, from
// putting a copied one back, or from changing bytes again and again: like anything
// else they do, that can make a mount fail or stop, and shows them nothing.
// rewrap has no store key; its leases are unsigned, and are honoured as evidence
// that somebody writes.
//
// No lease is a fence: what a stopped owner had under way reaches the disk when
// it goes on. Held narrows that to the operation in flight.
//
// Acquire and Check may be called by any goroutine, and a Lease's methods are
// safe for concurrent use.
package lease
