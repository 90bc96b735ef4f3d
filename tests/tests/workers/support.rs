//! A real nats-server, workers in this process, and an API server played by hand.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use async_nats::{Client, Subscriber};
use baton_engine::{
    Engine, EngineConfig, Event, FakeConfig, FakeExecutor, NewSequence, ResumedSequence,
    fake_geometry,
};
use baton_protocol::deadlines::BEAT_INTERVAL_MS;
use baton_protocol::subjects::Cluster;
use baton_protocol::{
    Abort, ApiBeat, ApiServerId, Beat, CacheSalt, DecodeJob, DecodeReply, End, FinishReason,
    FrameItem, Generation, Hello, Incarnation, KvHandle, PROTOCOL_VERSION, PackedTokens, PeerState,
    PrefillJob, PrefillReply, PullReport, Refusal, Release, Released, RequestId, Role, Sampling,
    SequenceSpec, TokenFrame, Versioned, WorkerId, decode, encode,
};
use baton_tests::Nats;
use baton_worker::{Device, WorkerConfig, WorkerError};
use futures::StreamExt;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// Nothing here takes longer unless it hangs.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub const VOCAB: u32 = 1_000;
pub const TOKENS_MAX: u32 = 2_048;
pub const EOS: u32 = 2;

/// A bus and a model directory.
pub struct House {
    _nats: Nats,
    pub url: String,
    pub model_dir: PathBuf,
    pub cluster: Cluster,
    _directory: tempfile::TempDir,
}

impl House {
    pub async fn new() -> Self {
        Self::with_bus("").await
    }

    /// With these lines in the configuration of nats-server.
    pub async fn with_bus(lines: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let nats = Nats::start(directory.path(), lines).await;
        let model_dir = directory.path().join("model");
        write_model(&model_dir, "a");
        Self {
            url: nats.uri(),
            _nats: nats,
            model_dir,
            cluster: Cluster::new("test").unwrap(),
            _directory: directory,
        }
    }

    pub fn config(&self, name: &str, role: Role) -> WorkerConfig {
        let worker = WorkerId::new(name).unwrap();
        let mut config = WorkerConfig::new(worker, role, &self.model_dir, self.cluster.clone());
        config.bus.url.clone_from(&self.url);
        config.device = Device::Fake { step_micros: 0 };
        config.block_tokens = 8;
        config.step_tokens = 64;
        config.batch = 16;
        config.prefix_cache = false;
        config
    }

    pub async fn client(&self) -> Client {
        async_nats::connect(&self.url).await.expect("a bus")
    }
}

/// A model directory for the fake device: a manifest, and files of the right names without content.
pub fn write_model(path: &Path, digit: &str) {
    std::fs::create_dir_all(path).unwrap();
    let names = ["config.json", "tokenizer.json", "rank0.safetensors"];
    for name in names {
        std::fs::write(path.join(name), "").unwrap();
    }
    let file =
        |name: &str| serde_json::json!({ "name": name, "bytes": 0, "sha256": "0".repeat(64) });
    let manifest = serde_json::json!({
        "format": 1,
        "name": "tiny",
        "fingerprint": digit.repeat(64),
        "dtype": "BF16",
        "tp_size": 1,
        "tokens_max": TOKENS_MAX,
        "batch_max": null,
        "spec": {
            "family": "llama", "hidden": 64, "intermediate": 128, "layers": 2, "heads": 4, "kv_heads": 2,
            "head_dim": 16, "vocab": VOCAB, "tokens_max": TOKENS_MAX, "rms_eps": 1e-5,
            "rope": { "theta": 10000.0, "scaling": { "kind": "none" } },
            "qkv_bias": false, "qk_norm": false, "tied_embeddings": true, "sliding_window": null,
        },
        "bos_token_id": 1,
        "eos_token_ids": [EOS],
        "files": names.map(file),
        "source": "made by a test",
    });
    std::fs::write(path.join("manifest.json"), manifest.to_string()).unwrap();
}

/// A worker in this process.
pub struct Worker {
    pub id: WorkerId,
    shutdown: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), WorkerError>>,
}

