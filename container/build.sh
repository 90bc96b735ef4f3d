#!/usr/bin/env bash
# Builds the image: the baton binary of this tree, a NATS server and UCX on a small Debian or Ubuntu.
#
#   container/build.sh [OPTIONS]
#     --framework NAME     what workers compute with: cpu; cuda has that too   [cpu]
#     --base-image IMAGE   Debian 12 or Ubuntu 24.04 to build on               [debian:bookworm-slim]
#     --tag TAG            name of the image                                   [baton:latest]
#     --build-arg K=V      passed on; may be repeated
#     --engine NAME        docker, podman or buildah                           [the first that works]
#     --dry-run            print the commands and run none of them
#
# The binary and nats-server are taken from this machine: BATON_BINARY=FILE and NATS_SERVER=FILE name them, else the
# binary is built with cargo and nats-server comes from .venv. Build on a system no newer than the base image.
# An image for cuda gets NVRTC, cuBLASLt and UCX with CUDA from Python wheels (container/cuda-libraries.sh), and the driver from
# the machine that it runs on. The binary is the same, so CPU workers run in it too.
# The binary's debug information goes into BINARY.debug beside it, and not into the image.
set -euo pipefail
cd "$(dirname "$0")/.."

framework=cpu base_image=debian:bookworm-slim tag=baton:latest engine='' dry_run=0
build_args=()
fail() { echo "build: $*" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    --dry-run) dry_run=1; shift; continue ;;
    --framework | --base-image | --tag | --build-arg | --engine) [ $# -ge 2 ] || fail "$1 needs a value" ;;
    *) fail "there is no option $1; --help lists them" ;;
  esac
  case "$1" in
    --framework) framework=$2 ;;
    --base-image) base_image=$2 ;;
    --tag) tag=$2 ;;
    --build-arg) build_args+=(--build-arg "$2") ;;
    --engine) engine=$2 ;;
  esac
  shift 2
done
case "$framework" in
  cpu) need=ucx ;;
  cuda) need=ucx,nvrtc,cublaslt ;;
  *) fail "there is no framework '$framework'; there are cpu and cuda" ;;
esac
# shellcheck source=container/engine.sh
. container/engine.sh
pick_engine "$engine" build

run() {
  if [ "$dry_run" = 1 ]; then printf '%q ' "$@"; echo; else "$@"; fi
}

binary=${BATON_BINARY:-${CARGO_TARGET_DIR:-target}/release/baton}
[ -n "${BATON_BINARY:-}" ] || run cargo build --release --locked --package baton
nats_server=${NATS_SERVER:-.venv/bin/nats-server}
[ -n "${NATS_SERVER:-}" ] || run examples/venv.sh examples/requirements.txt

# A context with what is copied and nothing else: fast, and no secret can slip in.
context=$(mktemp -d -t baton-image-XXXXXX)
trap 'rm -rf "$context"' EXIT
run cp container/Dockerfile container/install-deps.sh container/nats-server.conf LICENSE "$context/"
run install -m 755 "$binary" "$context/baton"
# Of 180 MB 140 are for debuggers. They stay here; function names stay in the image, and with the file beside the binary a
# backtrace has lines again.
run objcopy --only-keep-debug "$context/baton" "$binary.debug"
run objcopy --strip-debug --add-gnu-debuglink="$binary.debug" "$context/baton"
run install -m 755 "$nats_server" "$context/nats-server"
# Named by a stage that builders without BuildKit go through for any framework.
run mkdir "$context/cuda"
[ "$framework" = cpu ] || run container/cuda-libraries.sh "$context/cuda"

case "$engine" in
  # The docker format, since OCI's has no place for a health check. Isolation: buildah must also work as root inside
  # a container, where runc does not.
  buildah) command=(buildah bud --format docker --isolation "${BUILDAH_ISOLATION:-chroot}") ;;
  podman) command=(podman build --format docker) ;;
  docker) command=(docker build) ;;
esac
run "${command[@]}" --build-arg "BASE_IMAGE=$base_image" --build-arg "FRAMEWORK=$framework" --build-arg "NEED=$need" \
  "${build_args[@]}" --tag "$tag" "$context"
[ "$dry_run" = 1 ] || echo "build: $tag is ready; container/run.sh --image $tag -- up --help" >&2
