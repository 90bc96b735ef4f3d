//! A real nats-server, a scripted worker that speaks the protocol, a tiny model directory, and an HTTP
//! client that shows every byte.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use baton_api_server::{ApiServerConfig, run};
use baton_protocol::subjects::Cluster;
use baton_protocol::*;
use futures::StreamExt;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};

/// What every worker here generates: token `i` of any output is byte `i` of this, then the end.
pub const TEXT: &str = "Hello, wörld! This is a longer text, of 2 sentences. Grüße! 🎉";

/// A space and the first byte of an emoji in one token of the tiny model, as large vocabularies have them. Ids below are bytes.
pub const SPACE_AND_LEAD: u32 = 256;

/// The end-of-sequence id of the tiny model.
pub const EOS: u32 = 257;

const PATIENCE: Duration = Duration::from_secs(60);

/// Waits with the bound that every wait of these tests has.
pub async fn within<F: Future>(what: &str, future: F) -> F::Output {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(output) => output,
        Err(_) => panic!("not within {PATIENCE:?}: {what}"),
    }
}

/// A nats-server of this test's own.
pub struct Nats {
    pub url: String,
    _server: baton_tests::Nats,
    _directory: tempfile::TempDir,
}

impl Nats {
    pub async fn start() -> Self {
        Self::with_max_payload(8 << 20).await
    }

    pub async fn with_max_payload(bytes: usize) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let more = format!("max_payload: {bytes}");
        let server = baton_tests::Nats::start(directory.path(), &more).await;
        Self {
            url: server.uri(),
            _server: server,
            _directory: directory,
        }
    }
}

/// A model directory whose tokens are the 256 bytes and [`SPACE_AND_LEAD`].
pub fn model_directory() -> tempfile::TempDir {
    model_with(&json!({"tokens_max": 1000, "use_regex": false}))
}

/// The same with this longest sequence, and with or without texts being split into words.
pub fn model_with(options: &Value) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let plain = |code: u32| matches!(code, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut vocabulary = serde_json::Map::new();
    let mut next = 256;
    for byte in 0..=255u32 {
        let code = if plain(byte) {
            byte
        } else {
            next += 1;
            next - 1
        };
        vocabulary.insert(char::from_u32(code).unwrap().to_string(), byte.into());
    }
    vocabulary.insert("Ġð".to_owned(), SPACE_AND_LEAD.into());
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": options["use_regex"]});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [{"id": EOS, "content": "<|end|>", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true}],
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": false, "vocab": vocabulary, "merges": []},
    });
    let manifest = json!({"format": 1, "name": "tiny", "fingerprint": "ab".repeat(32),
        "tokens_max": options["tokens_max"], "eos_token_ids": [EOS]});
    let template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}\
        {% if add_generation_prompt %}<assistant>{% endif %}{{ mood }}";
    let write =
        |file: &str, text: String| std::fs::write(directory.path().join(file), text).unwrap();
    write("manifest.json", manifest.to_string());
    write("tokenizer.json", tokenizer.to_string());
    write("chat_template.jinja", template.to_owned());
    directory
}

/// What a scripted worker does wrong, if anything.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Script {
    /// Refuses every job.
    pub busy: bool,
    /// Refuses prompts that it does not understand: those of choices with an odd seed.
    pub refuses_odd_seeds: bool,
    /// Generations at a time; more are refused. No bound if 0.
    pub places: usize,
    /// Never answers a prefill job, and beats no more once it got one.
    pub silent: bool,
    /// Leaves this output token out of its first frame that has it.
    pub gap_at: Option<u32>,
    /// Falls silent, beats included, before this output token.
    pub dies_at: Option<u32>,
    /// Holds still before this output token until the test lets it go on.
    pub waits_at: Option<u32>,
    /// Tokens of one frame.
    pub frame_tokens: usize,
    /// Begins [`TEXT`] again where it ends.
    pub endless: bool,
    /// Generates these tokens instead of [`TEXT`], if there are any.
    pub tokens: Vec<u32>,
    /// Length of its leases; the usual if 0.
    pub lease_ms: u32,
    /// Whether it drains when it is asked to; no answer, as of workers of earlier releases, if this is not set.
    pub drains: Option<bool>,
    /// What it answers to renewals; nothing, as workers of earlier releases do, if this is not set.
    pub renews: Option<bool>,
    /// Refuses every job for this reason.
    pub refuses_with: Option<&'static str>,
    /// Places in its batch, as it says in its beats; 8 if 0.
    pub batch: u32,
    /// How long generations last here, as it says in its beats.
    pub decode_ms: u32,
    /// Its steps take a millisecond a token, as it says in its beats, and so many tokens of prompts wait.
    pub waiting_tokens: Option<u32>,
}

