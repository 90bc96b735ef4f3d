#!/usr/bin/env bash
# Runs a command in a Slurm cluster of virtual nodes: munged, slurmctld and a slurmd for each node, all on this machine. As root.
#
#   tests/slurm.sh NODES COMMAND...       nodes are node0, node1, …, each with an address of its own
#
# Slurm is Debian's (container/install-deps.sh slurm). Everything is in namespaces of its own: no port, name or service of this
# machine is touched, and whatever the cluster or the command started ends with the command. Logs are in $SLURM_TEST_DIR, which is
# removed in the end.
set -euo pipefail

[ $# -ge 2 ] || { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2; }
if [ "${1:-}" != --inside ]; then
  SLURM_TEST_DIR=$(mktemp -d -t baton-slurm-XXXXXX)
  export SLURM_TEST_DIR
  trap 'rm -rf "$SLURM_TEST_DIR"' EXIT
  # The first process in there is this script: when it ends, the kernel ends all others.
  unshare --mount --net --pid --uts --fork --kill-child --mount-proc "$0" --inside "$@"
  exit
fi
shift
nodes=$1
shift
dir=$SLURM_TEST_DIR
fail() {
  echo "slurm: $*" >&2
  tail -n 15 "$dir"/*.log >&2
  exit 1
}

# Addresses on the loopback device, and not 127.0.0.1 alone: with nothing else, names are not looked up at all.
hostname batonhost
ip link set lo up
hosts=$dir/hosts
echo "127.0.0.1 localhost" >"$hosts"
for ((node = 0; node < nodes; node++)); do
  address=10.77.0.$((node + 1))
  ip address add "$address/32" dev lo
  echo "$address node$node" >>"$hosts"
done
sed -i '2s/$/ batonhost/' "$hosts"
mount --bind "$hosts" /etc/hosts

# No accounting, no control groups, nothing of systemd's. Processes of a step are one process group.
export SLURM_CONF=$dir/slurm.conf
cat >"$SLURM_CONF" <<CONF
ClusterName=baton
SlurmctldHost=batonhost
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/munge.socket
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/%n.spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
NodeName=node[0-$((nodes - 1))] NodeHostname=batonhost NodeAddr=node[0-$((nodes - 1))] Port=[17001-$((17000 + nodes))] CPUs=$(nproc)
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF

mkdir "$dir/state"
chmod 755 "$dir"
(umask 077 && head -c 128 /dev/urandom >"$dir/munge.key")
munged --force --foreground --num-threads=2 --key-file="$dir/munge.key" --socket="$dir/munge.socket" \
  --pid-file="$dir/munge.pid" --log-file="$dir/munge.log" --seed-file="$dir/munge.seed" >"$dir/munged.log" 2>&1 &
# usage: within SECONDS COMMAND...   tries until it succeeds
within() {
  local until=$((SECONDS + $1))
  until "${@:2}" >/dev/null 2>&1; do
    [ "$SECONDS" -lt "$until" ] || fail "not within $1 s: ${*:2}"
    sleep 0.1
  done
}
within 30 test -S "$dir/munge.socket"
slurmctld -D >"$dir/slurmctld.out" 2>&1 &
for ((node = 0; node < nodes; node++)); do slurmd -D -N "node$node" >"$dir/node$node.out" 2>&1 & done
# shellcheck disable=SC2317  # called by `within`
all_idle() { [ "$(sinfo --noheader --states=idle --format=%D)" = "$nodes" ]; }
within 60 all_idle

status=0
"$@" || status=$?
# What jobs wrote is there too, where they were told to.
[ "$status" = 0 ] || tail -n 30 "$dir/slurmctld.log" "$dir"/job*.log >&2 2>/dev/null || true
exit "$status"
