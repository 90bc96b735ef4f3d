//! The beginning of a prompt is pulled from the worker that has it, before the prompt runs.
//!
//! The fake device chooses tokens by the KV that it reads back, so foreign or torn KV would be another text.

use baton_protocol::{
    CacheSalt, CostPoint, Incarnation, KvHandle, LeaseAsk, LeaseReply, ModelFingerprint,
    PROTOCOL_VERSION, PrefillReply, PrefixPull, PrefixPullFailure, PrefixSource, Refusal, Released,
    Role, SequenceSpec, StepCost, WorkerDescriptor, WorkerId, decode, encode,
};
use futures::StreamExt;
use tokio::task::JoinHandle;

use crate::support::*;

const BLOCK_TOKENS: usize = 8;

/// Tokens of the first turn's prompt, and of its answer.
const FIRST: (usize, u32) = (203, 21);

/// Two workers that do both. What is cached is on `holder`; `other` computes so slowly that pulling has seconds.
struct Pair {
    house: House,
    api: Api,
    holder: Worker,
    other: Worker,
    life: Incarnation,
}

impl Pair {
    async fn new() -> Self {
        let house = House::new().await;
        let mut api = Api::new(&house, "api").await;
        let config = |name: &str| {
            let mut config = house.config(name, Role::Both);
            config.prefix_cache = true;
            config
        };
        let holder = Worker::start(config("holder"));
        let mut slow = config("other");
        let point = |tokens, us| CostPoint { tokens, us };
        slow.fake_cost = Some(StepCost {
            layers: vec![point(1, 5_000.0), point(1_000, 10_000_000.0)],
            ..StepCost::default()
        });
        let other = Worker::start(slow);
        let beat = api.until_ready(&other.id, &holder.id).await;
        assert!(beat.leases_prefixes);
        let life = api.until(&holder.id, "at all", |_| true).await.incarnation;
        Self {
            house,
            api,
            holder,
            other,
            life,
        }
    }

    /// A turn on a worker, prompt and answer. Whatever is cached where, the answer is that of an engine alone.
    async fn turn(
        &mut self,
        worker: &WorkerId,
        sequence: &SequenceSpec,
        source: Option<PrefixSource>,
    ) -> KvHandle {
        let request = new_request();
        let mut job = self.api.prefill_job(request, sequence);
        job.source = source;
        let handle = match self.api.prefill(worker, &job).await {
            PrefillReply::Ready { handle, .. } => *handle,
            other => panic!("not staged: {other:?}"),
        };
        let job = self.api.decode_job(request, sequence, &handle);
        self.api.admitted(worker, &job).await;
        let stream = self.api.stream(request, 0).await;
        assert_whole(&stream, sequence, &handle);
        self.api.until_empty(worker).await;
        handle
    }

    /// A first turn on the holder, and the one that follows it.
    async fn first_turn(&mut self, seed: u32, salt: CacheSalt) -> SequenceSpec {
        let mut first = prompt(seed, FIRST.0, FIRST.1);
        first.cache_salt = salt;
        let holder = self.holder.id.clone();
        self.turn(&holder, &first, None).await;
        let mut next = prompt(seed + 1, 30, 12);
        let mut tokens = first.tokens.0.clone();
        tokens.extend(undisturbed(&first));
        tokens.extend(&next.tokens.0);
        next.prompt_tokens = tokens.len() as u32;
        next.tokens = tokens.into();
        next.cache_salt = salt;
        next
    }

    fn source(&self, tokens: usize) -> Option<PrefixSource> {
        Some(PrefixSource {
            worker: self.holder.id.clone(),
            incarnation: self.life,
            tokens: tokens as u32,
        })
    }

    fn ask(&self, sequence: &SequenceSpec, lease_ms: u32) -> LeaseAsk {
        LeaseAsk {
            v: PROTOCOL_VERSION,
            request: new_request(),
            api_server: self.api.id.clone(),
            api_incarnation: Some(self.api.incarnation),
            from: WorkerId::new("by-hand").unwrap(),
            incarnation: self.life,
            model: ModelFingerprint::new("a".repeat(64)).unwrap(),
            tokens: sequence.tokens.clone(),
            cache_salt: sequence.cache_salt,
            lease_ms,
        }
    }

    async fn lease(&self, ask: &LeaseAsk) -> LeaseReply {
        let subject = self.api.cluster.lease(&self.holder.id);
        self.api.request(subject, ask).await
    }

