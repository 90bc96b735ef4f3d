//! A script for sbatch: every process is a step of the job, named, on a node that is known beforehand.

use std::fmt::Write;

use super::{NATS_CONFIG, api_server_grace_s, model_directory, nats_port, worker_grace_s};
use crate::Failure;
use crate::deployment::{Deployment, Devices, Worker};

/// From the signal to the last step's end there is time for srun and the controller too, in seconds.
const SPARE_S: u64 = 20;

/// The script.
pub fn render(deployment: &Deployment) -> Result<String, Failure> {
    let model = model_directory("model", &deployment.model)?;
    let workers = deployment.workers()?;
    let nodes = match deployment.slurm.nodes {
        Some(0) => return Err("slurm.nodes: it is 0: give one node at least".into()),
        Some(nodes) => nodes,
        None => workers.len(),
    };
    let (places, gpus) = place(deployment, &workers, nodes)?;
    let groups = deployment.groups();
    let grace = groups.map(|(_, _, group)| worker_grace_s(group)).max();
    let grace = grace
        .unwrap_or_default()
        .max(api_server_grace_s(&deployment.api_server))
        + SPARE_S;

    let mut text = String::new();
    let name = quoted(&deployment.cluster);
    write!(
        text,
        "#!/usr/bin/env bash\n#SBATCH --job-name={name}\n#SBATCH --nodes={nodes}\n#SBATCH --ntasks-per-node=1\n#SBATCH --exclusive\n"
    )?;
    if gpus > 0 {
        writeln!(text, "#SBATCH --gpus-per-node={gpus}")?;
    }
    writeln!(text, "#SBATCH --signal=TERM@{grace}")?;
    text += HEAD;
    writeln!(
        text,
        "if [ ${{#nodes[@]}} -lt {nodes} ]; then\n  echo \"slurm: the processes are placed on {nodes} nodes, and the job has ${{#nodes[@]}}\" >&2\n  exit 2\nfi"
    )?;
    let own_nats = deployment.nats.is_own();
    match &deployment.nats.request_plane_uri {
        Some(uri) if !own_nats => {
            writeln!(text, "export BATON_REQUEST_PLANE_URI={}", quoted(uri))?;
        }
        _ => {
            let port = nats_port(deployment)?;
            let program = deployment.nats.nats_server.as_deref();
            writeln!(
                text,
                "export BATON_REQUEST_PLANE_URI=nats://${{nodes[0]}}:{port}"
            )?;
            let program = quoted(program.unwrap_or("nats-server"));
            write!(
                text,
                "{}",
                NATS.replace("PROGRAM", &program)
                    .replace("CONFIG", &format!("{NATS_CONFIG}\nport: {port}"))
            )?;
        }
    }
    text += STEPS;
    let servers = &deployment.api_server;
    let mut urls = Vec::new();
    for index in 0..servers.count {
        let node = index % nodes;
        // Those that share a node need ports of their own.
        let port = usize::from(servers.port()) + index / nodes;
        let port = u16::try_from(port).map_err(|_| "api-server.api-server-port: it is too high")?;
        let words = deployment.api_server_args(None, port, model);
        writeln!(text, "on {node} api-server-{index} 0 {}", line(&words))?;
        let host = match servers.api_server_host.as_str() {
            "0.0.0.0" | "::" | "[::]" => format!("${{nodes[{node}]}}"),
            // For whoever is on that node.
            host => quoted(host),
        };
        urls.push(format!("{}://{host}:{port}", servers.scheme()));
    }
    for (worker, (node, devices)) in workers.iter().zip(&places) {
        let Worker { name, role, group } = worker;
        let model = model_directory("model", deployment.model_of(group))?;
        let words = deployment.worker_args(None, *role, name.as_str(), group, devices, model);
        let cpus = group.cpus.unwrap_or_default();
        writeln!(text, "on {node} {name} {cpus} {}", line(&words))?;
    }
    writeln!(
        text,
        "echo \"slurm: when all are up these answer: {}\" >&2",
        urls.join(" ")
    )?;
    text += match own_nats {
        true => WATCH_WITH_NATS,
        false => WATCH,
    };
    Ok(text)
}

