use std::collections::BTreeSet;

use clap::{Args, Command};
use proptest::prelude::*;
use serde_json::Value;

use super::*;
use crate::api_server::ApiServerArgs;
use crate::bus_args::BusArgs;
use crate::trace_args::OtlpArgs;
use crate::worker::{self, RoleWorkerArgs};

const LEAST: &str = "model: m\ncontext: [{}]\ndecode: [{}]\n";

fn wrong(text: &str) -> String {
    let (place, why) = Deployment::of_yaml(text).unwrap_err();
    format!("{place}: {why}")
}

/// Names of a structure's fields, as a file has them.
fn fields(part: &impl Serialize) -> BTreeSet<String> {
    let value = serde_json::to_value(part).unwrap();
    value.as_object().unwrap().keys().cloned().collect()
}

fn flags<A: Args>() -> BTreeSet<String> {
    let command = A::augment_args(Command::new("baton"));
    let shown = command.get_arguments().filter(|arg| !arg.is_hide_set());
    let flags = shown.filter_map(|arg| arg.get_long());
    flags.map(str::to_owned).collect()
}

fn set<const N: usize>(names: [&str; N]) -> BTreeSet<String> {
    names.map(str::to_owned).into()
}

/// Who adds a flag adds its field, or says here why there is none.
#[test]
fn fields_are_flags_and_flags_are_fields() {
    let bus = flags::<BusArgs>();
    // Told by the deployment as a whole, or by the place of a worker in it.
    let elsewhere = set(["role", "worker-name", "device", "cluster"]);
    let own = set(["count", "devices", "share-devices", "cpus", "memory-mib"]);
    let group = fields(&WorkerGroup::default());
    let common = &bus | &flags::<OtlpArgs>();
    let wanted: BTreeSet<_> = &(&flags::<RoleWorkerArgs>() - &common) - &elsewhere;
    assert_eq!(&group - &own, wanted);

    let elsewhere = set(["api-server-name", "cluster", "tokenizer"]);
    let servers = fields(&ApiServers::default());
    let wanted: BTreeSet<_> = &(&flags::<ApiServerArgs>() - &common) - &elsewhere;
    assert_eq!(&servers - &set(["count"]), wanted);

    let of_up = set(["initialize-request-plane", "nats-server"]);
    assert_eq!(&fields(&Nats::default()) - &of_up, bus);
    assert_eq!(fields(&Traces::default()), flags::<OtlpArgs>());
}

#[test]
fn a_model_has_one_name_or_several() {
    let names = |line: &str| {
        let text = format!("{LEAST}api-server: {{{line}}}\n");
        Deployment::of_yaml(&text).map(|deployment| deployment.api_server.model_name)
    };
    assert_eq!(names("model-name: a").unwrap(), ["a"]);
    assert_eq!(names("model-name: \"4\"").unwrap(), ["4"]);
    assert_eq!(names("model-name: [a, org/b]").unwrap(), ["a", "org/b"]);
    assert!(names("count: 1").unwrap().is_empty());
    let (_, why) = names("model-name: 4").unwrap_err();
    assert!(why.contains("quotation marks"), "{why}");
}

#[test]
fn what_is_not_said_is_the_default() {
    let deployment = Deployment::of_yaml(LEAST).unwrap();
    assert_eq!(deployment.context, [WorkerGroup::default()]);
    assert_eq!(deployment.api_server, ApiServers::default());
    assert!(deployment.nats.is_own());
    let workers = deployment.workers().unwrap();
    let names: Vec<_> = workers.iter().map(|worker| worker.name.as_str()).collect();
    assert_eq!(names, ["context-0", "decode-0"]);
}

