//! Downloads from a stand-in for the hub: a few lines of HTTP on a local port.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use baton_model::{Dtype, expected_tensors, header_bytes, parse_config};
use hf_hub::HFClient;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::{Want, open_with};
use crate::checkpoint::Checkpoint;
use crate::error::PrepError;

const NAME: &str = "owner/tiny";
const COMMIT: &str = "0123abcd";
const WEIGHTS: &str = "model.safetensors";

/// What the stand-in has and how it misbehaves.
#[derive(Default)]
struct Behaviour {
    files: BTreeMap<&'static str, Vec<u8>>,
    /// Status of every answer, if not 200.
    status: Option<u16>,
    /// Close the connection after so many bytes of the weights, this many times.
    break_off: (usize, usize),
    ignore_range: bool,
    /// Bytes more than the weights have.
    excess: usize,
    wrong_sha256: bool,
    /// Method, path and range of each request.
    requests: Vec<String>,
}

struct StandIn {
    endpoint: String,
    behaviour: Arc<Mutex<Behaviour>>,
    home: TempDir,
}

impl StandIn {
    fn start() -> Self {
        let behaviour = Arc::new(Mutex::new(Behaviour {
            files: model_files(),
            ..Behaviour::default()
        }));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let shared = Arc::clone(&behaviour);
        // It ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || answer(stream.unwrap(), &shared));
            }
        });
        StandIn {
            endpoint,
            behaviour,
            home: tempfile::tempdir().unwrap(),
        }
    }

    fn set(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut self.behaviour.lock().unwrap());
    }

    fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.behaviour.lock().unwrap().requests)
    }

    fn open(&self, want: Want) -> Result<Checkpoint, PrepError> {
        let client = HFClient::builder()
            .endpoint(&self.endpoint)
            .token("secret")
            .cache_dir(self.home.path().join("hub"))
            .retry_max_attempts(1)
            .retry_base_delay(Duration::from_millis(1))
            .build()
            .unwrap();
        open_with(client, NAME, want)
    }

    fn refusal(&self, want: Want) -> String {
        self.open(want)
            .err()
            .expect("it should be refused")
            .to_string()
    }

    fn fetched(&self, file: &str) -> PathBuf {
        self.home
            .path()
            .join("baton/owner--tiny")
            .join(COMMIT)
            .join(file)
    }

    fn part(&self) -> PathBuf {
        self.fetched(&format!("{WEIGHTS}.part"))
    }
}

fn model_files() -> BTreeMap<&'static str, Vec<u8>> {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "eos_token_id": 2, "tie_word_embeddings": true
    })
    .to_string()
    .into_bytes();
    let tensors: Vec<_> = expected_tensors(&parse_config(&config).unwrap())
        .into_iter()
        .map(|t| (t.name, Dtype::Bf16, t.shape))
        .collect();
    let mut weights = header_bytes(&tensors);
    let elements: usize = tensors
        .iter()
        .map(|(_, _, shape)| shape.iter().product::<usize>())
        .sum();
    weights.extend((0..elements).flat_map(|n| [n as u8, 0x3F]));
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": { "a": 0, "b": 1, "</s>": 2 }, "merges": [] }
    });
    BTreeMap::from([
        ("config.json", config),
        ("tokenizer.json", tokenizer.to_string().into_bytes()),
        (WEIGHTS, weights),
    ])
}

