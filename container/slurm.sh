#!/usr/bin/env bash
#SBATCH --job-name=baton
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --signal=TERM@60
# A cluster over the nodes of a Slurm job, as `baton render slurm --config FILE` writes it: change the file, not this.
#
#   sbatch SCRIPT
#
# `baton` and `nats-server` are in PATH on all nodes, the model is on a shared file system, and the nodes trust each other. Every
# process is a step of its own, named like the worker: `squeue --steps` lists them. To take a node away, have those on it
# leave: `scancel --signal=TERM JOB.STEP`. They finish what they have, and the rest goes elsewhere.
#
# Before the job's time is over, and with `scancel --signal=TERM JOB`, Slurm sends SIGTERM to the steps, not to this script: API
# servers and workers finish what they have. A bare `scancel` ends all at once.
set -euo pipefail

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
if [ ${#nodes[@]} -lt 2 ]; then
  echo "slurm: the processes are placed on 2 nodes, and the job has ${#nodes[@]}" >&2
  exit 2
fi
export BATON_REQUEST_PLANE_URI=nats://${nodes[0]}:4222

# No step, because it must outlive all steps: this script runs on the first node.
config=$(mktemp)
trap 'rm -f "$config"' EXIT
cat >"$config" <<'END'
# What Baton needs of a NATS server. `baton up` adds where to listen; the image and the examples beside this file use
# it as it is (port 4222 on all addresses).

# baton_protocol::limits::MESSAGE_BYTES_MAX: a prompt of a million tokens in one message.
max_payload: 8388608

# A consumer that cannot be written to for this long is cut off; it connects again and Baton repairs the rest.
write_deadline: "5s"

# Dead connections are seen within seconds: pings that go unanswered twice.
ping_interval: "5s"
ping_max: 2

port: 4222
END
nats-server --config "$config" &
nats=$!

steps=0
# usage: on NODE NAME CPUS COMMAND...; steps share their nodes with each other (--overlap). CPUS 0: all of the node's.
on() {
  local cpus=()
  [ "$3" = 0 ] || cpus=(--cpus-per-task="$3")
  srun --overlap --nodes=1 --ntasks=1 --nodelist="${nodes[$1]}" --job-name="$2" "${cpus[@]}" --kill-on-bad-exit=1 "${@:4}" &
  steps=$((steps + 1))
}
on 0 api-server-0 0 baton api-server --cluster baton --api-server-host 0.0.0.0 --api-server-port 8000 --tokenizer /models/model
on 0 context-0 0 baton worker --cluster baton --role context --worker-name context-0 --model /models/model --device cpu
on 1 context-1 0 baton worker --cluster baton --role context --worker-name context-1 --model /models/model --device cpu
on 0 decode-0 0 baton worker --cluster baton --role decode --worker-name decode-0 --model /models/model --device cpu
on 1 decode-1 0 baton worker --cluster baton --role decode --worker-name decode-1 --model /models/model --device cpu
echo "slurm: when all are up these answer: http://${nodes[0]}:8000" >&2

# Who ends well was asked to leave, and the others go on. Who fails takes the job with it; so does NATS.
trap 'kill $(jobs -p) 2>/dev/null; wait' TERM INT
status=0
while [ "$steps" -gt 0 ] && [ "$status" = 0 ]; do
  wait -n || status=$?
  steps=$((steps - 1))
  kill -0 "$nats" 2>/dev/null || status=1
done
mapfile -t rest < <(jobs -p)
[ ${#rest[@]} -eq 0 ] || kill "${rest[@]}" 2>/dev/null || true
wait || true
exit "$status"
