// Command bench holds kmsfs against its peers and against what FUSE costs in
// any case, and measures how cost grows. `make bench` runs it.
//
//	bench [-rounds N] [-size MiB] [-only WORKLOAD,...] [-systems NAME,...] [-base DIR]
//	      [-placement P] [-json FILE] [-page FILE] [-chart FILE] [-grow=false] ...
//
// Every system makes an empty store under the base directory, a tmpfs unless
// told otherwise, mounts it, and runs the same workloads in the same order. The
// systems take turns in each round, so that a machine that slows down or has
// other things to do hits all alike, and medians and best rounds of one run can
// be compared. Systems that are not installed are left out.
//
// The workloads run in a process of their own, this program again as `bench
// client`, which times them and knows nothing of the mounts' daemons. A cold
// workload begins with syncfs(2) of the mount and of the disk below it, and
// /proc/sys/vm/drop_caches, which empties the kernel's page cache, names and
// inodes, of the mount and of everything else on the machine; what a daemon keeps
// in its own memory it keeps. That takes root.
//
// SIGINT and SIGTERM end the run; whatever ends it, the mounts, their daemons
// and the stores go away.
package main