/// A node for each worker, with its GPUs there, and how many GPUs a node must have. A worker goes where the fewest are taken, so
/// that one like it is next to others, and never over two nodes.
fn place(
    deployment: &Deployment,
    workers: &[Worker<'_>],
    nodes: usize,
) -> Result<(Vec<(usize, Devices)>, u32), Failure> {
    let mut loads = vec![(0_u32, 0_usize); nodes.min(workers.len()).max(1)];
    let mut places = Vec::new();
    let paths = deployment.groups();
    let paths = paths.flat_map(|(path, _, group)| std::iter::repeat_n(path, group.count));
    for (worker, path) in workers.iter().zip(paths) {
        let each = worker.group.gpus_each();
        let each = each.map_err(|why| format!("{path}.devices: {why}"))? as u32;
        let least = loads.iter().enumerate().min_by_key(|(_, load)| **load);
        let node = least.map_or(0, |(node, _)| node);
        let (gpus, count) = &mut loads[node];
        let devices = match each {
            0 => worker.group.devices.clone(),
            each => Devices::Cuda((*gpus..*gpus + each).collect()),
        };
        *gpus += each;
        *count += 1;
        places.push((node, devices));
    }
    let gpus = loads.iter().map(|(gpus, _)| *gpus).max();
    Ok((places, gpus.unwrap_or_default()))
}

fn line(words: &[String]) -> String {
    let words = words.iter().map(|word| quoted(word));
    let words: Vec<_> = std::iter::once("baton".to_owned()).chain(words).collect();
    words.join(" ")
}

/// A word of a shell's command line.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:,=@%+".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

const HEAD: &str = r#"# A cluster over the nodes of a Slurm job, as `baton render slurm --config FILE` writes it: change the file, not this.
#
#   sbatch SCRIPT
#
# `baton` and `nats-server` are in PATH on all nodes, the model is on a shared file system, and the nodes trust each other. Every
# process is a step of its own, named like the worker: `squeue --steps` lists them. To take a node away, have those on it
# leave: `scancel --ctld --signal=TERM JOB.STEP`. They finish what they have, and the rest goes elsewhere.
#
# Before the job's time is over, and with `scancel --signal=TERM JOB`, Slurm sends SIGTERM to the steps, not to this script: API
# servers and workers finish what they have. A bare `scancel` ends all at once.
set -euo pipefail

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
"#;

const NATS: &str = r#"
# No step, because it must outlive all steps: this script runs on the first node.
config=$(mktemp)
trap 'rm -f "$config"' EXIT
cat >"$config" <<'END'
CONFIG
END
PROGRAM --config "$config" &
nats=$!
"#;

const STEPS: &str = r#"
steps=0
# usage: on NODE NAME CPUS COMMAND...; steps share their nodes with each other (--overlap). CPUS 0: all of the node's.
on() {
  local cpus=()
  [ "$3" = 0 ] || cpus=(--cpus-per-task="$3")
  srun --overlap --nodes=1 --ntasks=1 --nodelist="${nodes[$1]}" --job-name="$2" "${cpus[@]}" --kill-on-bad-exit=1 "${@:4}" &
  steps=$((steps + 1))
}
"#;

const WATCH_WITH_NATS: &str = r#"
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
"#;

const WATCH: &str = r#"
# Who ends well was asked to leave, and the others go on. Who fails takes the job with it.
trap 'kill $(jobs -p) 2>/dev/null; wait' TERM INT
status=0
while [ "$steps" -gt 0 ] && [ "$status" = 0 ]; do
  wait -n || status=$?
  steps=$((steps - 1))
done
mapfile -t rest < <(jobs -p)
[ ${#rest[@]} -eq 0 ] || kill "${rest[@]}" 2>/dev/null || true
wait || true
exit "$status"
"#;
