#!/usr/bin/env bash
# evaluate.sh PYTHON: pair accuracy of the served checkpoint on four sorts of pairs that it never saw, PAIRS each,
# through the streaming call, and what baselines reach on one of them. Reports are written to target/eval/SORT/eval.html.
# Run by with_server.sh.
set -euo pipefail
python=$1
pairs=${PAIRS:-2000}

measure() {
    local sort=$1
    shift
    # Always anew: pairs of another number, or of an older generator, would be measured in their place.
    rm -rf "target/eval/$sort"
    "$python" -m spatialscore_training.data_cli make "target/eval/$sort" --pairs "$pairs" --kinds 64 "$@"
    score "$sort"
}

score() {
    echo "$*:"
    "$python" -m spatialscore_training.evaluate "target/eval/$1" --server "$SPATIALSCORE_ADDRESS" "${@:2}"
}

measure plain --seed 1 --relations plain --things 2 2 --clauses 1 1
measure mixed --seed 2 --things 2 6 --clauses 1 4
measure long --seed 3 --things 3 8 --clauses 5 12
measure phrasings --seed 4 --relations plain --things 2 4 --clauses 1 2 --phrasings held-out
for baseline in blank shuffled-prompts bag-of-words; do
    score mixed --baseline "$baseline" --limit 500
done
