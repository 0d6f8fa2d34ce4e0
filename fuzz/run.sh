#!/usr/bin/env bash
# run.sh SECONDS [TARGET…]: builds the fuzz targets with coverage, writes their seed corpora, and runs each for so long.
# What it finds lies in fuzz/artifacts, and ends it with an error. `cargo fuzz run TARGET` works too, where that and a
# nightly Rust are installed; this needs neither. BLIND=1 leaves the coverage out, and with it a build of every
# dependency: inputs are then mutated at random.
set -euo pipefail
cd "$(dirname "$0")"
seconds=$1
shift
if [ $# -gt 0 ]; then targets=("$@"); else targets=(picture prompt message checkpoint); fi

# As .cargo/config.toml of the root has it; LIBTORCH of one's own is respected.
export LIBTORCH=${LIBTORCH:-$(realpath ../.libtorch)}
LD_LIBRARY_PATH=$(dirname "$(realpath "$LIBTORCH/lib/libtorch_cpu.so")")
export LD_LIBRARY_PATH
triple=$(rustc -vV | sed -n 's/^host: //p')
export CARGO_TARGET_DIR
CARGO_TARGET_DIR=$(realpath ..)/target
cargo build --release --bin seeds --bin mutate
../target/release/seeds corpus
if [ -n "${BLIND:-}" ]; then
    for target in "${targets[@]}"; do ../target/release/mutate "$target" "$seconds"; done
    exit
fi

# What cargo-fuzz asks of the compiler, without the sanitizers: the code is safe Rust but
# for one door to libjpeg, and neither C library has them.
coverage="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Cdebug-assertions -Coverflow-checks --cfg fuzzing"
bins=()
for target in "${targets[@]}"; do bins+=(--bin "$target"); done
# Build scripts and macros run here and now, without coverage: naming the target keeps them apart.
RUSTFLAGS="$coverage" cargo build --release --target "$triple" --target-dir "$PWD/target" "${bins[@]}"
for target in "${targets[@]}"; do
    mkdir -p "corpus/$target" "artifacts/$target"
    echo "== $target: $seconds s"
    "target/$triple/release/$target" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 \
        -print_final_stats=1 -artifact_prefix="artifacts/$target/" "corpus/$target"
done
