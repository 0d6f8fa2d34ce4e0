#!/usr/bin/env bash
# chromium.sh: says where a Chromium is that can be driven, and installs Debian's where there is none and that may be done.
set -euo pipefail
for name in chromium chromium-browser google-chrome; do
    command -v "$name" && exit 0
done
{ [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; } || { echo "There is no Chromium, and none can be installed." >&2; exit 1; }
{ apt-get install -qq -y --no-install-recommends chromium || { apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium; }; } >&2
command -v chromium
