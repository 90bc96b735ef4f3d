//! Beats of workers and API servers that say anything, and whom the router picks by them.

use std::time::Duration;

use tokio::time::Instant;

use arbitrary::{Arbitrary, Unstructured};
use baton_api_server::fuzzing::{Constraints, Fleet, Membership, Outstanding, Target};
use baton_protocol::{
    ApiBeat, ApiServerId, Beat, Capacity, CostPoint, HandleId, Incarnation, KvHandle, Load,
    ModelInfo, Nonce, PROTOCOL_VERSION, PeerHealth, PeerState, PrefillTimings, Role, Service,
    StepCost, Tier, WorkerId, WorkerState,
};

use crate::fixture;

#[derive(Arbitrary, Debug)]
enum Happens {
    Beat(Beaten),
    ApiBeat(u8, u32),
    Later(u16),
    Begin(u8, u32, u32),
    End(u8, u32, u32),
    Remember(u8, Vec<u64>),
    Choose {
        prompt_tokens: u32,
        chain: Vec<u64>,
        refused: Vec<u8>,
        failed: Vec<u8>,
        is_batch: bool,
        itl_ms: Option<u32>,
    },
}

#[derive(Arbitrary, Debug)]
struct Beaten {
    worker: u8,
    incarnation: u8,
    role: u8,
    state: u8,
    other_model: bool,
    other_kv: bool,
    load: [u32; 8],
    capacity: [u32; 3],
    peers: Vec<(u8, u8, u8)>,
    cost: Option<[u16; 5]>,
    itl_ms: Option<u32>,
    step_tokens: Option<u32>,
}

/// Whoever is picked is there, serves, and can do what it is picked for.
pub fn fleet(data: &[u8]) {
    let Ok(happens) = Vec::<Happens>::arbitrary(&mut Unstructured::new(data)) else {
        return;
    };
    let begun = Instant::now();
    let mut now = begun;
    let mut fleet = Fleet::default();
    for happens in happens {
        match happens {
            Happens::Beat(beaten) => {
                fleet.beat(beat(beaten), now);
            }
            Happens::ApiBeat(name, in_flight) => {
                let api_server = ApiServerId::new(format!("api{name}")).expect("a name");
                fleet.api_beat(
                    ApiBeat {
                        v: PROTOCOL_VERSION,
                        api_server,
                        incarnation: None,
                        in_flight,
                        serving_ms: None,
                    },
                    now,
                );
            }
            Happens::Later(ms) => {
                now += Duration::from_millis(ms.into());
                fleet.sweep(now);
            }
            Happens::Begin(who, tokens, decodes) => fleet.begin(&name(who), job(tokens, decodes)),
            Happens::End(who, tokens, decodes) => fleet.end(&name(who), job(tokens, decodes)),
            Happens::Remember(who, chain) => fleet.remember(&name(who), &chain),
            Happens::Choose {
                prompt_tokens,
                chain,
                refused,
                failed,
                is_batch,
                itl_ms,
            } => {
                let tier = match is_batch {
                    true => Tier::Batch,
                    false => Tier::Interactive,
                };
                let [refused, failed] =
                    [refused, failed].map(|list| list.into_iter().map(name).collect::<Vec<_>>());
                let model = fixture::fingerprint();
                let rules = Constraints {
                    model: &model,
                    refused: &refused,
                    failed: &failed,
                    service: Service {
                        tier,
                        priority: 0,
                        itl_ms,
                    },
                    max_tokens: 1000,
                    now,
                };
                let _ =
                    fleet.decode_wait(&model, rules.service, now, (prompt_tokens as usize, 1000));
                let context = fleet.choose_context(rules, prompt_tokens as usize, &chain);
                let Some((context, source)) = context else {
                    continue;
                };
                if let Some(source) = &source {
                    assert!(source.pull_us.is_finite());
                    assert!((source.prefix.tokens as usize) < prompt_tokens as usize);
                    assert!(source.prefix.worker != context.worker);
                }
                assert!(serves(fleet.members(), &context, now).prefills());
                assert!(!refused.contains(&context.worker));
                let tokens = prompt_tokens as usize;
                let first =
                    fleet.first_token(&context.worker, tier, tokens, &chain, source.as_ref());
                if let Some(first) = first {
                    assert!(first.alone <= first.expected);
                }
                let handle = handle(&context);
                if let Some(decode) = fleet.choose_decode(rules, &handle, &chain) {
                    assert!(serves(fleet.members(), &decode, now).decodes());
                    assert!(
                        fleet
                            .members()
                            .worker(&decode.worker)
                            .is_some_and(|member| member.reaches(&context))
                    );
                }
                let _ = fleet.members().faults(&model, now);
            }
        }
    }
}