    async fn leased(&self, ask: &LeaseAsk) -> KvHandle {
        match self.lease(ask).await {
            LeaseReply::Leased { handle, .. } => *handle,
            other => panic!("not leased: {other:?}"),
        }
    }

    async fn stop(mut self) {
        self.api.until_empty(&self.holder.id).await;
        self.api.until_empty(&self.other.id).await;
        self.holder.stop().await;
        self.other.stop().await;
    }
}

fn blocks(tokens: usize) -> usize {
    tokens / BLOCK_TOKENS * BLOCK_TOKENS
}

fn pulled(handle: &KvHandle) -> PrefixPull {
    handle.prefix_pull.expect("a source was named")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_beginning_is_pulled_and_the_text_is_the_same() {
    let mut pair = Pair::new().await;
    let next = pair.first_turn(1, CacheSalt(7)).await;
    // The KV of all but the last token that was generated is there.
    let held = blocks(FIRST.0 + FIRST.1 as usize - 1);
    let other = pair.other.id.clone();
    let handle = pair.turn(&other, &next, pair.source(held)).await;
    assert_eq!(handle.cached_tokens as usize, held);
    let pull = pulled(&handle);
    assert_eq!(
        (pull.failure, pull.tokens as usize, pull.bytes as usize),
        (None, held, held / BLOCK_TOKENS * handle.kv.block_bytes())
    );
    // What it has now need not be pulled again.
    let handle = pair.turn(&other, &next, pair.source(held)).await;
    assert_eq!(handle.prefix_pull, None);
    assert_eq!(
        handle.cached_tokens as usize,
        blocks(next.tokens.0.len() - 1)
    );
    // Both lease what they have: the holder pulls what it lacks, and no more.
    let mut last = next.clone();
    last.tokens.0.extend(undisturbed(&next));
    last.tokens.0.push(11);
    last.prompt_tokens = last.tokens.0.len() as u32;
    let life = pair.api.until(&other, "at all", |_| true).await.incarnation;
    let source = PrefixSource {
        worker: other,
        incarnation: life,
        tokens: u32::MAX,
    };
    let holder = pair.holder.id.clone();
    pair.api.until_ready(&holder, &source.worker).await;
    let handle = pair.turn(&holder, &last, Some(source)).await;
    let pull = pulled(&handle);
    let all = blocks(next.tokens.0.len() + 12 - 1);
    // It computes in no time: the bus may have taken longer than that.
    if pull.failure != Some(PrefixPullFailure::Late) {
        assert_eq!((pull.failure, pull.tokens as usize), (None, all - held));
        assert_eq!(handle.cached_tokens as usize, all);
    }
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_salt_gets_nothing_and_other_tokens_no_more_than_they_share() {
    let mut pair = Pair::new().await;
    let next = pair.first_turn(3, CacheSalt(7)).await;
    let other = pair.other.id.clone();
    let mut foreign = next.clone();
    foreign.cache_salt = CacheSalt(8);
    let handle = pair.turn(&other, &foreign, pair.source(200)).await;
    let pull = pulled(&handle);
    assert_eq!(pull.failure, Some(PrefixPullFailure::Absent), "{pull:?}");
    assert_eq!((pull.tokens, handle.cached_tokens), (0, 0));
    // In the middle another token: what comes after it is another text's.
    let mut differs = next.clone();
    differs.tokens.0[100] ^= 1;
    let handle = pair.turn(&other, &differs, pair.source(200)).await;
    assert_eq!(handle.cached_tokens as usize, blocks(100));
    assert_eq!(pulled(&handle).tokens as usize, blocks(100));
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_is_gone_or_unknown_costs_nothing_but_the_pull() {
    let mut pair = Pair::new().await;
    let next = pair.first_turn(5, CacheSalt::NONE).await;
    let other = pair.other.id.clone();
    let of_another_life = PrefixSource {
        incarnation: Incarnation(pair.life.0 ^ 1),
        ..pair.source(200).unwrap()
    };
    let unknown = PrefixSource {
        worker: WorkerId::new("nobody").unwrap(),
        ..of_another_life.clone()
    };
    for (seed, source) in [(0, of_another_life), (1, unknown)] {
        let mut sequence = next.clone();
        sequence.cache_salt = CacheSalt(seed + 1);
        let handle = pair.turn(&other, &sequence, Some(source)).await;
        let pull = pulled(&handle);
        assert_eq!(pull.failure, Some(PrefixPullFailure::Unreachable));
        assert_eq!(handle.cached_tokens, 0);
    }
    // One that leaves leases nothing any more. It stays until what it has leased is released.
    let lent = pair.leased(&pair.ask(&next, 20_000)).await;
    pair.holder.signal();
    let holder = pair.holder.id.clone();
    let state = |beat: &baton_protocol::Beat| beat.state == baton_protocol::WorkerState::Draining;
    pair.api.until(&holder, "that it leaves", state).await;
    let handle = pair.turn(&other, &next, pair.source(200)).await;
    let pull = pulled(&handle);
    assert_eq!(pull.failure, Some(PrefixPullFailure::Refused), "{pull:?}");
    assert!(pair.api.release(&lent, |_| {}).await);
    pair.holder.left().await.unwrap();
    pair.other.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_without_a_prompt_is_released_once_or_ends_by_itself() {
    let mut pair = Pair::new().await;
    let next = pair.first_turn(9, CacheSalt(7)).await;
    let held = blocks(FIRST.0 + FIRST.1 as usize - 1);
    let holder = pair.holder.id.clone();

    let handle = pair.leased(&pair.ask(&next, 20_000)).await;
    assert_eq!(
        (handle.valid_tokens as usize, handle.first_token),
        (held, None)
    );
    let named: u32 = handle.runs.iter().map(|run| run.count).sum();
    assert_eq!(named as usize, held / BLOCK_TOKENS);
    // Two may read the same.
    let second = pair.leased(&pair.ask(&next, 20_000)).await;
    assert_eq!(second.runs, handle.runs);
    assert_ne!((second.handle, second.nonce), (handle.handle, handle.nonce));
    let used = |beat: &baton_protocol::Beat| beat.load.blocks_used == named;
    pair.api.until(&holder, "that it is held", used).await;
    let forged = |release: &mut baton_protocol::Release| release.nonce.0 ^= 1;
    assert!(!pair.api.release(&handle, forged).await);
    assert!(pair.api.release(&handle, |_| {}).await);
    assert!(!pair.api.release(&handle, |_| {}).await, "once");
    pair.api.until(&holder, "that it is held", used).await;
    // Whatever ends its request there ends it too.
    let ask = pair.ask(&next, 20_000);
    let aborted = pair.leased(&ask).await;
    pair.api.abort(&holder, ask.request).await;
    assert!(!pair.api.release(&aborted, |_| {}).await);
    assert!(pair.api.release(&second, |_| {}).await);
    pair.api.until_empty(&holder).await;

    let short = pair.leased(&pair.ask(&next, 1)).await;
    pair.api.until_empty(&holder).await;
    assert!(!pair.api.release(&short, |_| {}).await);

    // That of an API server that is gone ends with it.
    let gone = Api::new(&pair.house, "gone").await;
    gone.beat().await;
    let mut ask = pair.ask(&next, 20_000);
    (ask.api_server, ask.api_incarnation) = (gone.id.clone(), Some(gone.incarnation));
    let orphan = pair.leased(&ask).await;
    gone.heart.abort();
    pair.api.until_empty(&holder).await;
    assert!(!pair.api.release(&orphan, |_| {}).await);

    let refused = |change: fn(&mut LeaseAsk)| {
        let mut ask = pair.ask(&next, 20_000);
        change(&mut ask);
        let lease = pair.api.cluster.lease(&pair.holder.id);
        let api = &pair.api;
        async move { api.request::<_, LeaseReply>(lease, &ask).await }
    };
    let other_life = refused(|ask| ask.incarnation.0 ^= 1).await;
    assert!(
        matches!(
            &other_life,
            LeaseReply::Refused {
                refusal: Refusal::Unreachable { .. },
                ..
            }
        ),
        "{other_life:?}"
    );
    let other_model =
        refused(|ask| ask.model = ModelFingerprint::new("b".repeat(64)).unwrap()).await;
    assert!(
        matches!(
            &other_model,
            LeaseReply::Refused {
                refusal: Refusal::WrongModel { .. },
                ..
            }
        ),
        "{other_model:?}"
    );
    let nothing: [fn(&mut LeaseAsk); 3] = [
        |ask| ask.cache_salt = CacheSalt(8),
        |ask| ask.tokens.0[0] ^= 1,
        |ask| ask.tokens.0.truncate(BLOCK_TOKENS - 1),
    ];
    for change in nothing {
        let absent = refused(change).await;
        assert!(matches!(absent, LeaseReply::Absent { .. }), "{absent:?}");
    }
    pair.stop().await;
}

/// A source played by hand: it has the holder's arena, and says of releases what it likes.
struct Played {
    id: WorkerId,
    life: Incarnation,
    tasks: Vec<JoinHandle<()>>,
}

impl Played {
    async fn new(pair: &mut Pair, valid: bool, alter: fn(&mut KvHandle)) -> Self {
        let (id, life) = (WorkerId::new("played").unwrap(), Incarnation(77));
        let (client, cluster) = (pair.api.client.clone(), pair.api.cluster.clone());
        let holder = pair.holder.id.clone();
        let described = client.request(cluster.describe(&holder), "".into()).await;
        let mut description: WorkerDescriptor = decode(&described.unwrap().payload).unwrap();
        (description.worker, description.incarnation) = (id.clone(), life);
        let mut beat = pair.api.until(&holder, "at all", |_| true).await;
        (beat.worker, beat.incarnation) = (id.clone(), life);
        beat.peers.clear();
        let mut heard = client.subscribe(cluster.inbox(&id)).await.unwrap();
        baton_tests::settled(&client).await;
        let (speaker, subject) = (client.clone(), cluster.beat(&id));
        let heart = tokio::spawn(async move {
            loop {
                let beat = encode(&beat).unwrap();
                speaker.publish(subject.clone(), beat.into()).await.unwrap();
                tokio::time::sleep(std::time::Duration::from_millis(300)).await;
            }
        });
        let (of, own, real) = (cluster.clone(), id.clone(), pair.life);
        let answers = tokio::spawn(async move {
            while let Some(message) = heard.next().await {
                let Some(reply) = message.reply else { continue };
                let subject = message.subject.as_str();
                let answer = if subject == of.describe(&own) {
                    encode(&description).unwrap()
                } else if subject == of.lease(&own) {
                    let mut ask: LeaseAsk = decode(&message.payload).unwrap();
                    ask.incarnation = real;
                    let ask = encode(&ask).unwrap().into();
                    let lent = client.request(of.lease(&holder), ask).await.unwrap();
                    let mut lent: LeaseReply = decode(&lent.payload).unwrap();
                    if let LeaseReply::Leased { handle, .. } = &mut lent {
                        (handle.worker, handle.incarnation) = (own.clone(), life);
                        alter(handle);
                    }
                    encode(&lent).unwrap()
                } else {
                    let v = PROTOCOL_VERSION;
                    let handover_seconds = None;
                    encode(&Released {
                        v,
                        valid,
                        handover_seconds,
                    })
                    .unwrap()
                };
                client.publish(reply, answer.into()).await.unwrap();
            }
        });
        let other = pair.other.id.clone();
        pair.api.until_ready(&other, &id).await;
        let tasks = vec![heart, answers];
        Self { id, life, tasks }
    }
}

/// What was read counts only if it was leased all the time, and what is leased only if it is what was asked for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_read_without_a_lease_is_thrown_away() {
    use PrefixPullFailure::{Failed, Invalid};
    type Case = (bool, fn(&mut KvHandle), Option<PrefixPullFailure>);
    let cases: [Case; 6] = [
        (true, |_| {}, None),
        (false, |_| {}, Some(Invalid)),
        (true, |handle| handle.valid_tokens += 8, Some(Failed)),
        (true, |handle| handle.valid_tokens -= 1, Some(Failed)),
        (true, |handle| handle.kv.block_tokens *= 2, Some(Failed)),
        (true, |handle| handle.incarnation.0 += 1, Some(Failed)),
    ];
    for (valid, alter, failure) in cases {
        let mut pair = Pair::new().await;
        let next = pair.first_turn(11, CacheSalt(7)).await;
        let held = blocks(FIRST.0 + FIRST.1 as usize - 1);
        let played = Played::new(&mut pair, valid, alter).await;
        let source = PrefixSource {
            worker: played.id.clone(),
            incarnation: played.life,
            tokens: held as u32,
        };
        let other = pair.other.id.clone();
        let handle = pair.turn(&other, &next, Some(source)).await;
        let pull = pulled(&handle);
        assert_eq!(pull.failure, failure, "{pull:?}");
        let expected = if failure.is_none() { held } else { 0 };
        assert_eq!(pull.tokens as usize, expected);
        assert_eq!(handle.cached_tokens as usize, expected);
        played.tasks.iter().for_each(JoinHandle::abort);
        pair.stop().await;
    }
}