fn answer(mut stream: TcpStream, shared: &Mutex<Behaviour>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        match line.trim_end() {
            "" => break,
            line => lines.push(line.to_owned()),
        }
    }
    let header = |name: &str| {
        let lines = lines.iter().filter_map(|line| line.split_once(": "));
        lines
            .clone()
            .find(|(n, _)| n.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.to_owned())
    };
    let length = header("content-length").map_or(0, |n| n.parse().unwrap());
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let (method, path) = lines[0]
        .rsplit_once(' ')
        .unwrap()
        .0
        .split_once(' ')
        .unwrap();
    let range = header("range");

    let mut behaviour = shared.lock().unwrap();
    let noted = [Some(method), Some(path), range.as_deref()];
    behaviour
        .requests
        .push(noted.into_iter().flatten().collect::<Vec<_>>().join(" "));
    let mut status = behaviour.status.unwrap_or(200);
    if header("authorization").as_deref() != Some("Bearer secret") {
        status = 401;
    }
    let file = path.strip_prefix(&format!("/{NAME}/resolve/{COMMIT}/"));
    let mut more = String::new();
    let mut cut = None;
    let content = if status != 200 {
        br#"{"error":"no"}"#.to_vec()
    } else if let Some(file) = file {
        let Some(content) = behaviour.files.get(file).cloned() else {
            panic!("a file that was not looked up first: {file}");
        };
        more = format!("ETag: \"x\"\r\nX-Repo-Commit: {COMMIT}\r\n");
        let mut content = content;
        if file == WEIGHTS && method == "GET" {
            if let (Some(range), false) = (&range, behaviour.ignore_range) {
                let (from, to) = range
                    .strip_prefix("bytes=")
                    .unwrap()
                    .split_once('-')
                    .unwrap();
                let (from, to): (usize, usize) = (from.parse().unwrap(), to.parse().unwrap());
                content = content[from..=to].to_vec();
                status = 206;
            }
            content.resize(content.len() + behaviour.excess, 0);
            let (bytes, times) = behaviour.break_off;
            if times > 0 {
                behaviour.break_off.1 -= 1;
                cut = Some(bytes.min(content.len()));
            }
        }
        content
    } else if path == format!("/api/models/{NAME}") {
        let siblings: Vec<Value> = behaviour
            .files
            .keys()
            .map(|f| json!({ "rfilename": f }))
            .collect();
        json!({ "id": NAME, "sha": COMMIT, "siblings": siblings })
            .to_string()
            .into_bytes()
    } else if path == format!("/api/models/{NAME}/paths-info/{COMMIT}") {
        let asked: Value = serde_json::from_slice(&body).unwrap();
        let asked: Vec<&str> = asked["paths"]
            .as_array()
            .unwrap()
            .iter()
            .map(|p| p.as_str().unwrap())
            .collect();
        let found = behaviour
            .files
            .iter()
            .filter(|(name, _)| asked.contains(name));
        let entries: Vec<Value> = found
            .map(|(name, content)| {
                let sha256 = match behaviour.wrong_sha256 {
                    true => "0".repeat(64),
                    false => baton_model::hex(&Sha256::digest(content)),
                };
                let lfs = (*name == WEIGHTS).then(|| json!({ "size": content.len(), "sha256": sha256, "pointerSize": 1 }));
                json!({ "type": "file", "oid": "o", "size": content.len(), "path": name, "lfs": lfs })
            })
            .collect();
        json!(entries).to_string().into_bytes()
    } else {
        status = 404;
        Vec::new()
    };
    drop(behaviour);
    let head = format!(
        "HTTP/1.1 {status} x\r\nContent-Length: {}\r\nConnection: close\r\n{more}\r\n",
        content.len()
    );
    // The client may hang up first, when it has had enough.
    let _ = stream.write_all(head.as_bytes());
    if method != "HEAD" {
        let _ = stream.write_all(&content[..cut.unwrap_or(content.len())]);
    }
}

#[test]
fn a_model_is_fetched_once() {
    let hub = StandIn::start();
    let checkpoint = hub.open(Want::Everything).unwrap();
    assert_eq!(checkpoint.name, NAME);
    assert_eq!(
        checkpoint.source,
        format!("Hugging Face {NAME}, commit {COMMIT}")
    );
    assert_eq!(
        fs::read(hub.fetched(WEIGHTS)).unwrap(),
        model_files()[WEIGHTS]
    );
    assert!(!hub.part().exists());
    hub.requests();
    hub.open(Want::Everything).unwrap();
    assert_eq!(hub.requests(), [format!("GET /api/models/{NAME}")]);
}

#[test]
fn a_download_that_broke_off_goes_on_from_there() {
    let hub = StandIn::start();
    let weights = model_files().remove(WEIGHTS).unwrap();
    // Broken off by the server three times within a run…
    hub.set(|b| b.break_off = (100, 3));
    hub.open(Want::Everything).unwrap();
    assert_eq!(fs::read(hub.fetched(WEIGHTS)).unwrap(), weights);
    let get = |range: &str| format!("GET /{NAME}/resolve/{COMMIT}/{WEIGHTS}{range}");
    let last = weights.len() - 1;
    let requests = hub.requests();
    for range in [
        "".to_owned(),
        format!(" bytes=100-{last}"),
        format!(" bytes=200-{last}"),
        format!(" bytes=300-{last}"),
    ] {
        assert!(requests.contains(&get(&range)), "{range} of {requests:?}");
    }
    // …and by the end of a run.
    fs::remove_file(hub.fetched(WEIGHTS)).unwrap();
    fs::write(hub.part(), &weights[..777]).unwrap();
    hub.open(Want::Everything).unwrap();
    assert_eq!(fs::read(hub.fetched(WEIGHTS)).unwrap(), weights);
    let requests = hub.requests();
    assert!(
        requests.contains(&get(&format!(" bytes=777-{last}"))),
        "{requests:?}"
    );
    assert!(!requests.contains(&get("")), "{requests:?}");
}

#[test]
fn a_server_that_ignores_ranges_does_no_harm() {
    let hub = StandIn::start();
    let weights = model_files().remove(WEIGHTS).unwrap();
    hub.set(|b| (b.ignore_range, b.break_off) = (true, (100, 1)));
    hub.open(Want::Everything).unwrap();
    assert_eq!(fs::read(hub.fetched(WEIGHTS)).unwrap(), weights);
}

