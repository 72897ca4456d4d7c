package cryptfs

import (
	"context"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/fs/chunkfile"
	"github.com/kmsfs/kmsfs/fs/lease"
)

const leaseKeyInfo = "kmsfs v1 lease"

// takeLease makes sure that no other machine writes the store: lockStore may not
// reach one. Nothing of the store is changed before it.
func (v *Volume) takeLease(ctx context.Context, storeKey *envelope.FileKey) error {
	if v.conf.ReadOnly && !v.conf.Alone {
		return nil
	}
	if v.conf.ReadOnly {
		return v.checkLease(ctx, storeKey)
	}
	c, err := v.leaseConfig(storeKey)
	if err != nil {
		return err
	}
	defer c.Key.Wipe()
	v.lease, err = lease.Acquire(ctx, c)
	return err
}

// checkLease returns ErrElsewhere if another machine writes the store now.
func (v *Volume) checkLease(ctx context.Context, storeKey *envelope.FileKey) error {
	c, err := v.leaseConfig(storeKey)
	if err != nil {
		return err
	}
	defer c.Key.Wipe()
	return lease.Check(ctx, c)
}

// leaseConfig has a key that the caller wipes.
func (v *Volume) leaseConfig(storeKey *envelope.FileKey) (lease.Config, error) {
	key, err := subKey(storeKey, leaseKeyInfo)
	return lease.Config{
		Dir: v.meta, Store: v.layout.ID[:], Key: key, Interval: v.conf.LeaseInterval, Identity: v.conf.machine, Log: v.log,
		Lost: func(err error) { v.halted(HaltLease, err) }, Renewed: v.unrenewed,
	}, err
}

// held returns ErrHalted if another machine may have taken the store over, or the
// disk is lost.
func (v *Volume) held() error {
	if err := v.gone.Load(); err != nil {
		return *err
	}
	if v.lease == nil {
		return nil
	}
	if err := v.lease.Held(); err != nil {
		return fmt.Errorf("%w: %w: %w", ErrHalted, unix.EROFS, err)
	}
	return nil
}

// mayChange is asked before everything that changes the store. What an open file
// has in memory asks held before it goes to the disk.
func (v *Volume) mayChange() error {
	if v.conf.ReadOnly {
		return unix.EROFS
	}
	return v.held()
}

// leaveLease gives the lease back, after the last change of the store.
func (v *Volume) leaveLease() {
	if v.lease == nil {
		return
	}
	if err := v.lease.Release(); err != nil {
		v.log.Warn("the store's lease is left behind", "error", err)
	}
}

// fenced is a store file that is not changed once the lease is lost: what the
// journal has and an open file has in memory stays where it is, for the owner
// that the store has then.
type fenced struct {
	chunkfile.Disk
	v *Volume
}

func (v *Volume) fence(d chunkfile.Disk) fenced { return fenced{d, v} }

func (f fenced) WriteAt(p []byte, off int64) error {
	if err := f.v.held(); err != nil {
		return err
	}
	return f.Disk.WriteAt(p, off)
}

func (f fenced) Truncate(size int64) error {
	if err := f.v.held(); err != nil {
		return err
	}
	return f.Disk.Truncate(size)
}

func (f fenced) Allocate(mode uint32, off, size int64) error {
	if err := f.v.held(); err != nil {
		return err
	}
	return f.Disk.Allocate(mode, off, size)
}

func (f fenced) Punch(off, size int64) error {
	if err := f.v.held(); err != nil {
		return err
	}
	return f.Disk.Punch(off, size)
}

func (f fenced) SetTimes(atime, mtime unix.Timespec) error {
	if err := f.v.held(); err != nil {
		return err
	}
	return f.Disk.SetTimes(atime, mtime)
}