impl Worker {
    pub fn start(config: WorkerConfig) -> Self {
        let (shutdown, signal) = oneshot::channel();
        let id = config.worker.clone();
        let signal = async {
            let _ = signal.await;
        };
        Self {
            id,
            shutdown: Some(shutdown),
            task: tokio::spawn(baton_worker::run(config, || {}, signal)),
        }
    }

    /// Tells it to leave.
    pub fn signal(&mut self) {
        drop(self.shutdown.take());
    }

    /// Waits until it has left.
    pub async fn left(self) -> Result<(), WorkerError> {
        timeout(PATIENCE, self.task)
            .await
            .expect("it leaves")
            .expect("it does not panic")
    }

    pub async fn stop(mut self) {
        self.signal();
        self.left().await.expect("it leaves in peace");
    }
}

/// Each worker's last beat, and how many there have been.
type Beats = HashMap<WorkerId, (u64, Beat)>;

/// An API server played by hand.
pub struct Api {
    pub id: ApiServerId,
    pub incarnation: Incarnation,
    pub client: Client,
    pub cluster: Cluster,
    tokens: Subscriber,
    beats: watch::Receiver<Beats>,
    /// Beats of this API server; stopped to play a dead one.
    pub heart: JoinHandle<()>,
    /// What the streams have brought so far.
    streams: HashMap<(RequestId, u32), Vec<FrameItem>>,
}

static REQUESTS: AtomicU32 = AtomicU32::new(1);

pub fn new_request() -> RequestId {
    RequestId(REQUESTS.fetch_add(1, Ordering::Relaxed).into())
}

impl Api {
    pub async fn new(house: &House, name: &str) -> Self {
        Self::in_life(house, name, Incarnation(1)).await
    }

    /// As it is started again under the name that it had.
    pub async fn in_life(house: &House, name: &str, incarnation: Incarnation) -> Self {
        let client = house.client().await;
        let cluster = house.cluster.clone();
        let id = ApiServerId::new(name).unwrap();
        let tokens = client.subscribe(cluster.all_tokens(&id)).await.unwrap();
        let mut worker_beats = client.subscribe(cluster.beats()).await.unwrap();
        baton_tests::settled(&client).await;
        let (sender, beats) = watch::channel(HashMap::new());
        tokio::spawn(async move {
            while let Some(message) = worker_beats.next().await {
                if let Ok(beat) = decode::<Beat>(&message.payload) {
                    sender.send_modify(|beats: &mut Beats| {
                        let count = beats.get(&beat.worker).map_or(0, |(count, _)| *count);
                        beats.insert(beat.worker.clone(), (count + 1, beat));
                    });
                }
            }
        });
        let beat = ApiBeat {
            v: PROTOCOL_VERSION,
            api_server: id.clone(),
            incarnation: Some(incarnation),
            in_flight: 0,
            serving_ms: None,
        };
        let (heart_client, subject) = (client.clone(), cluster.api_beat(&id));
        let heart = tokio::spawn(async move {
            loop {
                let _ = heart_client
                    .publish(subject.clone(), encode(&beat).unwrap().into())
                    .await;
                tokio::time::sleep(Duration::from_millis(BEAT_INTERVAL_MS)).await;
            }
        });
        Self {
            id,
            incarnation,
            client,
            cluster,
            tokens,
            beats,
            heart,
            streams: HashMap::new(),
        }
    }

    /// Started again, so far without a word.
    pub fn in_incarnation(self, incarnation: Incarnation) -> Self {
        Self {
            incarnation,
            ..self
        }
    }