#[test]
fn a_download_without_end_or_progress_is_given_up() {
    let hub = StandIn::start();
    hub.set(|b| b.excess = 1);
    let error = hub.refusal(Want::Everything);
    assert!(
        error.contains("sends more than the") && error.contains(WEIGHTS),
        "{error}"
    );
    hub.set(|b| (b.excess, b.break_off) = (0, (0, usize::MAX)));
    let error = hub.refusal(Want::Everything);
    assert!(error.contains(WEIGHTS), "{error}");
    assert!(!hub.fetched(WEIGHTS).exists());
}

#[test]
fn other_bytes_than_the_hub_lists_are_not_kept() {
    let hub = StandIn::start();
    let mut spoilt = model_files().remove(WEIGHTS).unwrap();
    spoilt.truncate(1000);
    spoilt[999] ^= 1;
    hub.open(Want::Plan).unwrap();
    fs::write(hub.part(), &spoilt).unwrap();
    let error = hub.refusal(Want::Everything);
    assert!(
        error.contains("SHA-256") && error.contains("run again"),
        "{error}"
    );
    assert!(!hub.part().exists() && !hub.fetched(WEIGHTS).exists());
    hub.open(Want::Everything).unwrap();
    hub.set(|b| b.wrong_sha256 = true);
    fs::remove_file(hub.fetched(WEIGHTS)).unwrap();
    assert!(hub.refusal(Want::Everything).contains("the hub says 0000"));
}

#[test]
fn a_second_writer_is_locked_out() {
    let hub = StandIn::start();
    hub.open(Want::Plan).unwrap();
    let other = fs::File::create(hub.part()).unwrap();
    other.try_lock().unwrap();
    let error = hub.refusal(Want::Everything);
    assert!(
        error.contains(".part") && error.contains("another process"),
        "{error}"
    );
    drop(other);
    hub.open(Want::Everything).unwrap();
}

#[test]
fn a_plan_fetches_no_weights() {
    let hub = StandIn::start();
    let checkpoint = hub.open(Want::Plan).unwrap();
    let requests = hub.requests();
    assert!(
        !requests
            .iter()
            .any(|r| r.contains(&format!("resolve/{COMMIT}/{WEIGHTS}"))),
        "{requests:?}"
    );
    assert!(!hub.fetched(WEIGHTS).exists() && !hub.part().exists());
    let tensor = expected_tensors(&checkpoint.spec).remove(0);
    checkpoint.weights.check(&tensor, None).unwrap();
    let error = checkpoint
        .weights
        .read(&tensor, 0..16, &mut Vec::new())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains(NAME) && error.contains("was not fetched"),
        "{error}"
    );
    hub.set(|b| drop(b.files.remove(WEIGHTS)));
    assert!(hub.refusal(Want::Plan).contains("has no model.safetensors"));
    // With an index, every tensor is looked for.
    let index = json!({ "weight_map": { "model.norm.weight": "a.safetensors" } });
    hub.set(|b| {
        b.files.insert(
            "model.safetensors.index.json",
            index.to_string().into_bytes(),
        );
        b.files.insert("a.safetensors", vec![0; 10]);
    });
    let checkpoint = hub.open(Want::Plan).unwrap();
    let error = checkpoint
        .weights
        .check(&tensor, None)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("tensor `model.embed_tokens.weight` is missing"),
        "{error}"
    );
}

#[test]
fn refusals_of_the_hub_become_sentences() {
    let hub = StandIn::start();
    for status in [401, 403] {
        hub.set(|b| b.status = Some(status));
        let error = hub.refusal(Want::Everything);
        assert!(
            error.contains("gated or private")
                && error.contains("HF_TOKEN")
                && error.contains(NAME),
            "{error}"
        );
    }
    hub.set(|b| b.status = Some(404));
    let error = hub.refusal(Want::Everything);
    assert_eq!(
        error,
        format!("there is no model {NAME} at {}", hub.endpoint)
    );
    hub.set(|b| b.status = Some(500));
    let error = hub.refusal(Want::Everything);
    assert!(
        error.starts_with(&format!("cannot fetch {NAME} from {}", hub.endpoint)),
        "{error}"
    );
    hub.set(|b| {
        b.status = None;
        b.files.remove("tokenizer.json");
    });
    let error = hub.refusal(Want::Everything);
    assert!(error.contains("has no tokenizer.json"), "{error}");
}

#[test]
fn without_a_network_the_sentence_says_what_else_can_be_done() {
    let mut hub = StandIn::start();
    // A port that was just free and that nobody listens on.
    hub.endpoint = format!(
        "http://{}",
        TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
    );
    let error = hub.refusal(Want::Everything);
    assert!(
        error.contains("cannot reach") && error.contains("refused"),
        "{error}"
    );
    assert!(
        error.contains("name a local directory or GGUF file"),
        "{error}"
    );
}
