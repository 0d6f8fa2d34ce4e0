#!/usr/bin/env bash
# with_server.sh BINARY COMMAND…: starts a server on free ports, runs the command with SPATIALSCORE_ADDRESS (host:port)
# and SPATIALSCORE_METRICS (a URL) in its environment, stops the server, and ends as the command did.
set -euo pipefail
binary=$(realpath "$1")
shift

log=$(mktemp)
"$binary" serve --listen 127.0.0.1:0 --metrics-listen 127.0.0.1:0 --log-format json 2>"$log" &
server=$!
trap 'kill "$server" 2>/dev/null && wait "$server" 2>/dev/null; rm -f "$log"' EXIT

logged() { sed -n "s/.*\"$1\":\"\([^\"]*\)\".*/\1/p" "$log" | head -n 1; }
for _ in $(seq 600); do
    if grep -q '"message":"serving"' "$log"; then break; fi
    kill -0 "$server" 2>/dev/null || { cat "$log" >&2; exit 1; }
    sleep 0.1
done
SPATIALSCORE_ADDRESS=$(logged address) SPATIALSCORE_METRICS=$(logged url)
export SPATIALSCORE_ADDRESS SPATIALSCORE_METRICS
"$@"

kill -TERM "$server"
wait "$server"
