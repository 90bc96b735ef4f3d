#!/usr/bin/env bash
# Runs what needs a GPU: the acceptance tests of the CUDA executor, a whole cluster, the benchmark. On a machine with a GPU,
# NVRTC and cuBLASLt of CUDA 13 (a toolkit, or the wheels in python3's environment), and without cargo or network.
#
#   tests/gpu.sh build DIR            builds the programs into DIR, here, where cargo is
#   tests/gpu.sh DIR [STEP...]        runs steps with the programs in DIR: kernels, tests, golden, pull, cluster, ranks, bench [all]
#
# A step and a program that fails or hangs keeps no other from running; what failed is said at the end.
#
# `kernels` needs torch: it compares the kernels on random inputs with products in f64. They are compiled first, unless DIR/gemm and
# DIR/attention are there (`gemm.py compile`, `chain.py compile`, `attention.py build`, which need no GPU).
# `golden` and `cluster` need SmolLM2-135M-Instruct.Q4_1.gguf in DIR (whole, or in pieces named .gguf.part*);
# `cluster` and `ranks` need nats-server, `cluster` curl too; they and `pull`, KV between two processes (on two GPUs, if there are), need UCX with CUDA
# (BATON_UCX_LIB_DIR).
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
model=SmolLM2-135M-Instruct.Q4_1.gguf

build() {
  mkdir -p "$1" || return
  # The paths of what cargo builds are in its messages; `executor`, `executor_ranks`, `products`, `sampling` and `ranks` are tests, the others benchmarks.
  cargo build --locked --package baton-cuda --tests --benches --message-format=json |
    python3 -c '
import json, shutil, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message["target"]["name"] in ("executor", "executor_ranks", "products", "sampling", "ranks", "sample", "cuda", "gpu_pull", "all_reduce"):
        shutil.copy(message["executable"], sys.argv[1] + "/" + message["target"]["name"])
' "$1" || return
  cargo build --locked --release --package baton || return
  cp "${CARGO_TARGET_DIR:-$root/target}/release/baton" "$1" || return
  strip "$1"/{executor,executor_ranks,products,sampling,ranks,sample,cuda,gpu_pull,all_reduce} "$1"/baton
}

