#!/usr/bin/env bash
# demo.sh BINARY: scores the sample pictures through the sockets of servers that it starts and stops, and says how to go on.
set -euo pipefail
cd "$(dirname "$0")/.."
binary=$1

score='"$1" score --server "http://$SPATIALSCORE_ADDRESS" --wait 60 --manifest samples/manifest.jsonl'

echo "== The checkpoint in the box: how well each picture keeps its prompt"
scripts/with_server.sh "$binary" bash -c "$score" score "$binary"

echo
echo "== A model asked a question: P(yes), the profile vqascore-geneval2, of RANDOM weights of the same family"
SPATIALSCORE__MODEL__CHECKPOINT=tests/fixtures/profiles/bases/qwen2_5_vl_tied \
    SPATIALSCORE__MODEL__REWARD_CONFIG=samples/random.json \
    scripts/with_server.sh "$binary" bash -c "$score" score "$binary"

cat <<END

Scored through sockets. To go on:
  make serve           keeps a server on 127.0.0.1:50051, its metrics on http://127.0.0.1:9464/metrics
  $binary score --prompt "a banana is above a tree" samples/banana.*.png
  grpcurl -plaintext 127.0.0.1:50051 spatialscore.v1.SpatialScoreService/GetModel
  $binary serve --checkpoint Qwen/Qwen2.5-VL-3B-Instruct --profile vqascore-geneval2
END