fn serves(members: &Membership, target: &Target, now: Instant) -> Role {
    let member = members.worker(&target.worker).expect("it is a member");
    assert_eq!(member.target(), *target);
    assert!(member.serves(&fixture::fingerprint(), now));
    member.beat.role
}

fn name(who: u8) -> WorkerId {
    WorkerId::new(format!("w{}", who % 8)).expect("a name")
}

fn job(tokens: u32, decodes: u32) -> Outstanding {
    Outstanding {
        prefills: 1,
        prefill_tokens: tokens as usize,
        staged: 1,
        decodes: decodes as usize,
        decode_tokens: decodes as usize * tokens as usize,
        batch_tokens: tokens as usize / 2,
        batch_prompts: 1,
        batch_decodes: decodes as usize / 2,
        pulls: decodes as usize / 3,
        pull_tokens: tokens as usize / 3,
    }
}

fn beat(beaten: Beaten) -> Beat {
    let [
        waiting,
        running,
        waiting_tokens,
        leased,
        pulling,
        blocks_used,
        blocks_cached,
        blocks_quarantined,
    ] = beaten.load;
    let [blocks, batch, queue] = beaten.capacity;
    let mut kv = fixture::kv();
    kv.groups[0].head_dim += u32::from(beaten.other_kv);
    let fingerprint = match beaten.other_model {
        true => baton_protocol::ModelFingerprint::new("cd".repeat(32)).expect("64 digits"),
        false => fixture::fingerprint(),
    };
    Beat {
        v: PROTOCOL_VERSION,
        worker: name(beaten.worker),
        incarnation: Incarnation(u64::from(beaten.incarnation % 2)),
        role: [Role::Context, Role::Decode, Role::Both][usize::from(beaten.role % 3)],
        state: [
            WorkerState::Serving,
            WorkerState::Serving,
            WorkerState::Draining,
            WorkerState::Failed,
        ][usize::from(beaten.state % 4)],
        model: ModelInfo {
            name: "m".to_owned(),
            fingerprint,
            tokens_max: u32::MAX,
            vocab: u32::MAX,
        },
        kv,
        device: String::new(),
        ranks: Some(1),
        weights: String::new(),
        load: Load {
            waiting,
            running,
            waiting_tokens,
            decoding: running,
            decoding_tokens: waiting_tokens.into(),
            batch_tokens: waiting_tokens / 2,
            batch_decoding: running / 2,
            leased,
            pulling,
            blocks_used,
            blocks_cached,
            blocks_quarantined,
            plans_refused: waiting / 3,
        },
        capacity: Capacity {
            blocks,
            batch,
            queue,
        },
        peers: beaten
            .peers
            .into_iter()
            .map(|(worker, incarnation, state)| PeerHealth {
                worker: name(worker),
                incarnation: Incarnation(u64::from(incarnation % 2)),
                state: [
                    PeerState::Ready,
                    PeerState::Ready,
                    PeerState::Connecting,
                    PeerState::Broken,
                ][usize::from(state % 4)],
                transport: String::new(),
                gigabytes_per_second: f32::NAN,
                pulled_gigabytes_per_second: None,
                pulled_bytes: 0,
                error: None,
            })
            .collect(),
        changes: None,
        transport: String::new(),
        decode_ms: waiting,
        cost: beaten.cost.map(cost),
        cost_error: None,
        itl_ms: beaten.itl_ms,
        step_tokens: beaten.step_tokens,
        prefix_version: None,
        streams: false,
        leases_prefixes: false,
        reason: None,
    }
}

fn cost([first, second, row, kv, pair]: [u16; 5]) -> StepCost {
    let point = |tokens, us: u16| CostPoint {
        tokens,
        us: us.into(),
    };
    StepCost {
        layers: vec![point(1, first), point(1024, second)],
        row_us: row.into(),
        kv_token_us: f32::from(kv) / 1e3,
        pair_us: f32::from(pair) / 1e6,
    }
}

fn handle(context: &Target) -> KvHandle {
    KvHandle {
        worker: context.worker.clone(),
        incarnation: context.incarnation,
        handle: HandleId(1),
        nonce: Nonce(1),
        model: fixture::fingerprint(),
        kv: fixture::kv(),
        runs: Vec::new(),
        valid_tokens: 1,
        lease_ms: 1,
        first_token: Some(1),
        first_logprobs: None,
        finish: None,
        cached_tokens: 0,
        timings: PrefillTimings::default(),
        prefix_pull: None,
    }
}
