#!/usr/bin/env bash
# demo.sh BINARY: scores the sample pictures through the socket of a running server, and says how to go on.
# Run by with_server.sh.
set -euo pipefail

"$1" score --server "http://$SPATIALSCORE_ADDRESS" --wait 60 --manifest samples/manifest.jsonl

cat <<END

Scored through a socket, by a server on $SPATIALSCORE_ADDRESS with its metrics on $SPATIALSCORE_METRICS.
To go on:
  make serve           keeps a server on 127.0.0.1:50051, its metrics on http://127.0.0.1:9464/metrics
  $1 score --prompt "a banana is above a tree" samples/banana.*.png
  grpcurl -plaintext 127.0.0.1:50051 spatialscore.v1.SpatialScoreService/GetModel
END
