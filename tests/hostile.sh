#!/usr/bin/env bash
# Attacks a cluster of real processes while good clients ask, and looks at what each attack leaves. The last line is
#
#   attacks=… held=… broken=0 others: answered=… errors=0 ttft_ratio=… leaked=0
#
# and the exit status is 0 only with these zeros. `others` are the good clients; `ttft_ratio` is the highest ratio of their
# median time to the first token, during an attack to undisturbed: it is told, and depends on the machine.
#
#   tests/hostile.sh                        every attack, some two minutes
#   tests/hostile.sh --list                 what they are
#   tests/hostile.sh --only digits,echo     some of them
#   tests/hostile.sh --soak --minutes 20    hostile clients among good ones: what do memory, files, threads and blocks do?
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
cargo build --locked --release --package baton-tests --bin hostile --quiet
exec "$target/release/hostile" "$@"