/// A scripted worker.
pub struct Worker {
    pub script: Arc<Mutex<Script>>,
    pub aborts: mpsc::UnboundedReceiver<Abort>,
    pub prefills: mpsc::UnboundedReceiver<PrefillJob>,
    pub decodes: mpsc::UnboundedReceiver<DecodeJob>,
    pub renewals: mpsc::UnboundedReceiver<Renew>,
    pub go_on: watch::Sender<bool>,
    pub beats: watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Worker {
    pub async fn start(nats: &Nats, name: &str, role: Role, script: Script) -> Self {
        let client = async_nats::connect(&nats.url).await.unwrap();
        let (abort_sender, aborts) = mpsc::unbounded_channel();
        let (prefill_sender, prefills) = mpsc::unbounded_channel();
        let (decode_sender, decodes) = mpsc::unbounded_channel();
        let (renewal_sender, renewals) = mpsc::unbounded_channel();
        let (go_on, going) = watch::channel(false);
        let (beats, beating) = watch::channel(true);
        let script = Arc::new(Mutex::new(script));
        let worker = FakeWorker {
            client,
            cluster: Cluster::new("test").unwrap(),
            name: WorkerId::new(name).unwrap(),
            role,
            script: Arc::clone(&script),
            going,
            beats: beats.clone(),
            generating: Arc::default(),
            renewals: renewal_sender,
        };
        let (ready, is_ready) = oneshot::channel();
        let task =
            tokio::spawn(worker.run(ready, beating, abort_sender, prefill_sender, decode_sender));
        is_ready.await.unwrap();
        Self {
            script,
            aborts,
            prefills,
            decodes,
            renewals,
            go_on,
            beats,
            task,
        }
    }

    pub async fn aborted(&mut self) -> Abort {
        within("an abort", self.aborts.recv()).await.unwrap()
    }

    /// The first abort of this request. A worker that goes on is told again, so there may be more of those before.
    pub async fn aborted_of(&mut self, request: RequestId) -> Abort {
        loop {
            let abort = self.aborted().await;
            if abort.request == request {
                return abort;
            }
        }
    }
}

#[derive(Clone)]
struct FakeWorker {
    client: async_nats::Client,
    cluster: Cluster,
    name: WorkerId,
    role: Role,
    script: Arc<Mutex<Script>>,
    going: watch::Receiver<bool>,
    beats: watch::Sender<bool>,
    generating: Arc<AtomicUsize>,
    renewals: mpsc::UnboundedSender<Renew>,
}

fn a_millisecond_a_token() -> StepCost {
    let point = |tokens: u32| CostPoint {
        tokens,
        us: tokens as f32 * 1e3,
    };
    StepCost {
        layers: vec![point(1), point(1024)],
        ..StepCost::default()
    }
}

pub fn geometry() -> KvGeometry {
    KvGeometry::bf16(
        16,
        vec![KvGroup {
            layers: 1,
            kv_heads: 1,
            head_dim: 2,
        }],
    )
}

impl FakeWorker {
    async fn run(
        self,
        ready: oneshot::Sender<()>,
        beating: watch::Receiver<bool>,
        aborts: mpsc::UnboundedSender<Abort>,
        prefills: mpsc::UnboundedSender<PrefillJob>,
        decodes: mpsc::UnboundedSender<DecodeJob>,
    ) {
        let client = &self.client;
        let subscribe = |subject: String| async move { client.subscribe(subject).await.unwrap() };
        let mut prefill = subscribe(self.cluster.prefill(&self.name)).await;
        let mut decode_jobs = subscribe(self.cluster.decode(&self.name)).await;
        let mut abort = subscribe(self.cluster.abort(&self.name)).await;
        let mut renew = subscribe(self.cluster.renew(&self.name)).await;
        let mut drain = subscribe(self.cluster.drain(&self.name)).await;
        let mut hello = subscribe(self.cluster.hello()).await;
        baton_tests::settled(&self.client).await;
        let mut tick = tokio::time::interval(Duration::from_millis(500));
        self.beat().await;
        ready.send(()).unwrap();
        loop {
            tokio::select! {
                Some(m) = prefill.next() => {
                    let job: PrefillJob = decode(&m.payload).unwrap();
                    prefills.send(job.clone()).ok();
                    self.on_prefill(job, m.reply.unwrap()).await;
                }
                Some(m) = decode_jobs.next() => {
                    let job: DecodeJob = decode(&m.payload).unwrap();
                    decodes.send(job.clone()).ok();
                    self.on_decode(job, m.reply.unwrap()).await;
                }
                Some(m) = renew.next() => {
                    self.renewals.send(decode(&m.payload).unwrap()).ok();
                    let renews = self.script.lock().unwrap().renews;
                    if let (Some(valid), Some(reply)) = (renews, m.reply) {
                        self.send(reply, &Renewed { v: PROTOCOL_VERSION, valid }).await;
                    }
                }
                Some(m) = drain.next() => {
                    let asked: Drain = decode(&m.payload).unwrap();
                    let drains = self.script.lock().unwrap().drains;
                    if let (Some(drains), Some(reply)) = (drains, m.reply) {
                        let draining = drains && asked.incarnation == Incarnation(7);
                        self.send(reply, &Draining { v: PROTOCOL_VERSION, draining }).await;
                    }
                }
                Some(m) = abort.next() => { aborts.send(decode(&m.payload).unwrap()).ok(); }
                Some(_) = hello.next() => if *beating.borrow() { self.beat().await },
                _ = tick.tick() => if *beating.borrow() { self.beat().await },
            }
        }
    }

