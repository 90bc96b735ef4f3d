#!/usr/bin/env bash
# Runs the image, on the host's network.
#
#   container/run.sh [OPTIONS] [-- COMMAND...]      COMMAND goes to baton: up, context-worker, chat, …
#     -it                  with a terminal
#     --gpus WHICH         GPUs to give it: all, or their numbers or UUIDs: 0,2. In the container the first is cuda:0
#     --name NAME          name of the container
#     --image IMAGE        image to run                                        [baton:latest]
#     -v HOST:CONTAINER    mount; may be repeated
#     -e NAME=VALUE        environment; may be repeated
#     --hf-cache DIR       mount this Hugging Face cache
#     --engine NAME        docker, podman or buildah                           [the first that works]
#     --dry-run            print the command and do not run it
#
# For example, a cluster on a model directory of this machine:
#     container/run.sh -it -v "$PWD/.cache/models:/models" -- up --model /models/smollm2-135m-instruct
# The same on all GPUs, with an image of build.sh --framework cuda (docker needs NVIDIA's container toolkit, podman its CDI
# description: nvidia-ctk cdi generate):
#     container/run.sh -it --gpus all -v "$PWD/.cache/models:/models" -- up --model /models/smollm2-135m-instruct --device cuda:0
set -euo pipefail
cd "$(dirname "$0")/.."

image=baton:latest name='' gpus='' hf_cache='' engine='' dry_run=0 terminal=0
mounts=() environment=() command=()
fail() { echo "run: $*" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    --) shift; command=("$@"); break ;;
    -it) terminal=1; shift; continue ;;
    --dry-run) dry_run=1; shift; continue ;;
    --gpus | --name | --image | -v | -e | --hf-cache | --engine) [ $# -ge 2 ] || fail "$1 needs a value" ;;
    *) fail "there is no option $1; baton's own go behind --" ;;
  esac
  case "$1" in
    --gpus) gpus=$2 ;;
    --name) name=$2 ;;
    --image) image=$2 ;;
    -v) mounts+=("$2") ;;
    -e) environment+=("$2") ;;
    --hf-cache) hf_cache=$2 ;;
    --engine) engine=$2 ;;
  esac
  shift 2
done
# shellcheck source=container/engine.sh
. container/engine.sh
pick_engine "$engine" run
[ -z "$hf_cache" ] || mounts+=("$(realpath "$hf_cache"):/cache/huggingface")
# Given in this shell, needed for gated models, and not to be seen in the process list.
[ -z "${HF_TOKEN:-}" ] || environment+=(HF_TOKEN)

options=()
for mount in "${mounts[@]}"; do options+=(-v "$mount"); done
case "$engine" in
  docker | podman)
    # UCX moves KV between processes through System V shared memory; its own queues are in /dev/shm, which is small by default.
    options+=(--rm --init --network host --shm-size 2g)
    for setting in "${environment[@]}"; do options+=(-e "$setting"); done
    [ "$terminal" = 0 ] || options+=(-it)
    [ -z "$name" ] || options+=(--name "$name")
    if [ -n "$gpus" ] && [ "$engine" = podman ]; then
      IFS=, read -ra devices <<<"$gpus"
      for device in "${devices[@]}"; do options+=(--device "nvidia.com/gpu=$device"); done
    elif [ "$gpus" = all ]; then
      options+=(--gpus all)
    elif [ -n "$gpus" ]; then
      # Docker reads this as a line of a table: without quotes the second GPU would be a field of its own.
      options+=(--gpus "\"device=$gpus\"")
    fi
    line=("$engine" run "${options[@]}" "$image" "${command[@]}")
    ;;
  buildah)
    # buildah runs commands in working containers, not images: one is made and removed again. It has no GPUs.
    [ -z "$gpus" ] || fail "buildah has no --gpus; use docker or podman"
    options+=(--isolation "${BUILDAH_ISOLATION:-chroot}")
    [ "$terminal" = 0 ] || options+=(--terminal)
    for setting in "${environment[@]}"; do
      case "$setting" in *=*) options+=(--env "$setting") ;; *) options+=(--env "$setting=${!setting:-}") ;; esac
    done
    if [ "$dry_run" = 1 ]; then
      container=CONTAINER
      printf '%q ' buildah from ${name:+--name "$name"} "$image"; echo
    else
      container=$(buildah from --pull-never ${name:+--name "$name"} "$image")
      trap 'buildah rm "$container" >/dev/null' EXIT
    fi
    [ ${#command[@]} -gt 0 ] || command=(--help)
    line=(buildah run "${options[@]}" "$container" -- baton "${command[@]}")
    ;;
esac
if [ "$dry_run" = 1 ]; then
  printf '%q ' "${line[@]}"; echo
else
  "${line[@]}"
fi
