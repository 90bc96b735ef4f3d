# Sourced by build.sh and run.sh: which of docker, podman and buildah is there and works.
# shellcheck shell=bash disable=SC2034

# usage: pick_engine NAME PURPOSE; sets $engine. With a NAME it must be installed; without one the first that works is
# taken. A docker client without its daemon is common and useless, so it is asked.
pick_engine() {
  case "$1" in
    docker | podman | buildah)
      command -v "$1" >/dev/null || { echo "$2: $1 is not installed" >&2; exit 1; }
      engine=$1
      return
      ;;
    '') ;;
    *) echo "$2: --engine is docker, podman or buildah, not '$1'" >&2; exit 2 ;;
  esac
  if command -v docker >/dev/null && docker info >/dev/null 2>&1; then
    engine=docker
  elif command -v podman >/dev/null && podman info >/dev/null 2>&1; then
    engine=podman
  elif command -v buildah >/dev/null; then
    engine=buildah
  else
    echo "$2: found neither docker with its daemon, nor podman, nor buildah (container/install-deps.sh image installs the last)" >&2
    exit 1
  fi
}