    async fn send<M: Versioned>(&self, subject: impl async_nats::subject::ToSubject, message: &M) {
        let bytes = encode(message).unwrap();
        self.client.publish(subject, bytes.into()).await.unwrap();
    }

    async fn beat(&self) {
        // Everybody reaches everybody by name.
        let peers = ["c1", "c2", "b1"].map(|peer| PeerHealth {
            worker: WorkerId::new(peer).unwrap(),
            incarnation: Incarnation(7),
            state: PeerState::Ready,
            transport: "posix".to_owned(),
            gigabytes_per_second: 3.5,
            pulled_gigabytes_per_second: None,
            pulled_bytes: 0,
            error: None,
        });
        let script = self.script.lock().unwrap().clone();
        let beat = Beat {
            v: PROTOCOL_VERSION,
            worker: self.name.clone(),
            incarnation: Incarnation(7),
            role: self.role,
            state: WorkerState::Serving,
            reason: None,
            model: ModelInfo {
                name: "tiny".to_owned(),
                fingerprint: ModelFingerprint::new("ab".repeat(32)).unwrap(),
                tokens_max: 1000,
                vocab: 258,
            },
            kv: geometry(),
            device: "scripted".to_owned(),
            ranks: Some(1),
            weights: "bf16".to_owned(),
            load: Load {
                waiting_tokens: script.waiting_tokens.unwrap_or(0),
                ..Load::default()
            },
            capacity: Capacity {
                blocks: 64,
                batch: if script.batch == 0 { 8 } else { script.batch },
                queue: 8,
            },
            peers: if self.role.decodes() {
                peers.to_vec()
            } else {
                Vec::new()
            },
            changes: None,
            transport: "none".to_owned(),
            decode_ms: script.decode_ms,
            cost: script.waiting_tokens.map(|_| a_millisecond_a_token()),
            cost_error: None,
            itl_ms: None,
            step_tokens: None,
            prefix_version: None,
            streams: false,
            leases_prefixes: false,
        };
        self.send(self.cluster.beat(&self.name), &beat).await;
    }

