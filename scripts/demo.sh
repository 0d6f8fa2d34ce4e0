#!/usr/bin/env bash
# demo.sh BINARY: starts a server on free ports, scores the sample pictures through its socket, says how to go on,
# stops it.
set -euo pipefail
binary=$(realpath "$1")
cd "$(dirname "$0")/../samples"

log=$(mktemp)
"$binary" serve --listen 127.0.0.1:0 --metrics-listen 127.0.0.1:0 --log-format json 2>"$log" &
server=$!
trap 'kill "$server" 2>/dev/null || true; rm -f "$log"' EXIT

# The server logs its addresses as soon as they are bound.
logged() { sed -n "s/.*\"$1\":\"\([^\"]*\)\".*/\1/p" "$log" | head -n 1; }
for _ in $(seq 300); do
    address=$(logged address) metrics=$(logged url)
    if [ -n "$address" ] && [ -n "$metrics" ]; then break; fi
    kill -0 "$server" 2>/dev/null || { cat "$log" >&2; exit 1; }
    sleep 0.1
done

"$binary" score --server "http://$address" --wait 60 --manifest manifest.jsonl

cat <<END

Scored through a socket, by a server on $address with its metrics on $metrics.
To go on:
  make serve           keeps a server on 127.0.0.1:50051, its metrics on http://127.0.0.1:9464/metrics
  target/release/spatialscore score --prompt "a cup to the left of a book" picture.png
  grpcurl -plaintext 127.0.0.1:50051 spatialscore.v1.SpatialScoreService/GetModel
END

kill -TERM "$server"
wait "$server"
trap - EXIT
rm -f "$log"
