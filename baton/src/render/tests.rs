use clap::Parser;

use super::*;
use crate::Cli;

const EXAMPLE: &str = include_str!("../../../examples/cluster.yaml");
const TARGETS: [Target; 3] = [Target::Slurm, Target::Kubernetes, Target::Compose];

fn rendered(target: Target, text: &str) -> String {
    render(target, &Deployment::of_yaml(text).unwrap()).unwrap()
}

/// The files that lie ready are what the example renders to. BATON_WRITE_RENDERED=1 writes them.
#[test]
fn the_files_of_the_container_directory_are_rendered() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/../container");
    for (target, name) in TARGETS
        .into_iter()
        .zip(["slurm.sh", "k8s.yaml", "compose.yaml"])
    {
        let path = format!("{directory}/{name}");
        let text = rendered(target, EXAMPLE);
        if std::env::var_os("BATON_WRITE_RENDERED").is_some() {
            std::fs::write(&path, &text).unwrap();
        }
        let there = std::fs::read_to_string(&path).unwrap();
        assert!(
            there == text,
            "{path} is not what the example renders to: BATON_WRITE_RENDERED=1 writes it"
        );
    }
}

/// The command lines of `baton` in a rendered text: lists after `command` and `args`, and what a Slurm script starts.
fn command_lines(target: Target, text: &str) -> Vec<Vec<String>> {
    if let Target::Slurm = target {
        let steps = text.lines().filter_map(|line| line.split_once(" baton "));
        let of_on = steps.filter(|(on, _)| on.starts_with("on "));
        return of_on
            .map(|(_, words)| words.split(' ').map(str::to_owned).collect())
            .collect();
    }
    let documents: Vec<serde_json::Value> = serde_saphyr::from_multiple(text).unwrap();
    let mut lines = Vec::new();
    documents.iter().for_each(|value| lists(value, &mut lines));
    lines
}

fn lists(value: &serde_json::Value, lines: &mut Vec<Vec<String>>) {
    let fields = value.as_object().into_iter().flatten();
    for (name, value) in fields {
        let list: Vec<_> = value.as_array().into_iter().flatten().collect();
        let words: Vec<_> = list
            .iter()
            .filter_map(|word| word.as_str())
            .map(str::to_owned)
            .collect();
        if matches!(name.as_str(), "args" | "command")
            && words
                .first()
                .is_some_and(|word| word != "sleep" && word != "nats-server")
        {
            lines.push(words);
        }
        lists(value, lines);
        list.iter().for_each(|value| lists(value, lines));
    }
}

fn value<'a>(words: &'a [String], flag: &str) -> Option<&'a str> {
    let at = words.iter().position(|word| word == flag)?;
    words.get(at + 1).map(String::as_str)
}

const LARGE: &str = "\
model: /models/llama
nats: {request-plane-uri: 'nats://bus:4222', request-plane-credentials: /etc/baton/creds}
api-server: {count: 2, api-keys-file: /etc/baton/keys, tls-cert: /etc/baton/cert.pem, tls-key: /etc/baton/key.pem, api-server-port: 9000, cors-origin: ['https://a.example']}
context: [{devices: cuda:0-3, count: 2, tp-size: 2, drain-s: 100, memory-mib: 4096, cpus: 8}]
decode: [{devices: cuda:4-7, tp-size: 4, model: /models/llama-fp8, kv-mib: 100}]
both: [{ucx-tls: all}, {count: 3}]
slurm: {nodes: 3}
";