    /// Waits for a beat of this worker that fulfils the condition, asking for one again and again. The next one may
    /// have been on its way already, so it does not count.
    pub async fn until(
        &mut self,
        worker: &WorkerId,
        what: &str,
        condition: impl Fn(&Beat) -> bool,
    ) -> Beat {
        let hello = Hello {
            v: PROTOCOL_VERSION,
            from: self.id.to_string(),
        };
        let before = self
            .beats
            .borrow()
            .get(worker)
            .map_or(0, |(count, _)| *count);
        let holds = |beats: &Beats| {
            beats
                .get(worker)
                .is_some_and(|(count, beat)| *count > before + 1 && condition(beat))
        };
        let waiting = async {
            loop {
                self.publish(self.cluster.hello(), &hello).await;
                if let Ok(beats) =
                    timeout(Duration::from_millis(20), self.beats.wait_for(holds)).await
                {
                    return beats.unwrap()[worker].1.clone();
                }
            }
        };
        match timeout(PATIENCE, waiting).await {
            Ok(beat) => beat,
            Err(_) => panic!(
                "{worker} never beat {what}: {:?}",
                self.beats.borrow().get(worker)
            ),
        }
    }

    /// Waits until this worker holds nothing.
    pub async fn until_empty(&mut self, worker: &WorkerId) {
        self.until(worker, "empty", |beat| {
            let load = beat.load;
            load.blocks_used
                + load.blocks_quarantined
                + load.leased
                + load.pulling
                + load.running
                + load.waiting
                == 0
        })
        .await;
    }

    pub async fn until_ready(&mut self, decode: &WorkerId, context: &WorkerId) -> Beat {
        self.until(decode, "that it can pull", |beat| {
            beat.peers
                .iter()
                .any(|peer| peer.worker == *context && peer.state == PeerState::Ready)
        })
        .await
    }

    pub async fn publish<M: Versioned>(&self, subject: String, message: &M) {
        self.client
            .publish(subject, encode(message).unwrap().into())
            .await
            .unwrap();
        self.client.flush().await.unwrap();
    }

    /// A job whose answer nobody waits for.
    pub async fn post<M: Versioned>(&self, subject: String, message: &M) {
        let payload = encode(message).unwrap().into();
        let reply = self.client.new_inbox();
        self.client
            .publish_with_reply(subject, reply, payload)
            .await
            .unwrap();
        self.client.flush().await.unwrap();
    }

    /// One beat of this API server, besides those of its heart.
    pub async fn beat(&self) {
        let beat = ApiBeat {
            v: PROTOCOL_VERSION,
            api_server: self.id.clone(),
            incarnation: Some(self.incarnation),
            in_flight: 0,
            serving_ms: None,
        };
        self.publish(self.cluster.api_beat(&self.id), &beat).await;
    }

    pub async fn request<M: Versioned, R: Versioned>(&self, subject: String, message: &M) -> R {
        let answer = timeout(
            PATIENCE,
            self.client
                .request(subject, encode(message).unwrap().into()),
        );
        decode(
            &answer
                .await
                .expect("an answer in time")
                .expect("an answer")
                .payload,
        )
        .unwrap()
    }

    pub fn prefill_job(&self, request: RequestId, sequence: &SequenceSpec) -> PrefillJob {
        PrefillJob {
            v: PROTOCOL_VERSION,
            request,
            api_server: self.id.clone(),
            api_incarnation: Some(self.incarnation),
            budget_ms: 60_000,
            model: baton_protocol::ModelFingerprint::new("a".repeat(64)).unwrap(),
            sequence: sequence.clone(),
            prompt_logprobs: None,
            stream: false,
            source: None,
            trace: None,
        }
    }

    pub fn decode_job(
        &self,
        request: RequestId,
        sequence: &SequenceSpec,
        handle: &KvHandle,
    ) -> DecodeJob {
        DecodeJob {
            v: PROTOCOL_VERSION,
            request,
            api_server: self.id.clone(),
            api_incarnation: Some(self.incarnation),
            attempt: 0,
            budget_ms: 60_000,
            sequence: sequence.clone(),
            handle: handle.clone(),
            trace: None,
        }
    }

    pub async fn prefill(&self, worker: &WorkerId, job: &PrefillJob) -> PrefillReply {
        self.request(self.cluster.prefill(worker), job).await
    }

    /// A prefill that must succeed.
    pub async fn staged(
        &self,
        worker: &WorkerId,
        request: RequestId,
        sequence: &SequenceSpec,
    ) -> KvHandle {
        match self
            .prefill(worker, &self.prefill_job(request, sequence))
            .await
        {
            PrefillReply::Ready { handle, .. } => *handle,
            other => panic!("not staged: {other:?}"),
        }
    }

