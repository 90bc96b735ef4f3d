#!/usr/bin/env bash
# A newcomer's ten minutes on this machine: a package is installed, a cluster started, its page opened, a question asked, a worker killed
# while it answers, and Prometheus looks on. Says how long each step took, and fails at the first that does not do what
# docs/first-ten-minutes.md says. That page is written from what this prints.
#
#   tests/ten_minutes.sh PACKAGE.deb MODEL      as root on a bare Debian or Ubuntu; MODEL: whatever `baton up --model` takes
set -euo pipefail
[ $# -eq 2 ] || { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2; }
package=$(realpath "$1") model=$2
work=$(mktemp -d -t baton-walk-XXXXXX)
export DEBIAN_FRONTEND=noninteractive
# What is installed here is run by this script: at run level 1 Debian's packages start no services.
export RUNLEVEL=1

now_ms() { echo $((${EPOCHREALTIME/./} / 1000)); }
began=$(now_ms) step_began=$(now_ms) step=''
done_with() { printf -- '--- %s: %d.%d s\n' "$step" $((($(now_ms) - step_began) / 1000)) $((($(now_ms) - step_began) % 1000 / 100)); }
step() {
  [ -z "$step" ] || done_with
  step=$1 step_began=$(now_ms)
  echo "=== $step"
}
fail() { echo "ten minutes: FAILED: $*" >&2; exit 1; }
# usage: until_true SECONDS WHAT COMMAND...
until_true() {
  local seconds=$1 what=$2 from=$SECONDS
  shift 2
  until "$@"; do
    [ $((SECONDS - from)) -lt "$seconds" ] || fail "$what, not within $seconds s"
    sleep 0.1
  done
}
cleanup() {
  status=$?
  trap - EXIT
  if [ "$status" != 0 ] && [ -e "$work/log" ]; then tail -n 40 "$work/log" >&2; fi
  for pid in ${prometheus:-} ${up:-}; do
    kill -TERM "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
  done
  rm -rf "$work"
  exit "$status"
}
trap cleanup EXIT
apt_get() { apt-get -qq -o Acquire::Retries=3 -o Dpkg::Use-Pty=0 "$@" >"$work/apt.log" 2>&1 || { tail -n 30 "$work/apt.log" >&2; fail "apt-get $*"; }; }

step "install"
apt_get update
apt_get install "$package" curl jq
baton --version
getent passwd baton || fail "the package made no user for its units"
baton self-check

step "start"
baton up "$model" --ready-file "$work/ready.json" >"$work/how-to" 2>"$work/log" &
up=$!
started() {
  kill -0 "$up" 2>/dev/null || fail "the cluster did not start"
  [ -e "$work/ready.json" ]
}
until_true 120 "a cluster" started
url=$(jq -r .url "$work/ready.json")
baton status --url "$url"

step "page"
code=$(curl -sS -o "$work/page" -w '%{http_code}' "$url/")
title=$(sed -n 's:.*<title>\(.*\)</title>.*:\1:p' "$work/page")
echo "GET $url/: $code, title '$title'"
[ "$code $title" = "200 Baton" ] || fail "no page"
grep -q '^model: .*tools: ' "$work/how-to" || fail "baton up does not say whether the model takes tools"
# Not through a pipe: grep ends at the first match, and curl would fail at the rest.
curl -sS -o "$work/api" "$url/docs"
grep -q '<title>Baton: the API' "$work/api" || fail "no description of the API"

step "question"
question="What is the capital of France?"
answer=$(baton chat --url "$url" --temperature 0 --max-tokens 40 "$question")
printf '> %s\n%s\n' "$question" "$answer"
[[ $answer == *Paris* ]] || fail "no Paris in the answer"

step "kill -9 in mid-stream"
body=$(jq -n --arg model "$(jq -r .model "$work/ready.json")" '{model: $model, temperature: 0, max_tokens: 500, stream: true,
  messages: [{role: "user", content: "Write a long story about a lighthouse keeper."}]}')
ask() { curl -sSN --max-time 120 "$url/v1/chat/completions" -H 'content-type: application/json' -d "$body"; }
text() { sed -n 's/^data: \({.*\)/\1/p' "$1" | jq -j '.choices[0].delta.content // ""'; }
ask >"$work/undisturbed"
cluster() { curl -sS "$url/cluster" | jq -r "$@"; }
# What is shown of workers is as old as their last beats.
idle() { [ "$(cluster '"\([.workers[] | select(.state == "serving")] | length) \([.workers[].load.decoding] | add)"')" = "2 0" ]; }
until_true 60 "two workers that do nothing" idle
# With each event the time at which it came. Between them are comments that keep the connection.
ask | while IFS= read -r line; do
  printf '%s\n' "$line"
  [[ $line != "data: {"* ]] || echo "at $(now_ms)"
done >"$work/stream" &
asking=$!
generates() {
  read -r victim incarnation < <(cluster '.workers[] | select(.load.decoding > 0) | "\(.worker) \(.incarnation)"')
  [ -n "$victim" ]
}
until_true 30 "a stream on a worker" generates
had=$(grep -c '^data: {' "$work/stream")
kill -9 "$(jq -r --arg worker "$victim" '.pids[$worker]' "$work/ready.json")"
noticed() { [ -n "$(cluster '.degraded[]')" ]; }
until_true 30 "a word of the loss" noticed
cluster '"degraded: " + .degraded[]'
wait "$asking"
grep -q '^data: \[DONE\]' "$work/stream" || fail "the stream broke off"
[ "$(text "$work/stream")" = "$(text "$work/undisturbed")" ] || fail "another text than of a cluster that is left alone"
pause=$(sed -n 's/^at //p' "$work/stream" | awk 'NR > 1 && $1 - last > most { most = $1 - last } { last = $1 } END { print most }')
echo "$victim was killed after $had of $(grep -c '^data: {' "$work/stream") events: the stream paused for $pause ms, and went on with the same text"
again() {
  local now state
  read -r now state < <(cluster ".workers[] | select(.worker == \"$victim\") | \"\(.incarnation) \(.state)\"")
  [ "$now" != "$incarnation" ] && [ "$state" = serving ]
}
until_true 60 "a new $victim" again
grep -E 'started again|worker (left|lost|gone|joined)' "$work/log" | tail -n 3
baton status --url "$url" | sed -n '/^worker/,/^$/p'
curl -sS "$url/metrics" | grep '^baton_retries_total' || fail "no retry was counted"

step "dashboard"
apt_get install --no-install-recommends prometheus
# As it is in the package, but for the address: here is no Compose that knows the name.
dashboard=/usr/share/baton/dashboard
mkdir "$work/prometheus"
cp "$dashboard/baton.rules.yml" "$work/prometheus/"
sed '/dns_sd_configs:/,$d' "$dashboard/prometheus.yml" >"$work/prometheus/prometheus.yml"
printf '    static_configs: [{targets: ["%s"]}]\n' "${url#http://}" >>"$work/prometheus/prometheus.yml"
promtool check config "$work/prometheus/prometheus.yml"
prometheus --config.file="$work/prometheus/prometheus.yml" --storage.tsdb.path="$work/prometheus/data" --web.listen-address=127.0.0.1:9090 >"$work/prometheus/log" 2>&1 &
prometheus=$!
query() { curl -sS --get http://127.0.0.1:9090/api/v1/query --data-urlencode "query=$1" 2>/dev/null | jq -r '.data.result[0].value[1] // empty'; }
scraped() {
  kill -0 "$prometheus" 2>/dev/null || { tail -n 20 "$work/prometheus/log" >&2; fail "Prometheus ended"; }
  [ "$(query 'sum(baton_requests_total)')" = 3 ]
}
until_true 60 "three requests in Prometheus" scraped
[ "$(query 'sum(baton_retries_total)')" = 1 ] || fail "Prometheus does not know of the retry"
rules=$(curl -sS http://127.0.0.1:9090/api/v1/rules | jq '[.data.groups[].rules[] | select(.health != "err")] | length')
echo "Prometheus has 3 requests, 1 retry and $rules rules; firing: $(query 'count(ALERTS{alertstate="firing"})' | grep . || echo none)"
[ "$rules" -ge 10 ] || fail "only $rules rules"

step "stop"
kill -TERM "$up"
wait "$up" || fail "baton up ended with $?"
up=
done_with
printf '=== all of it: %d s\n' $((($(now_ms) - began) / 1000))