#[test]
fn every_command_line_is_one_that_baton_takes() {
    for text in [EXAMPLE, LARGE] {
        for target in TARGETS {
            let text = rendered(target, text);
            let lines = command_lines(target, &text);
            assert!(lines.len() >= 3, "{text}");
            for words in lines {
                let line = ["baton".to_owned()].into_iter().chain(words);
                let line: Vec<_> = line.collect();
                Cli::try_parse_from(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"));
            }
        }
    }
}

#[test]
fn gpus_are_asked_for_by_tp_size() {
    let text = rendered(Target::Kubernetes, LARGE);
    let lines = command_lines(Target::Kubernetes, &text);
    let devices = |lines: &[Vec<String>]| -> Vec<String> {
        let devices = lines.iter().filter_map(|words| value(words, "--device"));
        devices.map(str::to_owned).collect()
    };
    assert_eq!(devices(&lines), ["cuda:0-1", "cuda:0-3", "cpu", "cpu"]);
    assert_eq!(text.matches("nvidia.com/gpu: \"2\"").count(), 1, "{text}");
    assert_eq!(text.matches("nvidia.com/gpu: \"4\"").count(), 1, "{text}");

    let text = rendered(Target::Compose, LARGE);
    let lines = command_lines(Target::Compose, &text);
    let wanted = ["cuda:0-1", "cuda:0-1", "cuda:0-3", "cpu", "cpu"];
    assert_eq!(devices(&lines), wanted);
    assert_eq!(text.matches("driver: nvidia").count(), 3, "{text}");

    // On a node all GPUs are seen; the workers on it share them out.
    let text = rendered(Target::Slurm, LARGE);
    let lines = command_lines(Target::Slurm, &text);
    let wanted = [
        "cuda:0-1", "cuda:0-1", "cuda:0-3", "cpu", "cpu", "cpu", "cpu",
    ];
    assert_eq!(devices(&lines), wanted);
    assert!(text.contains("#SBATCH --gpus-per-node=4\n"), "{text}");
    let two = "model: /m\nboth: [{devices: cuda:0-7, count: 4}]\nslurm: {nodes: 2}";
    let text = rendered(Target::Slurm, two);
    let lines = command_lines(Target::Slurm, &text);
    assert_eq!(
        devices(&lines),
        ["cuda:0-1", "cuda:0-1", "cuda:2-3", "cuda:2-3"]
    );
    assert!(text.contains("#SBATCH --gpus-per-node=4\n"), "{text}");
}

#[test]
fn who_leaves_is_given_its_time() {
    let worker = |drain_s| {
        let drain_s = Some(drain_s);
        worker_grace_s(&WorkerGroup {
            drain_s,
            ..WorkerGroup::default()
        })
    };
    let floor = (FAREWELL + END_WAIT).as_secs();
    assert!(worker(100) >= 100 + floor);
    let text = rendered(Target::Kubernetes, LARGE);
    let grace = format!("terminationGracePeriodSeconds: {}\n", worker(100));
    assert_eq!(text.matches(&grace).count(), 1, "{text}");
    let text = rendered(Target::Compose, LARGE);
    let grace = format!("stop_grace_period: {}s\n", worker(100));
    assert_eq!(text.matches(&grace).count(), 2, "{text}");
    let text = rendered(Target::Slurm, LARGE);
    assert!(
        text.contains(&format!("--signal=TERM@{}\n", worker(100) + 20)),
        "{text}"
    );
    // What workers and API servers themselves have at the end.
    let groups = WorkerGroup::default();
    assert!(worker_grace_s(&groups) >= baton_worker::DRAIN_MS_DEFAULT / 1000 + floor);
    let servers = ApiServers::default();
    let drain = baton_api_server::Limits::default().drain.as_secs();
    assert!(api_server_grace_s(&servers) >= drain + floor);
}

#[test]
fn secrets_are_mounted_and_never_in_the_clear() {
    for target in [Target::Kubernetes, Target::Compose] {
        let text = rendered(target, LARGE);
        let lines = command_lines(target, &text);
        for words in &lines {
            let credentials = value(words, "--request-plane-credentials");
            assert_eq!(credentials, Some("/run/secrets/request-plane-credentials"));
            let keys = (words[0] == "api-server").then_some("/run/secrets/api-keys-file");
            assert_eq!(value(words, "--api-keys-file"), keys);
            let tls_key = (words[0] == "api-server").then_some("/run/secrets/tls-key");
            assert_eq!(value(words, "--tls-key"), tls_key);
        }
    }
}

#[test]
fn what_cannot_be_rendered_is_refused_by_name() {
    for (target, text, part) in [
        (Target::Slurm, "model: llama\nboth: [{}]", "model: llama"),
        (
            Target::Compose,
            "model: /m\nboth: [{model: m}]",
            "both[0].model: m",
        ),
        (
            Target::Kubernetes,
            "model: /a/m\nboth: [{model: /b/m}]",
            "/b/m",
        ),
        (Target::Kubernetes, "model: /m\nboth: [{}]", "/models/NAME"),
        (
            Target::Slurm,
            "model: /m\nboth: [{}]\nslurm: {nodes: 0}",
            "slurm.nodes",
        ),
        (
            Target::Compose,
            "model: /m\nboth: [{devices: cuda:0, tp-size: 2}]",
            "both[0].devices",
        ),
    ] {
        let deployment = Deployment::of_yaml(text).unwrap();
        let error = render(target, &deployment).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn values_stay_values() {
    let text = "model: '/models/a b$(POD)$HOME''s'\nboth: [{}]\ncluster: x_1";
    for (target, there) in [
        (Target::Slurm, "'/models/a b$(POD)$HOME'\\''s'"),
        (Target::Kubernetes, "/models/a b$$(POD)$HOME's"),
        (Target::Compose, "/models/a b$$(POD)$$HOME's"),
    ] {
        let text = rendered(target, text);
        assert!(
            text.contains(there) || text.contains(&there.replace('\'', "''")),
            "{text}"
        );
    }
}
