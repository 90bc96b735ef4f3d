#!/usr/bin/env bash
#SBATCH --job-name=baton
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --signal=TERM@60
# A split cluster over the nodes of a Slurm job: sbatch container/slurm.sh MODEL_DIRECTORY
#
# The first node runs NATS and the API server beside its worker; one half of the nodes compute prompts, the other half
# generate. `baton` and `nats-server` are in PATH on all nodes, the model directory is on a shared file system, and the
# nodes trust each other: nothing here is authenticated.
#
# A minute before the job's time is over, and with `scancel --signal=TERM JOB`, Slurm sends SIGTERM to the steps, not to this
# script: API server and workers finish what they have, over a NATS server that goes on. A bare `scancel` ends all at once.
set -euo pipefail
model=${1:?usage: sbatch container/slurm.sh MODEL_DIRECTORY}
config=${BATON_NATS_CONFIG:-$SLURM_SUBMIT_DIR/container/nats-server.conf}

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
front=${nodes[0]}
context=$(((${#nodes[@]} + 1) / 2))
if [ ${#nodes[@]} -lt 2 ]; then
  echo "slurm: a split cluster wants two nodes or more" >&2
  exit 2
fi
export BATON_REQUEST_PLANE_URI=nats://$front:4222

# No step, because it must outlive all steps: this script runs on the first node.
nats-server --config "$config" &
nats=$!
steps=0
# Steps share their nodes with each other (--overlap).
on() { srun --overlap --nodes=1 --ntasks=1 --nodelist="$1" --kill-on-bad-exit=1 "${@:2}" & steps=$((steps + 1)); }
on "$front" baton api-server --tokenizer "$model" --api-server-host 0.0.0.0
for index in "${!nodes[@]}"; do
  node=${nodes[$index]}
  role=$([ "$index" -lt "$context" ] && echo context || echo decode)
  on "$node" baton worker --role "$role" --model "$model" --worker-name "$role-$index"
done
echo "slurm: http://$front:8000 answers when all are up: baton status --url http://$front:8000" >&2

# Who ends well was asked to leave, and the others are given their time. Who fails takes the job with it; so does NATS.
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
