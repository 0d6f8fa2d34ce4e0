#!/usr/bin/env bash
# prometheus.sh DIR: puts Debian's prometheus and promtool into DIR, without root. A second call does nothing.
set -euo pipefail
directory=$1

[ -x "$directory/prometheus" ] && [ -x "$directory/promtool" ] && exit 0
mkdir -p "$directory"
unpacked=$(mktemp -d)
trap 'rm -rf "$unpacked"' EXIT
# As root, apt would download as a user that cannot write here, and complains.
(cd "$unpacked" && apt-get -o APT::Sandbox::User=root download -q prometheus && dpkg -x prometheus_*.deb .)
mv "$unpacked"/usr/bin/{prometheus,promtool} "$directory"
