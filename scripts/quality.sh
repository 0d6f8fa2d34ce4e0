#!/usr/bin/env bash
# quality.sh PYTHON: makes 200 pairs from a seed, scores them through the socket of a running server, and fails where
# the right picture is not above its twin often enough: a broken model or processor does not get there.
# Run by with_server.sh; PYTHON sees training/.
set -euo pipefail
pairs=target/quality

rm -rf "$pairs"
"$1" -m spatialscore_training.data_cli make "$pairs" --pairs 200 --seed 20261123 --kinds 64 --things 2 3 \
    --size 0.2 0.4 --relations plain --clauses 1 1
"$1" -m spatialscore_training.evaluate "$pairs" --server "$SPATIALSCORE_ADDRESS" --floor 0.97
