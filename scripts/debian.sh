#!/usr/bin/env bash
# debian.sh PACKAGE DIR PROGRAM…: puts programs of a Debian package into DIR, without root. A second call does nothing.
set -euo pipefail
package=$1 directory=$2
shift 2

missing=
for program in "$@"; do [ -x "$directory/$program" ] || missing=1; done
[ -n "$missing" ] || exit 0
mkdir -p "$directory"
unpacked=$(mktemp -d)
trap 'rm -rf "$unpacked"' EXIT
# As root, apt would download as a user that cannot write here, and complains.
(cd "$unpacked" && apt-get -o APT::Sandbox::User=root download -q "$package" && dpkg -x "$package"_*.deb .)
mv "${@/#/$unpacked/usr/bin/}" "$directory"