    /// Prefill and decode jobs are refused in the same words.
    async fn refuse(&self, reply: async_nats::Subject, reason: &str) {
        let refusal = json!({"reason": reason, "detail": "the test wants it"});
        let refused = json!({"outcome": "refused", "v": PROTOCOL_VERSION, "refusal": refusal});
        let sent = self.client.publish(reply, refused.to_string().into());
        sent.await.unwrap();
    }

    async fn on_prefill(&self, job: PrefillJob, reply: async_nats::Subject) {
        let script = self.script.lock().unwrap().clone();
        job.sequence.check().unwrap();
        if script.silent {
            self.beats.send_replace(false);
            return;
        }
        if let Some(reason) = script.refuses_with {
            return self.refuse(reply, reason).await;
        }
        let odd = job.sequence.generation.sampling.seed % 2 == 1;
        let refusal = match script.refuses_odd_seeds && odd {
            true => Some(Refusal::Malformed {
                detail: "an odd seed".to_owned(),
            }),
            false => script.busy.then_some(Refusal::Busy {
                retry_after_ms: 1500,
            }),
        };
        // With odd seeds refused, even ones wait for ever.
        if script.refuses_odd_seeds && !odd {
            return;
        }
        if let Some(refusal) = refusal {
            return self
                .send(
                    reply,
                    &PrefillReply::Refused {
                        v: PROTOCOL_VERSION,
                        refusal,
                    },
                )
                .await;
        }
        let index = job.sequence.output_tokens();
        let (first_token, finish) = token_at(index, &job.sequence.generation, &script);
        let want = job.sequence.generation.sampling.logprobs;
        let handle = Box::new(KvHandle {
            worker: self.name.clone(),
            incarnation: Incarnation(7),
            handle: HandleId(1),
            nonce: Nonce(2),
            model: job.model,
            kv: geometry(),
            runs: Vec::new(),
            valid_tokens: job.sequence.tokens.0.len() as u32,
            lease_ms: match script.lease_ms {
                0 => deadlines::LEASE_MS,
                lease_ms => lease_ms,
            },
            first_token: Some(first_token),
            first_logprobs: want.map(|top| logprobs(first_token, top)),
            finish,
            cached_tokens: 3,
            timings: PrefillTimings {
                queue_ms: 1.0,
                compute_ms: 2.0,
            },
            prefix_pull: None,
        });
        let prompt_logprobs = job.prompt_logprobs.map(|top| {
            job.sequence.tokens.0[1..]
                .iter()
                .map(|token| logprobs(*token, top))
                .collect()
        });
        self.send(
            reply,
            &PrefillReply::Ready {
                v: PROTOCOL_VERSION,
                handle,
                prompt_logprobs,
            },
        )
        .await;
    }

    async fn on_decode(&self, job: DecodeJob, reply: async_nats::Subject) {
        let script = self.script.lock().unwrap().clone();
        if let Some(reason) = script.refuses_with {
            return self.refuse(reply, reason).await;
        }
        let full = script.places > 0 && self.generating.load(Ordering::SeqCst) >= script.places;
        if script.busy || full {
            let refusal = Refusal::Busy {
                retry_after_ms: 60_000,
            };
            return self
                .send(
                    reply,
                    &DecodeReply::Refused {
                        v: PROTOCOL_VERSION,
                        refusal,
                    },
                )
                .await;
        }
        let admitted = DecodeReply::Admitted {
            v: PROTOCOL_VERSION,
            incarnation: Incarnation(7),
        };
        self.send(reply, &admitted).await;
        let worker = self.clone();
        worker.generating.fetch_add(1, Ordering::SeqCst);
        tokio::spawn(async move { worker.generate(job, script).await });
    }

