#!/bin/sh
# Usage: pjdfstest.sh CHECKOUT [LAYOUT...]
# Runs pjdfstest (github.com/pjd/pjdfstest), built in CHECKOUT, on a mount of
# every placement, and of plain names once, as root. A LAYOUT is PLACEMENT or
# PLACEMENT-plain. $KMSFS is the program; $DISK a directory on the file system
# that the stores are to be on, the temporary directory unless set. Prints a line
# a layout; exits with 1 if a test failed anywhere.
set -eu
[ $# -gt 0 ] || { sed -n '2,7s/^# //p' "$0"; exit 2; }
tests=$(realpath "$1")/tests
shift
[ $# -gt 0 ] || set -- header xattr sidecar header-plain
[ "$(id -u)" = 0 ] || { echo "pjdfstest takes root" >&2; exit 2; }
[ -x "$tests/../pjdfstest" ] || { echo "$tests/../pjdfstest: not built; autoreconf -ifs && ./configure && make pjdfstest there" >&2; exit 2; }
command -v prove >/dev/null || { echo "no prove: install perl" >&2; exit 2; }
kmsfs=$(realpath "${KMSFS:-bin/kmsfs}")

base=$(mktemp -d "${DISK:-${TMPDIR:-/tmp}}/kmsfs-pjdfstest-XXXXXX")
chmod 711 "$base" # other users walk through it
export HOME="$base" XDG_CONFIG_HOME="$base/.config" XDG_STATE_HOME="$base/.state"
finish() {
	cd /
	if mountpoint -q "$base/m"; then "$kmsfs" umount --lazy "$base/m"; fi
	rm -rf "$base"
}
trap finish EXIT
trap 'exit 130' INT TERM

# run LAYOUT: the tests on a new store of that layout, their words in $base/out.
run() {
	names=encrypted
	case $1 in *-plain) names=plain ;; esac
	printf 'version: 1\ndefault: general\nclasses:\n  general: { keys: ["keyring:general"], names: %s }\n' $names >"$base/policy"
	"$kmsfs" init --policy "$base/policy" --placement "${1%-plain}" "$base/store" >/dev/null
	mkdir -p "$base/m"
	"$kmsfs" mount --allow-other "$base/store" "$base/m"
	mkdir "$base/m/work"
	chmod 755 "$base/m" "$base/m/work"
	cd "$base/m/work"
	result=0
	prove -r "$tests" >"$base/out" 2>"$base/err" || result=1
	cd /
	"$kmsfs" umount "$base/m"
	rm -rf "$base/store"
	return $result
}

failed=0
for layout in "$@"; do
	if run "$layout"; then
		echo "$layout: $(grep '^Files=' "$base/out")"
	else
		failed=1
		echo "$layout: FAILED: $(grep '^Files=' "$base/out")"
		sed -n '/^Test Summary Report/,/^Files=/p' "$base/out"
	fi
done
exit $failed
