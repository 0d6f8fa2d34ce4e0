#!/usr/bin/env bash
# balancers.sh DIR: puts haproxy and nginx of Debian's packages into DIR, without root, with the libraries that they want
# beside those of any Debian. Where they cannot be had it says so, and leaves none.
set -uo pipefail
mkdir -p "$1" && cd "$1" || exit
packages=(haproxy liblua5.3-0 libopentracing-c-wrapper0 libopentracing1 nginx)
unpack() {
    apt-get -o APT::Sandbox::User=root download -q "${packages[@]}" && for package in *.deb; do dpkg -x "$package" . || return; done
}
if ! unpack; then
    echo "haproxy and nginx cannot be had from Debian: their configurations in deploy/ will not be tested."
    rm -rf usr
fi
rm -f ./*.deb
