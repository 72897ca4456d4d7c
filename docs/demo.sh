#!/usr/bin/env bash
# make demo: a store with two classes, mounted, with real files in it.
set -euo pipefail
kmsfs=$(readlink -f "${1:-bin/kmsfs}")
base=${KMSFS_DEMO:-$(mktemp -d /tmp/kmsfs-demo.XXXXXX)}
export KMSFS_KEYRING=$base/keyring.json KMSFS_KNOWN_STORES=$base/known-stores XDG_STATE_HOME=$base/state
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
show() { printf '$ %s\n' "$(printf '%q ' "$@" | sed "s#$kmsfs#kmsfs#; s#$base#\$D#g")"; "$@" 2>&1 | sed "s#$base#\$D#g"; }

mkdir -p "$base/plain"
cat > "$base/policy.yaml" <<'YAML'
version: 1
default: general
classes:
  general: { keys: ["keyring:general"] }
  phi:     { keys: ["keyring:phi"], cache: 0s }
directories:
  /patients: phi
YAML

say "A store with two classes, on the embedded keyring (D=$base)"
show "$kmsfs" init --policy "$base/policy.yaml" "$base/store"
show "$kmsfs" mount "$base/store" "$base/plain"
trap '"$kmsfs" umount "$base/plain" || true' ERR INT TERM

say "Real files, written in plaintext paths"
mkdir "$base/plain/patients"
cp -r "$(dirname "$0")" "$base/plain/docs"
printf 'name: Jane Roe\nblood group: 0 negative\n' > "$base/plain/patients/jane-roe.txt"
show ls -l "$base/plain" "$base/plain/patients"
show cat "$base/plain/patients/jane-roe.txt"

say "What lies on the disk"
show ls -la "$base/store"
if grep -rqa 'Jane Roe' "$base/store"; then echo "plaintext in the store!"; exit 1; fi
echo "(searched: no 'Jane Roe' in the store)"

say "Whose key a file is under"
show "$kmsfs" info "$base/plain/patients/jane-roe.txt"
show "$kmsfs" info "$base/plain/docs/demo.sh"

say "The mount"
show "$kmsfs" status "$base/plain"

trap - ERR INT TERM
say "Go on"
cat <<TEXT
  It is still mounted: look around in $base/plain, and at $base/store.
  Clean up with:
    $kmsfs umount $base/plain && rm -rf $base
TEXT
