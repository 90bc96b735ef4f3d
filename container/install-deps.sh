#!/usr/bin/env bash
# The one way by which system packages come: the quickstart, the tests and the image all call this file.
# Quick when nothing is missing. Debian 12, Ubuntu 22.04 and 24.04; as root or with sudo.
#
#   container/install-deps.sh GROUP...
#     run      what the baton binary needs at run time: UCX, certificates
#     build    what `cargo build` needs beside Rust itself
#     python   what makes a virtual environment (nats-server and the example model come through one)
#     test     what the tests need on top: UCX headers, network tools, shellcheck, systemd's programs (it is not run)
#     slurm    what tests/slurm.sh needs: Slurm, whose services do not start without a configuration, and munge
#     page     what the tests of the page need: Chromium
#     node     what builds the page: Node.js with npm, where there is none
#     dashboard  what tests of the dashboard and its alerts need: Prometheus with promtool
#     image    what builds an image without a daemon: buildah, and debootstrap for a base
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; }

# libucp is loaded at run time, so `run` takes the library and `test` the headers (for the layout check).
declare -A packages=(
  [run]="ca-certificates libucx0"
  [build]="gcc libc6-dev make pkg-config"
  [python]="python3 python3-venv"
  [test]="libucx-dev iproute2 procps curl shellcheck systemd"
  [slurm]="slurm-wlm munge iproute2"
  [page]="chromium"
  [node]="nodejs npm"
  [dashboard]="prometheus"
  [image]="buildah debootstrap ca-certificates"
)

wanted=()
for group in "$@"; do
  case "$group" in
    -h | --help) usage; exit 0 ;;
  esac
  if [ -z "${packages[$group]:-}" ]; then
    echo "install-deps: there is no group '$group'; groups are: ${!packages[*]}" >&2
    exit 2
  fi
  read -ra names <<<"${packages[$group]}"
  wanted+=("${names[@]}")
done
if [ ${#wanted[@]} -eq 0 ]; then
  usage >&2
  exit 2
fi

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
  echo "install-deps: this is no Debian or Ubuntu system; install the like of: ${wanted[*]}" >&2
  exit 1
fi

# Present means installed whole: a half-configured package is installed again.
installed() {
  local state
  state=$(dpkg-query --show --showformat='${db:Status-Abbrev}' "$1" 2>/dev/null) || return 1
  [[ $state == ii* ]]
}

missing=()
for name in "${wanted[@]}"; do
  installed "$name" || missing+=("$name")
done
[ ${#missing[@]} -eq 0 ] && exit 0

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  if ! command -v sudo >/dev/null; then
    echo "install-deps: not root and no sudo; as root, run: apt-get install ${missing[*]}" >&2
    exit 1
  fi
  as_root=(sudo)
fi

echo "install-deps: installing ${missing[*]}" >&2
export DEBIAN_FRONTEND=noninteractive
# What is installed is run by who wants it: at run level 1 Debian's packages start no services.
apt() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get -q -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 "$@" >&2; }
install() { apt install -y --no-install-recommends "${missing[@]}"; }

# Package lists may be absent (a fresh image) or stale (a package version gone from the mirror).
if ! compgen -G '/var/lib/apt/lists/*_Packages*' >/dev/null || ! install; then
  apt update
  install
fi