/// Every error names the line or the field, what is wrong, and what to do.
#[test]
fn errors_name_the_place() {
    for (text, parts) in [
        ("model: m\nmodle: x\n", vec![":2", "modle"]),
        ("context: [{}]\ndecode: [{}]\n", vec!["model"]),
        ("model: m\ncontext:\n- count: many\n", vec![":3", "many"]),
        (
            "model: m\ncontext:\n- tp_size: 2\n",
            vec![":3", "tp_size", "tp-size"],
        ),
        (
            "model: m\ncontext:\n- devices: gpu\n",
            vec![":3", "gpu", "cuda:N"],
        ),
        ("model: m\ncontext: [{}\n", vec![":"]),
        (
            "model: m\nboth: [{no-prefix-cache: 3}]\n",
            vec![":2", "true or false"],
        ),
        ("model: [m]\n", vec![":1", "text"]),
        ("model: m\nboth:\n  count: 2\n", vec!["list"]),
        ("model: m\nmodel: n\n", vec![":2", "model"]),
        (
            "model: m\ncontext: [{}]\n",
            vec!["nobody would generate", "decode"],
        ),
        (
            "model: m\ndecode: [{}]\n",
            vec!["nobody would run prompts", "context"],
        ),
        ("model: ''\nboth: [{}]\n", vec!["model: "]),
        ("model: m\nboth: [{count: 0}]\n", vec!["both[0].count"]),
        (
            "model: m\nboth: [{}, {count: 5000}]\n",
            vec!["both[1].count"],
        ),
        ("model: m\ncluster: a.b\nboth: [{}]\n", vec!["cluster: "]),
        (
            "model: m\nworker-name: a.b\nboth: [{}]\n",
            vec!["worker-name: "],
        ),
        ("model: m\nboth: [{tp-size: 0}]\n", vec!["both[0].tp-size"]),
        (
            "model: m\nboth: [{devices: fake, tp-size: 2}]\n",
            vec!["both[0].tp-size", "fake"],
        ),
        (
            "model: m\nboth: [{share-devices: true}]\n",
            vec!["both[0].share-devices"],
        ),
        (
            "model: m\nboth: [{devices: cuda:0-2, tp-size: 3}]\n",
            vec!["both[0].tp-size", "1, 2, 4 or 8"],
        ),
        (
            "model: m\nboth: [{devices: cuda:0-2}]\n",
            vec!["both[0].devices", "1, 2, 4 or 8"],
        ),
        ("model: m\nboth: [{batch: 0}]\n", vec!["both[0]: ", "batch"]),
        (
            "model: m\nboth: [{}]\ntraces: {otlp-endpoint: 'grpc://h'}\n",
            vec!["traces.otlp-endpoint", "HTTP"],
        ),
        (
            "model: m\nboth: [{}]\napi-server: {trace-sample: 2}\n",
            vec!["api-server.trace-sample", "from 0 to 1"],
        ),
        (
            "model: m\nboth: [{batch: 9, step-tokens: 8}]\n",
            vec!["both[0]: ", "batch"],
        ),
        (
            "model: m\nboth: [{devices: cuda:0-2, count: 2}]\n",
            vec!["both[0].devices", "tp-size"],
        ),
        (
            "model: m\nboth: [{devices: cuda:0, kv-cache-free-gpu-memory-fraction: 2}]\n",
            vec!["both[0]: ", "GPU memory"],
        ),
        (
            "model: m\nboth: [{}]\napi-server: {count: 0}\n",
            vec!["api-server.count"],
        ),
        (
            "model: m\nboth: [{}]\napi-server: {tool-format: x}\n",
            vec!["api-server.tool-format", "'x'"],
        ),
        (
            "model: m\nboth: [{}]\napi-server: {api-server-port: 65535, count: 2}\n",
            vec!["api-server.api-server-port"],
        ),
        (
            "model: m\nboth: [{}]\napi-server: {cors-origin: [x]}\n",
            vec!["api-server", "cors-origin"],
        ),
        (
            "model: m\nboth: [{}]\nnats: {request-plane-uri: 'nats://u:p@h:1'}\n",
            vec!["nats.request-plane-uri", "password"],
        ),
        (
            "model: m\nboth: [{}]\nnats: {request-plane-nkey: f}\n",
            vec!["nats.request-plane-nkey", "request-plane-uri"],
        ),
        (
            "model: m\nboth: [{}]\nnats: {initialize-request-plane: true}\n",
            vec!["nats.initialize-request-plane"],
        ),
        (
            "model: m\nboth: [{}]\nnats: {request-plane-uri: 'nats://h:1', request-plane-certificate: f}\n",
            vec!["request-plane-certificate-key"],
        ),
    ] {
        let error = wrong(text);
        assert!(!error.contains('\n'), "{error}");
        for part in parts {
            assert!(error.contains(part), "{text}\nsays {error}\nwithout {part}");
        }
    }
}

#[test]
fn what_a_group_says_reaches_its_workers() {
    let text = "model: m\nboth: [{tp-size: 3, threads: 4, drain-s: 5, lease-ms: 6, kv-mib: 7, block-tokens: 8, \
                kv-cache-free-gpu-memory-fraction: 0.25, step-tokens: 99, batch: 10, queue: 11, itl-ms: 12, \
                no-prefix-cache: true, ucx-tls: '-x', model: n}]\nnats: {request-plane-wait-s: 12}";
    let deployment = Deployment::of_yaml(text).unwrap();
    let group = &deployment.both[0];
    let model = deployment.model_of(group);
    let bus = Some("nats://h:1");
    let words = deployment.worker_args(bus, Role::Both, "b", group, &group.devices, model);
    let args: RoleWorkerArgs = check::parsed("", &words).unwrap();
    let config = worker::config_of(args).unwrap();
    assert_eq!((config.worker.as_str(), config.role), ("b", Role::Both));
    assert_eq!((config.tp_size, config.threads), (Some(3), 4));
    assert_eq!((config.drain_ms, config.lease_ms), (5000, 6));
    assert_eq!((config.kv_bytes, config.block_tokens), (Some(7 << 20), 8));
    assert_eq!(
        (
            config.step_tokens,
            config.batch,
            config.queue,
            config.itl_ms
        ),
        (99, 10, 11, 12)
    );
    assert_eq!(config.kv_free_gpu_memory_fraction, 0.25);
    assert_eq!(
        (config.prefix_cache, config.ucx_tls.as_deref()),
        (false, Some("-x"))
    );
    assert_eq!(config.model_dir, std::path::Path::new("n"));
    assert_eq!(config.bus.url, "nats://h:1");
    assert_eq!(config.bus.connect_wait.unwrap().as_secs(), 12);
}