    pub async fn decode(&self, worker: &WorkerId, job: &DecodeJob) -> DecodeReply {
        self.request(self.cluster.decode(worker), job).await
    }

    pub async fn refused(&self, worker: &WorkerId, job: &DecodeJob) -> Refusal {
        match self.decode(worker, job).await {
            DecodeReply::Refused { refusal, .. } => refusal,
            other => panic!("not refused: {other:?}"),
        }
    }

    pub async fn admitted(&self, worker: &WorkerId, job: &DecodeJob) {
        let reply = self.decode(worker, job).await;
        assert!(matches!(reply, DecodeReply::Admitted { .. }), "{reply:?}");
    }

    pub async fn abort(&self, worker: &WorkerId, request: RequestId) {
        let abort = Abort {
            v: PROTOCOL_VERSION,
            request,
            reason: "the test wants it".to_owned(),
        };
        self.publish(self.cluster.abort(worker), &abort).await;
    }

    pub async fn release(&self, handle: &KvHandle, change: impl FnOnce(&mut Release)) -> bool {
        let mut release = Release {
            v: PROTOCOL_VERSION,
            request: RequestId(0),
            incarnation: handle.incarnation,
            handle: handle.handle,
            nonce: handle.nonce,
            decode_worker: WorkerId::new("by-hand").unwrap(),
        };
        change(&mut release);
        self.request::<_, Released>(self.cluster.release(&handle.worker), &release)
            .await
            .valid
    }

    /// The whole stream of a try: its tokens with gaps refused, what the pull cost, and how it ended.
    pub async fn stream(&mut self, request: RequestId, attempt: u32) -> Stream {
        let key = (request, attempt);
        let waiting = async {
            loop {
                let last = self.streams.get(&key).and_then(|items| items.last());
                if last.is_some_and(|item| item.end.is_some()) {
                    break;
                }
                self.take_frame().await;
            }
        };
        if timeout(PATIENCE, waiting).await.is_err() {
            let last = self.streams.get(&key).and_then(|items| items.last());
            panic!("the stream does not end after {last:?}");
        }
        let items = self.streams.remove(&key).unwrap();
        let mut stream = Stream {
            first_index: items[0].index,
            tokens: Vec::new(),
            pulled: None,
            end: None,
            reports: 0,
        };
        let is_report = |item: &FrameItem| {
            item.tokens.0.is_empty() && item.pulled.is_none() && item.end.is_none()
        };
        let (reports, items): (Vec<_>, Vec<_>) = items.into_iter().partition(is_report);
        stream.reports = reports.len();
        assert!(
            reports.iter().all(|item| item.index == stream.first_index),
            "reports are of a pull that is not over: {reports:?}"
        );
        for (i, item) in items.into_iter().enumerate() {
            let next = stream.first_index as usize + stream.tokens.len();
            // A worker whose engine hangs ends a try without knowing how far it was.
            let is_next = match item.tokens.0.is_empty() {
                true => item.index as usize <= next,
                false => item.index as usize == next,
            };
            assert!(is_next, "a gap: {item:?}");
            assert!(
                item.pulled.is_none() || i == 0,
                "the pull is reported first or never"
            );
            stream.tokens.extend(item.tokens.0);
            stream.pulled = stream.pulled.or(item.pulled);
            stream.end = item.end;
        }
        stream
    }

    /// Waits for the next tokens of a try and leaves them for [`Self::stream`].
    pub async fn first_tokens(&mut self, request: RequestId) {
        let waiting = async {
            let has_tokens =
                |items: &Vec<FrameItem>| items.iter().any(|item| !item.tokens.0.is_empty());
            while !self.streams.get(&(request, 0)).is_some_and(has_tokens) {
                self.take_frame().await;
            }
        };
        timeout(PATIENCE, waiting).await.expect("tokens come");
    }