    async fn generate(mut self, job: DecodeJob, script: Script) {
        let mut index = job.sequence.output_tokens() + 1;
        let mut pulled = Some(PullReport {
            bytes: 4096,
            seconds: 0.001,
            handover_seconds: None,
            parts: None,
        });
        loop {
            let mut item = FrameItem {
                request: job.request,
                attempt: job.attempt,
                index,
                tokens: PackedTokens::default(),
                logprobs: Vec::new(),
                pulled: pulled.take(),
                end: None,
            };
            for _ in 0..script.frame_tokens.max(1) {
                if script.waits_at == Some(index) {
                    self.going.wait_for(|going| *going).await.unwrap();
                }
                if script.dies_at == Some(index) {
                    self.beats.send_replace(false);
                    return;
                }
                let (token, finish) = token_at(index, &job.sequence.generation, &script);
                item.tokens.0.push(token);
                if let Some(top) = job.sequence.generation.sampling.logprobs {
                    item.logprobs.push(logprobs(token, top));
                }
                index += 1;
                item.end = finish.map(End::Finished);
                if finish.is_some() {
                    break;
                }
            }
            let ended = item.end.is_some();
            if ended {
                self.generating.fetch_sub(1, Ordering::SeqCst);
            }
            let first_try = job.attempt == 0;
            let lost = script
                .gap_at
                .is_some_and(|gap| (item.index..index).contains(&gap));
            if !(first_try && lost) {
                let frame = TokenFrame {
                    v: PROTOCOL_VERSION,
                    worker: self.name.clone(),
                    incarnation: Incarnation(7),
                    items: vec![item],
                    prompts: Vec::new(),
                };
                self.send(self.cluster.tokens(&job.api_server, &self.name), &frame)
                    .await;
            }
            if ended {
                return;
            }
            tokio::task::yield_now().await;
        }
    }
}

fn token_at(index: u32, generation: &Generation, script: &Script) -> (u32, Option<FinishReason>) {
    let place = match script.endless {
        true => index as usize % TEXT.len(),
        false => index as usize,
    };
    let token = match script.tokens.is_empty() {
        true => TEXT.as_bytes().get(place).map(|byte| u32::from(*byte)),
        false => script.tokens.get(place).copied(),
    };
    let token = token.unwrap_or(EOS);
    let stop = generation
        .stop_token_ids
        .contains(&token)
        .then_some(FinishReason::Stop);
    let length = (index + 1 >= generation.max_tokens).then_some(FinishReason::Length);
    (token, stop.or(length))
}

fn logprobs(token: u32, top: u8) -> TokenLogprobs {
    let top = (0..u32::from(top))
        .map(|i| TopLogprob(token + i, -0.5 - i as f32))
        .collect();
    TokenLogprobs { logprob: -0.5, top }
}

/// An API server on a port of its own.
pub struct Api {
    pub address: std::net::SocketAddr,
    /// Shown with every request.
    pub key: Option<&'static str>,
    stop: Option<oneshot::Sender<()>>,
    task: tokio::task::JoinHandle<()>,
}

impl Api {
    pub async fn start(nats: &Nats) -> Self {
        Self::with(nats, |_| {}).await
    }

    pub async fn with(nats: &Nats, change: impl FnOnce(&mut ApiServerConfig)) -> Self {
        let model = model_directory();
        let mut config = ApiServerConfig::new("api", "test", model.path()).unwrap();
        let (on_ready, ready) = oneshot::channel();
        let (stop, stopped) = oneshot::channel::<()>();
        config.bus.url = nats.url.clone();
        config.port = 0;
        config.on_ready = Some(on_ready);
        config.limits.drain = Duration::from_secs(1);
        change(&mut config);
        let task = tokio::spawn(async move {
            let shutdown = async {
                let _ = stopped.await;
            };
            run(config, shutdown).await.unwrap();
        });
        let address = within("the API server is ready", ready).await.unwrap();
        drop(model);
        Self {
            address,
            key: None,
            stop: Some(stop),
            task,
        }
    }

    /// Asks it to leave.
    pub fn begin_stop(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
    }

    /// Stops it and waits until it is gone.
    pub async fn stop(mut self) {
        self.begin_stop();
        self.stopped().await;
    }

    /// Waits until it is gone.
    pub async fn stopped(mut self) {
        within("the API server stops", &mut self.task)
            .await
            .unwrap();
    }

