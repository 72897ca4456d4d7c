// Package stress works mounts hard: long random work on one file through every
// call there is, mappings and appends of several processes, sizes and numbers at
// their limits, a full disk, few descriptors, databases. What a program on the
// mount sees is compared with what it must see.
//
// A random run prints its seed. KMSFS_STRESS_SEED repeats it, KMSFS_STRESS_OPS
// makes it longer; INTEGRATION_FULL=1 makes everything longer.
package stress
