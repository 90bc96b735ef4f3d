#!/usr/bin/env bash
# Makes a base image from Debian's own packages, for machines that reach no image registry: debootstrap into a
# directory, then buildah. Does nothing if the image is there already. Root is needed.
#
#   container/base.sh [IMAGE]        [localhost/baton-base:bookworm]
set -euo pipefail
cd "$(dirname "$0")/.."
image=${1:-localhost/baton-base:bookworm}
container/install-deps.sh image

if buildah inspect --type image "$image" >/dev/null 2>&1; then
  exit 0
fi
root=$(mktemp -d -t baton-base-XXXXXX)
trap 'rm -rf "$root"; [ -z "${container:-}" ] || buildah rm "$container" >/dev/null' EXIT
echo "base: making $image with debootstrap" >&2
log=$(mktemp -t baton-base-XXXXXX.log)
debootstrap --variant=minbase bookworm "$root" >"$log" 2>&1 || { tail -n 20 "$log" >&2; exit 1; }
rm "$log"
# The lists and packages that it fetched are only weight.
rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*.bin "$root"/var/cache/apt/archives/*.deb
container=$(buildah from scratch)
buildah add --quiet "$container" "$root" / >/dev/null
buildah config --cmd /bin/bash "$container"
buildah commit --quiet --format docker "$container" "$image" >/dev/null