usage() { sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 2; }
[ $# -ge 1 ] || usage
if [ "$1" = build ]; then
  [ $# -eq 2 ] || usage
  cd "$root" && build "$(mkdir -p "$2" && cd "$2" && pwd)"
  exit
fi
programs=$(cd "$1" && pwd) || exit
shift
cd "$root" || exit
work=$(mktemp -d) || exit
trap 'rm -rf "$work"' EXIT
# Where the wheels are, if CUDA's libraries are wheels.
export VIRTUAL_ENV=${VIRTUAL_ENV:-$(python3 -c 'import sys; print(sys.prefix)')}

# usage: within SECONDS COMMAND...   a kernel that never ends would take all of the machine's time with it
within() {
  timeout --kill-after=10 "$@"
  local status=$?
  [ $status -eq 0 ] || echo "failed with status $status (124: not done in $1 s): ${*:2}"
  return $status
}

weights() {
  [ -f "$work/$model" ] && return
  if [ -f "$programs/$model" ]; then
    cp "$programs/$model" "$work/"
  else
    cat "$programs/$model".part* > "$work/pieces" && mv "$work/pieces" "$work/$model"
  fi
}

# Outputs are poisoned before every launch.
kernels() {
  local check=workers/cuda/kernels/check failed=0 made=$programs
  if ! [ -d "$made/gemm" ] || ! [ -d "$made/attention" ]; then
    made=$work
    within 200 python3 $check/gemm.py compile "$made/gemm" || failed=1
    within 100 python3 $check/chain.py compile "$made/gemm" || failed=1
    within 200 python3 $check/attention.py build "$made/attention" || failed=1
  fi
  within 300 python3 $check/gemm.py check "$made/gemm" quick || failed=1
  within 200 python3 $check/chain.py check "$made/gemm" || failed=1
  within 300 python3 $check/attention.py check "$made/attention" || failed=1
  within 300 python3 $check/quantise.py || failed=1
  return $failed
}

tests() {
  local failed=0
  within 200 "$programs/products" --ignored --nocapture || failed=1
  within 200 "$programs/sampling" --ignored --nocapture || failed=1
  within 200 "$programs/ranks" --ignored --nocapture --test-threads 1 || failed=1
  within 500 "$programs/executor" --ignored --nocapture --test-threads 1 --skip teacher_forced || failed=1
  within 300 "$programs/executor_ranks" --ignored --nocapture --test-threads 1 --skip real_weights || failed=1
  return $failed
}

golden() {
  weights || { echo "no $model in $programs"; return 1; }
  local failed=0
  export BATON_TEST_GGUF=$work/$model
  within 300 "$programs/executor" --ignored --nocapture --test-threads 1 teacher_forced || failed=1
  within 200 "$programs/executor_ranks" --ignored --nocapture --test-threads 1 real_weights || failed=1
  return $failed
}

# usage: answer UP_ARGUMENT...   prints what a cluster says the capital of France is
answer() {
  local up url name
  rm -f "$work/ready.json"
  "$programs/baton" up --model "$work/$model" --device cuda:0 --nats-server "$(command -v nats-server || echo "$programs/nats-server")" \
    --ready-file "$work/ready.json" --start-timeout-s 100 "$@" > "$work/up.log" 2>&1 &
  up=$!
  for _ in $(seq 1000); do
    [ -f "$work/ready.json" ] && break
    kill -0 $up 2> /dev/null || break
    sleep 0.1
  done
  url=$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["url"])' "$work/ready.json") || {
    kill -TERM $up 2> /dev/null
    wait $up
    cat "$work/up.log"
    return 1
  }
  name=$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["model"])' "$work/ready.json")
  within 20 "$programs/baton" status --url "$url"
  curl -sS --max-time 60 "$url/v1/chat/completions" -H 'content-type: application/json' -d '{
    "model": "'"$name"'", "temperature": 0, "max_tokens": 32, "messages": [{"role": "user", "content": "What is the capital of France?"}]
  }' > "$work/answer"
  kill -TERM $up
  wait $up
  grep -o '"content":"[^"]*"' "$work/answer" || { cat "$work/answer" "$work/up.log"; return 1; }
  grep -q Paris "$work/answer"
}

# One worker that does both, and then prefill and decode apart: KV goes from one process to the other on the GPU.
cluster() {
  weights || { echo "no $model in $programs"; return 1; }
  export BATON_CACHE=$work/cache
  local failed=0
  answer || failed=1
  answer --context-worker-count 1 --decode-worker-count 1 --kv-mib 1024 || failed=1
  return $failed
}

# Workers of two GPUs, alone and with KV between unequal sizes, against one GPU.
ranks() {
  [ "$(nvidia-smi --list-gpus | wc -l)" -ge 2 ] || { echo "not run: it needs two GPUs"; return 0; }
  within 400 python3 tests/gpu_ranks.py "$programs/baton" "$(command -v nats-server || echo "$programs/nats-server")"
}

# What arrives is compared with what was sent: read in place where UCX can, and by way of host memory.
pull() {
  local failed=0
  within 200 "$programs/gpu_pull" || failed=1
  within 200 "$programs/gpu_pull" tcp,cuda_copy,self || failed=1
  return $failed
}

bench() {
  local failed=0
  within 500 "$programs/cuda" || failed=1
  within 200 "$programs/sample" || failed=1
  return $failed
}

passed=0 failed=()
[ $# -gt 0 ] || set -- kernels tests golden pull cluster ranks bench
for step; do
  case "$step" in
    kernels | tests | golden | pull | cluster | ranks | bench) ;;
    *) usage ;;
  esac
done
for step; do
  echo "=== $step"
  started=$SECONDS
  if "$step"; then passed=$((passed + 1)); else failed+=("$step"); fi
  echo "=== $step: $((SECONDS - started)) s"
done
for step in "${failed[@]}"; do echo "failed: $step"; done
echo "$passed passed, ${#failed[@]} failed"
[ ${#failed[@]} -eq 0 ]