    /// Waits until `/cluster` shows this many workers.
    pub async fn sees(&self, workers: usize) {
        within("workers join", async {
            loop {
                let (_, body) = self.get("/cluster").await;
                let cluster: Value = serde_json::from_str(&body).unwrap();
                if cluster["workers"].as_array().unwrap().len() == workers {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
    }

    pub async fn get(&self, path: &str) -> (u16, String) {
        let response = self.send("GET", path, b"").await;
        (response.status, response.body)
    }

    pub async fn post(&self, path: &str, body: Value) -> Response {
        self.send("POST", path, body.to_string().as_bytes()).await
    }

    pub async fn send(&self, method: &str, path: &str, body: &[u8]) -> Response {
        let mut connection = self.open(method, path, body).await;
        within("the answer", connection.finish()).await
    }

    /// Sends a request and leaves the answer to be read.
    pub async fn open(&self, method: &str, path: &str, body: &[u8]) -> Connection {
        // HTTP/1.0: a streamed body comes as it is and ends with the connection.
        let key = self
            .key
            .map(|key| format!("Authorization: Bearer {key}\r\n"));
        let key = key.unwrap_or_default();
        let head = format!(
            "{method} {path} HTTP/1.0\r\nHost: test\r\n{key}Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        let mut connection = self.connect().await;
        connection.write(head.as_bytes()).await.unwrap();
        connection.write(body).await.unwrap();
        connection
    }

    /// A connection on which nothing was said.
    pub async fn connect(&self) -> Connection {
        // A small buffer, so that what a test does not read soon stands still on the server.
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(8 << 10).unwrap();
        Connection {
            stream: socket.connect(self.address).await.unwrap(),
            bytes: Vec::new(),
        }
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A request under way.
pub struct Connection {
    stream: TcpStream,
    bytes: Vec<u8>,
}

impl Connection {
    /// Sends bytes as they are.
    pub async fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(bytes).await
    }

    /// Reads until the answer so far holds `text`.
    pub async fn read_until(&mut self, text: &str) -> String {
        within(&format!("{text:?} in the answer"), async {
            loop {
                let so_far = String::from_utf8_lossy(&self.bytes).into_owned();
                if so_far.contains(text) {
                    return so_far;
                }
                let read = self.stream.read_buf(&mut self.bytes).await.unwrap();
                assert!(read > 0, "ended without {text:?}: {so_far}");
            }
        })
        .await
    }

    /// Waits until the server has no such connection any more; nothing is read meanwhile.
    pub async fn closed_by_server(&self) {
        // A socket that was reset has no peer any more.
        let Ok(peer) = self.stream.peer_addr() else {
            return;
        };
        let ends = (peer.port(), self.stream.local_addr().unwrap().port());
        within("the server closes the connection", async {
            while sockets().contains(&ends) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }

    /// Reads the rest, and gives back all bytes.
    pub async fn finish_bytes(&mut self) -> Vec<u8> {
        self.stream.read_to_end(&mut self.bytes).await.unwrap();
        std::mem::take(&mut self.bytes)
    }

    /// Reads the rest.
    pub async fn finish(&mut self) -> Response {
        self.stream.read_to_end(&mut self.bytes).await.unwrap();
        let text = String::from_utf8(self.bytes.clone()).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").expect("an HTTP answer");
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Response {
            status,
            head: head.to_ascii_lowercase(),
            body: body.to_owned(),
        }
    }
}

/// Local and remote port of every TCP socket over IPv4 that a process of this host holds, as the kernel lists them.
fn sockets() -> Vec<(u16, u16)> {
    let port = |field: &str| u16::from_str_radix(field.split_once(':')?.1, 16).ok();
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let ends = |line: &str| {
        let mut fields = line.split_whitespace().skip(1);
        Some((port(fields.next()?)?, port(fields.next()?)?))
    };
    table.lines().skip(1).filter_map(ends).collect()
}

/// An answer.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Response {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// The `data:` events of a stream, without `[DONE]`, which must be the last.
    pub fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.body);
        let data: Vec<&str> = self
            .body
            .lines()
            .filter_map(|line| line.strip_prefix("data: "))
            .collect();
        let (last, events) = data.split_last().expect("events");
        assert_eq!(*last, "[DONE]", "{}", self.body);
        events
            .iter()
            .map(|event| serde_json::from_str(event).unwrap())
            .collect()
    }
}

/// A chat with one user message, and what else the test wants.
pub fn chat(more: Value) -> Value {
    let mut body = json!({"model": "tiny", "messages": [{"role": "user", "content": "hi"}]});
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}