    /// Waits until a worker reports exactly these prompts of this API server, in any order.
    pub async fn prompts_reported(&mut self, requests: &[RequestId]) {
        let mut expected = requests.to_vec();
        expected.sort();
        let mut last = Vec::new();
        let waiting = async {
            while last != expected {
                last = self.take_frame().await;
                last.sort();
            }
        };
        if timeout(PATIENCE, waiting).await.is_err() {
            panic!("{expected:?} were never reported together, last {last:?}");
        }
    }

    /// The prompts that the next frame reports; its items are left for [`Self::stream`].
    async fn take_frame(&mut self) -> Vec<RequestId> {
        let message = self.tokens.next().await.expect("the subscription lives");
        let frame: TokenFrame = decode(&message.payload).unwrap();
        for item in frame.items {
            let key = (item.request, item.attempt);
            self.streams.entry(key).or_default().push(item);
        }
        frame.prompts
    }
}

#[derive(Debug)]
pub struct Stream {
    pub first_index: u32,
    pub tokens: Vec<u32>,
    pub pulled: Option<PullReport>,
    pub end: Option<End>,
    /// Items that only said that the worker is at it.
    pub reports: usize,
}

impl Stream {
    pub fn failure(&self) -> baton_protocol::FailureCode {
        match &self.end {
            Some(End::Failed(failure)) => failure.code,
            other => panic!("no failure: {other:?}"),
        }
    }
}

/// A prompt of this many tokens that no other seed has.
pub fn prompt(seed: u32, tokens: usize, max_tokens: u32) -> SequenceSpec {
    let token =
        |i: usize| (seed.wrapping_mul(7_919).wrapping_add(i as u32 * 31)) % (VOCAB - 10) + 10;
    SequenceSpec {
        tokens: PackedTokens((0..tokens).map(token).collect()),
        prompt_tokens: tokens as u32,
        generation: Generation {
            sampling: Sampling::default(),
            stop_token_ids: vec![EOS],
            min_tokens: 0,
            max_tokens,
            grammar: None,
            token_rules: None,
        },
        cache_salt: CacheSalt::NONE,
        service: baton_protocol::Service::default(),
    }
}

/// What an engine alone makes of a sequence: all its output tokens.
pub fn undisturbed(sequence: &SequenceSpec) -> Vec<u32> {
    let executor = FakeExecutor::new(FakeConfig {
        kv: fake_geometry(8, 1, 1),
        vocab: VOCAB,
        tokens_max: TOKENS_MAX,
        never_emit: vec![EOS],
        ..FakeConfig::default()
    });
    let config = EngineConfig {
        step_tokens_max: 4_096,
        sequences_max: 1,
        queue_max: 1,
        prefix_cache: false,
    };
    let mut engine = Engine::new(Box::new(executor), config);
    let spec = sequence.clone();
    engine
        .submit(NewSequence {
            key: 1,
            spec: spec.clone(),
            prompt_logprobs: None,
            constraint: None,
            stream: false,
        })
        .unwrap();
    let mut tokens = Vec::new();
    loop {
        for event in engine.step().unwrap() {
            let (sampled, finish) = match event {
                Event::Prefilled {
                    blocks,
                    sampled,
                    finish,
                    ..
                } => {
                    if finish.is_none() {
                        let resumed = ResumedSequence {
                            key: 2,
                            spec: spec.clone(),
                            next: sampled.token,
                            blocks,
                            constraint: None,
                        };
                        engine.resume(resumed).unwrap();
                    }
                    (sampled, finish)
                }
                Event::Token {
                    sampled, finish, ..
                } => (sampled, finish),
                other => panic!("{other:?}"),
            };
            tokens.push(sampled.token);
            if finish.is_some() {
                return tokens;
            }
        }
    }
}

/// That a stream is what follows the first token of an undisturbed run.
pub fn assert_whole(stream: &Stream, sequence: &SequenceSpec, handle: &KvHandle) {
    let expected = undisturbed(sequence);
    assert_eq!(handle.first_token, Some(expected[0]), "the first token");
    assert_eq!(stream.first_index, 1);
    assert_eq!(stream.tokens, expected[1..], "the other tokens");
    assert_eq!(stream.end, Some(End::Finished(FinishReason::Length)));
}