#[test]
fn gpus_of_one_host_are_dealt_out_once() {
    let dealt = |groups: &str| {
        let deployment = Deployment::of_yaml(&format!("model: m\n{groups}")).unwrap();
        deal(&deployment)
            .map(|dealt| dealt.iter().map(Devices::to_string).collect::<Vec<_>>())
            .map_err(|refusal| refusal.to_string())
    };
    let whole =
        "context: [{devices: [cuda:0, cuda:1], count: 2}]\ndecode: [{devices: cuda:2-7, count: 3}]";
    let devices = ["cuda:0", "cuda:1", "cuda:2-3", "cuda:4-5", "cuda:6-7"];
    assert_eq!(dealt(whole).unwrap(), devices);
    let shared = "context: [{devices: cuda:0, share-devices: true, count: 2}]\ndecode: [{devices: cuda:0, share-devices: true}]";
    assert_eq!(dealt(shared).unwrap(), ["cuda:0"; 3]);
    for (groups, parts) in [
        (
            "context: [{devices: cuda:0-1}]\ndecode: [{devices: cuda:1-2}]",
            ["decode[0].devices", "cuda:1", "context[0]"],
        ),
        (
            "context: [{devices: cuda:0, share-devices: true}]\ndecode: [{devices: cuda:0}]",
            ["decode[0].devices", "cuda:0", "context[0]"],
        ),
        (
            "both: [{devices: cuda:0-3, count: 2, tp-size: 4}]",
            ["both[0].devices", "8 GPUs", "has 4"],
        ),
        (
            "both: [{devices: cuda:0-3, tp-size: 2}]",
            ["both[0].devices", "2 GPUs", "has 4"],
        ),
    ] {
        let error = dealt(groups).unwrap_err();
        for part in parts {
            assert!(
                error.contains(part),
                "{groups}\nsays {error}\nwithout {part}"
            );
        }
    }
}

/// Strings that YAML could take for something else.
fn text() -> impl Strategy<Value = String> {
    let hard = [
        "yes",
        "null",
        "~",
        "1e3",
        "0x1F",
        "01",
        "- a",
        "a: b",
        "a #b",
        "{x}",
        "'q'",
        "\"",
        "*a",
        "&a",
        "!t",
        "%",
        "@",
        " a ",
        "a\nb",
        "\u{e9}",
        "-",
        "--",
        "on",
        "2026-11-23",
        "1_000",
        "$HOME",
    ];
    prop_oneof![
        proptest::sample::select(hard.map(str::to_owned).to_vec()),
        "[a-z0-9/._-]{1,20}",
    ]
}

fn group() -> impl Strategy<Value = WorkerGroup> {
    let devices =
        proptest::sample::select(vec!["cpu", "fake", "fake:9", "cuda:0-3", "cuda:0,2,5,6"]);
    let sizes = (
        1_usize..5,
        devices,
        1_u32..3,
        proptest::option::of(1_u64..99),
    );
    let more = (
        proptest::option::of(text()),
        proptest::option::of(1_u32..64),
        proptest::option::of(1_usize..60),
        any::<bool>(),
        proptest::option::of(0.01_f64..1.0),
    );
    (sizes, more).prop_map(|((count, devices, ranks, kv_mib), more)| {
        let (ucx_tls, block_tokens, batch, no_prefix_cache, fraction) = more;
        let devices: Devices = devices.parse().unwrap();
        WorkerGroup {
            count,
            tp_size: (!devices.to_string().starts_with("fake")).then_some(ranks),
            devices,
            kv_mib,
            block_tokens,
            batch,
            no_prefix_cache,
            kv_cache_free_gpu_memory_fraction: fraction,
            ucx_tls,
            ..WorkerGroup::default()
        }
    })
}

