#!/bin/sh
# Usage: tools.sh PROGRAM:PACKAGE...
# Installs what is missing from Debian's packages, as root; otherwise says what
# to install. A program that cannot be had is not a failure here: the tests that
# need it say so themselves.
missing=""

# Debian's fuse3 lets every user open /dev/fuse, by a rule of udev, which
# containers and small machines do not run.
if [ "$(id -u)" = 0 ] && [ -c /dev/fuse ]; then chmod 666 /dev/fuse || true; fi

# Debian keeps PostgreSQL's server programs out of PATH.
for dir in /usr/lib/postgresql/*/bin; do PATH="$PATH:$dir"; done

for tool in "$@"; do
	command -v "${tool%%:*}" >/dev/null 2>&1 || missing="$missing ${tool#*:}"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
	echo "installing:$missing"
	{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing; } >/dev/null 2>&1 && exit 0
	echo "apt-get could not install:$missing" >&2
fi
echo "please install:$missing" >&2
[ "${CI:-}" != true ] || exit 1