fn deployment() -> impl Strategy<Value = Deployment> {
    let groups = || proptest::collection::vec(group(), 1..3);
    let servers = (1_usize..4, text(), proptest::collection::vec(text(), 0..3));
    (text(), groups(), groups(), servers).prop_map(|(model, context, decode, servers)| {
        let (count, name, _) = servers;
        let mut deployment: Deployment = serde_json::from_value(serde_json::json!({
            "model": model,
            "nats": {"request-plane-uri": "nats://h:1"},
        }))
        .unwrap();
        (deployment.context, deployment.decode) = (context, decode);
        (
            deployment.api_server.count,
            deployment.api_server.model_name,
        ) = (count, vec![name]);
        deployment
    })
}

/// What each process would be told, as it understands it.
fn understood(deployment: &Deployment) -> Vec<String> {
    let workers = deployment.workers().unwrap();
    let workers = workers.iter().map(|worker| {
        let (name, device) = (
            worker.name.as_str(),
            match &worker.group.devices {
                Devices::Cuda(_) => Devices::Cuda(vec![0]),
                device => device.clone(),
            },
        );
        let (role, group) = (worker.role, worker.group);
        let model = deployment.model_of(group);
        let mut words =
            deployment.worker_args(Some("nats://h:1"), role, name, group, &device, model);
        // Known from the devices.
        if let Some(at) = words.iter().position(|word| word == "--tp-size") {
            words.drain(at..at + 2);
        }
        let args: RoleWorkerArgs = check::parsed("", &words).unwrap();
        format!("{:?}", worker::config_of(args).unwrap())
    });
    workers.collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_written_reads_as_the_same(deployment in deployment()) {
        prop_assume!(deployment.check().is_ok());
        let text = deployment.to_yaml().unwrap();
        let read = Deployment::of_yaml(&text);
        prop_assert_eq!(read, Ok(deployment.clone()), "{}", text);

        let whole = deployment.filled();
        let text = whole.to_yaml().unwrap();
        let read = Deployment::of_yaml(&text);
        prop_assert_eq!(read.as_ref(), Ok(&whole), "{}", text);
        prop_assert_eq!(whole.filled(), whole.clone());
        prop_assert_eq!(understood(&whole), understood(&deployment));
    }
}

#[test]
fn a_whole_deployment_leaves_nothing_to_guess() {
    let whole = Deployment::of_yaml(LEAST).unwrap().filled();
    let value = serde_json::to_value(&whole).unwrap();
    let unsaid = |part: &Value| -> BTreeSet<String> {
        let fields = part.as_object().unwrap().iter();
        let fields = fields.filter(|(_, value)| value.is_null());
        fields.map(|(name, _)| name.clone()).collect()
    };
    // Of the machine, of the model, or of a scheduler.
    let open = [
        "threads",
        "tp-size",
        "model",
        "kv-mib",
        "kv-cache-free-gpu-memory-fraction",
        "ucx-tls",
        "cpus",
        "memory-mib",
    ];
    assert_eq!(unsaid(&value["context"][0]), set(open));
    let open = [
        "api-server-port",
        "default-max-tokens",
        "ttft-ms",
        "itl-ms",
        "api-keys-file",
        "api-key-in-flight-max",
        "tls-cert",
        "tls-key",
        "tls-client-ca",
        "tool-format",
        "reasoning-format",
        "http-threads",
    ];
    assert_eq!(unsaid(&value["api-server"]), set(open));
}

/// Rows of a table of docs/deployment.md: the first column's names, below a heading.
fn rows(page: &str, heading: &str) -> BTreeSet<String> {
    let section = page.split("\n## ").find(|part| part.starts_with(heading));
    let section = section.unwrap_or_else(|| panic!("no section {heading}"));
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `"));
    rows.filter_map(|row| row.split('`').next())
        .map(str::to_owned)
        .collect()
}

#[test]
fn the_page_has_every_field() {
    let page = include_str!("../../../docs/deployment.md");
    let mut whole = Deployment::of_yaml(LEAST).unwrap();
    assert_eq!(rows(page, "The whole"), fields(&whole));
    for (heading, part) in [
        ("`nats`", fields(&Nats::default())),
        ("`traces`", fields(&Traces::default())),
        ("`api-server`", fields(&ApiServers::default())),
        (
            "`context`, `decode`, `both`",
            fields(&WorkerGroup::default()),
        ),
        ("`containers`", fields(&Containers::default())),
        ("`slurm`", fields(&Slurm::default())),
    ] {
        assert_eq!(rows(page, heading), part, "{heading}");
    }
    // Its examples are files that are taken.
    let mut examples = 0;
    for part in page.split("```yaml\n").skip(1) {
        let example = part.split("```").next().unwrap();
        whole = Deployment::of_yaml(example).unwrap_or_else(|error| panic!("{example}: {error:?}"));
        examples += 1;
    }
    assert!(examples >= 2 && deal(&whole).is_ok());
}
