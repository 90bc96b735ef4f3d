//! The contract as bytes: one sample of every message, checked against the files under `messages/v2`,
//! and what a receiver does with messages it should not trust.

use std::fmt::Debug;
use std::path::PathBuf;
use std::sync::Arc;

use baton_protocol::*;
use proptest::prelude::*;

const API_LIFE: Incarnation = Incarnation(0x0f1e_2d3c_4b5a_6978);

fn fingerprint() -> ModelFingerprint {
    ModelFingerprint::new("5f".repeat(32)).expect("64 digits")
}

fn worker(name: &str) -> WorkerId {
    WorkerId::new(name).expect("a plain name")
}

fn api_server() -> ApiServerId {
    ApiServerId::new("api-0").expect("a plain name")
}

fn kv() -> KvGeometry {
    let group = KvGroup {
        layers: 30,
        kv_heads: 3,
        head_dim: 64,
    };
    KvGeometry::bf16(32, vec![group])
}

fn model() -> ModelInfo {
    ModelInfo {
        name: "smollm2-135m-instruct".to_owned(),
        fingerprint: fingerprint(),
        tokens_max: 8192,
        vocab: 49152,
    }
}

fn sequence() -> SequenceSpec {
    SequenceSpec {
        tokens: PackedTokens(vec![504, 3575, 282, 4649, 314]),
        prompt_tokens: 5,
        generation: Generation {
            sampling: Sampling {
                temperature: 0.5,
                seed: 7,
                logprobs: Some(1),
                ..Sampling::default()
            },
            stop_token_ids: vec![2],
            min_tokens: 0,
            max_tokens: 64,
            grammar: Some(Grammar::JsonSchema(r#"{"type":"object"}"#.to_owned())),
            token_rules: Some(Arc::new(TokenRules {
                allowed: Some(PackedTokens(vec![2, 504, 7042])),
                bad_words: vec![PackedTokens(vec![504, 7042])],
            })),
        },
        cache_salt: CacheSalt(0x5a17),
        service: Service {
            tier: Tier::Interactive,
            priority: 1,
            itl_ms: Some(20),
        },
    }
}

fn logprobs() -> TokenLogprobs {
    TokenLogprobs {
        logprob: -0.25,
        top: vec![TopLogprob(7042, -0.25)],
    }
}

fn handle() -> KvHandle {
    KvHandle {
        worker: worker("context-0"),
        incarnation: Incarnation(0x1122_3344_5566_7788),
        handle: HandleId(9),
        nonce: Nonce(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef),
        model: fingerprint(),
        kv: kv(),
        runs: vec![BlockRun {
            first: 17,
            count: 1,
        }],
        valid_tokens: 5,
        lease_ms: 30_000,
        first_token: Some(7042),
        first_logprobs: Some(logprobs()),
        finish: None,
        cached_tokens: 0,
        timings: PrefillTimings {
            queue_ms: 0.5,
            compute_ms: 12.5,
        },
        prefix_pull: Some(PrefixPull {
            tokens: 64,
            bytes: 1_474_560,
            seconds: 0.002,
            failure: None,
        }),
    }
}

const REQUEST: RequestId = RequestId(0xfeed_face_cafe_beef_0011_2233_4455_6677);
const V: u16 = PROTOCOL_VERSION;

fn beat() -> Beat {
    Beat {
        v: V,
        worker: worker("decode-0"),
        incarnation: Incarnation(0x99aa_bbcc_ddee_ff00),
        role: Role::Decode,
        state: WorkerState::Serving,
        reason: None,
        model: model(),
        kv: kv(),
        device: "cpu avx512-bf16, 3 ranks".to_owned(),
        ranks: Some(3),
        weights: "bf16".to_owned(),
        load: Load {
            running: 3,
            decoding: 3,
            decoding_tokens: 371,
            batch_decoding: 1,
            blocks_used: 12,
            ..Load::default()
        },
        capacity: Capacity {
            blocks: 1456,
            batch: 64,
            queue: 256,
        },
        peers: vec![PeerHealth {
            worker: worker("context-0"),
            incarnation: Incarnation(0x1122_3344_5566_7788),
            state: PeerState::Ready,
            transport: "posix".to_owned(),
            gigabytes_per_second: 4.5,
            pulled_gigabytes_per_second: Some(5.25),
            pulled_bytes: 46_137_344,
            error: None,
        }],
        changes: None,
        transport: "ucx 1.13.1".to_owned(),
        decode_ms: 6_400,
        cost_error: Some(0.06),
        cost: Some(StepCost {
            layers: [(1, 5_200.0), (64, 21_500.0), (512, 148_000.0)]
                .map(|(tokens, us)| CostPoint { tokens, us })
                .to_vec(),
            row_us: 310.0,
            kv_token_us: 0.75,
            pair_us: 0.04,
        }),
        itl_ms: Some(50),
        step_tokens: Some(512),
        prefix_version: Some(57),
        streams: true,
        leases_prefixes: true,
    }
}

fn beat_of_changes() -> Beat {
    Beat {
        changes: Some(PeerChanges {
            since: 41,
            version: 42,
            gone: vec![worker("context-7")],
        }),
        ..beat()
    }
}

fn peers_reply() -> PeersReply {
    PeersReply {
        v: V,
        worker: worker("decode-0"),
        incarnation: Incarnation(0x99aa_bbcc_ddee_ff00),
        version: 42,
        peers: beat().peers,
    }
}

fn prefix_report() -> PrefixReport {
    let chain = prefix_chain(CacheSalt(0x5a17), 2, &[504, 3575, 282, 4649, 314]);
    PrefixReport {
        v: V,
        worker: worker("context-0"),
        incarnation: Incarnation(0x1122_3344_5566_7788),
        since: 56,
        version: 57,
        added: PackedLinks(chain),
        removed: PackedLinks(vec![7]),
        is_part: false,
    }
}

fn prefix_page() -> PrefixPage {
    PrefixPage {
        v: V,
        worker: worker("context-0"),
        incarnation: Incarnation(0x1122_3344_5566_7788),
        version: 57,
        links: prefix_report().added,
        next: Some(8_192),
        is_part: false,
    }
}

/// The sample equals the file, byte for byte after formatting, and the file reads back as the sample.
fn golden<M: Versioned + PartialEq + Debug>(file: &str, message: &M) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("messages/v2")
        .join(file);
    let compact = encode(message).expect("encodes");
    let value: serde_json::Value = serde_json::from_slice(&compact).expect("is JSON");
    let text = serde_json::to_string_pretty(&value).expect("formats") + "\n";
    if std::env::var_os("BATON_WRITE_MESSAGES").is_some() {
        std::fs::write(&path, &text).expect("writes");
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(
        text,
        written,
        "{} differs: a changed message needs a new PROTOCOL_VERSION, an added optional field only \
         BATON_WRITE_MESSAGES=1",
        path.display()
    );
    assert_eq!(&decode::<M>(written.as_bytes()).expect("decodes"), message);
    assert_eq!(&decode::<M>(&compact).expect("decodes"), message);

    // What a later release may add is not in the way.
    let mut later = value.clone();
    later["added_later"] = serde_json::json!({"x": [1, 2, 3]});
    assert_eq!(
        &decode::<M>(later.to_string().as_bytes()).expect("ignores"),
        message
    );

    // Another version is refused by its number, even if the rest would parse.
    let mut other = value;
    other["v"] = serde_json::json!(V + 1);
    assert_eq!(
        decode::<M>(other.to_string().as_bytes()).expect_err("is refused"),
        ProtocolError::Version {
            theirs: V + 1,
            ours: V
        }
    );
}

#[test]
fn every_message_is_as_its_file_says() {
    golden("beat.json", &beat());
    golden("beat_of_changes.json", &beat_of_changes());
    golden("peers_reply.json", &peers_reply());
    golden("prefix_report.json", &prefix_report());
    golden(
        "prefixes_ask.json",
        &PrefixesAsk {
            v: V,
            from: "api-0".to_owned(),
            block: 0,
        },
    );
    golden("prefix_page.json", &prefix_page());
    golden(
        "hello.json",
        &Hello {
            v: V,
            from: "api-0".to_owned(),
        },
    );
    golden(
        "api_beat.json",
        &ApiBeat {
            v: V,
            api_server: api_server(),
            incarnation: Some(API_LIFE),
            in_flight: 4,
            serving_ms: Some(90_000),
        },
    );
    golden(
        "worker_descriptor.json",
        &WorkerDescriptor {
            v: V,
            worker: worker("context-0"),
            incarnation: Incarnation(0x1122_3344_5566_7788),
            role: Role::Context,
            model: model(),
            kv: kv(),
            shares: KvShares::whole(&kv()),
            transfer: Some(TransferDescriptor {
                ucx: UcxVersion(1, 13, 1),
                address: Base64Bytes(vec![1, 2, 3]),
                ranks: vec![RankRegion {
                    rkey: Base64Bytes(vec![4, 5]),
                    base: 0x7f00_0000_0000,
                    bytes: 1 << 30,
                    memory: MemoryType::Host,
                }],
            }),
        },
    );
    golden(
        "prefill_job.json",
        &PrefillJob {
            v: V,
            request: REQUEST,
            api_server: api_server(),
            api_incarnation: Some(API_LIFE),
            budget_ms: 60_000,
            model: fingerprint(),
            sequence: sequence(),
            prompt_logprobs: None,
            stream: true,
            source: Some(PrefixSource {
                worker: worker("both-1"),
                incarnation: Incarnation(0x5566_7788_99aa_bbcc),
                tokens: 4,
            }),
            trace: TraceContext::parse(
                "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
                "vendor=opaque",
            ),
        },
    );
    golden(
        "prefill_reply_begun.json",
        &PrefillReply::Begun {
            v: V,
            handle: Box::new(KvHandle {
                first_token: None,
                first_logprobs: None,
                ..handle()
            }),
        },
    );
    golden(
        "prefill_reply_ready.json",
        &PrefillReply::Ready {
            v: V,
            handle: Box::new(handle()),
            prompt_logprobs: Some(vec![logprobs()]),
        },
    );
    golden(
        "prefill_reply_refused.json",
        &PrefillReply::Refused {
            v: V,
            refusal: Refusal::Busy {
                retry_after_ms: 250,
            },
        },
    );
    golden(
        "prefill_reply_failed.json",
        &PrefillReply::Failed {
            v: V,
            failure: Failure::new(
                FailureCode::Deadline,
                "the budget ran out in the queue of context-0",
            ),
        },
    );
    golden(
        "lease_ask.json",
        &LeaseAsk {
            v: V,
            request: REQUEST,
            api_server: api_server(),
            api_incarnation: Some(API_LIFE),
            from: worker("both-0"),
            incarnation: Incarnation(0x5566_7788_99aa_bbcc),
            model: fingerprint(),
            tokens: PackedTokens(vec![504, 3575, 282, 4649]),
            cache_salt: CacheSalt(0x5a17),
            lease_ms: 150,
        },
    );
    golden(
        "lease_reply_leased.json",
        &LeaseReply::Leased {
            v: V,
            handle: Box::new(KvHandle {
                first_token: None,
                first_logprobs: None,
                cached_tokens: 0,
                timings: PrefillTimings::default(),
                prefix_pull: None,
                ..handle()
            }),
        },
    );
    golden("lease_reply_absent.json", &LeaseReply::Absent { v: V });
    golden(
        "lease_reply_refused.json",
        &LeaseReply::Refused {
            v: V,
            refusal: Refusal::Draining,
        },
    );
    golden(
        "decode_job.json",
        &DecodeJob {
            v: V,
            request: REQUEST,
            api_server: api_server(),
            api_incarnation: Some(API_LIFE),
            attempt: 0,
            budget_ms: 59_000,
            sequence: sequence(),
            handle: handle(),
            trace: TraceContext::parse(
                "00-4bf92f3577b34da6a3ce929d0e0e4736-b7ad6b7169203331-01",
                "vendor=opaque",
            ),
        },
    );
    golden(
        "decode_reply_admitted.json",
        &DecodeReply::Admitted {
            v: V,
            incarnation: Incarnation(0x99aa_bbcc_ddee_ff00),
        },
    );
    golden(
        "decode_reply_refused.json",
        &DecodeReply::Refused {
            v: V,
            refusal: Refusal::Unreachable {
                detail: "context-1 is not connected yet".to_owned(),
            },
        },
    );
    golden(
        "abort.json",
        &Abort {
            v: V,
            request: REQUEST,
            reason: "client left".to_owned(),
        },
    );
    golden(
        "drain.json",
        &Drain {
            v: V,
            incarnation: Incarnation(0x1122_3344_5566_7788),
            from: "api-0".to_owned(),
        },
    );
    golden(
        "draining.json",
        &Draining {
            v: V,
            draining: true,
        },
    );
    golden(
        "release.json",
        &Release {
            v: V,
            request: REQUEST,
            incarnation: Incarnation(0x1122_3344_5566_7788),
            handle: HandleId(9),
            nonce: Nonce(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef),
            decode_worker: worker("decode-0"),
        },
    );
    golden(
        "released.json",
        &Released {
            v: V,
            valid: true,
            handover_seconds: Some(0.0025),
        },
    );
    golden(
        "progress.json",
        &Progress {
            v: V,
            request: REQUEST,
            incarnation: Incarnation(0x1122_3344_5566_7788),
            handle: HandleId(9),
            nonce: Nonce(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef),
            have_tokens: 2_048,
        },
    );
    golden(
        "progress_reply_running.json",
        &ProgressReply::Running {
            v: V,
            tokens: 4_096,
        },
    );
    golden(
        "progress_reply_done.json",
        &ProgressReply::Done {
            v: V,
            first_token: 7042,
            first_logprobs: Some(logprobs()),
            finish: None,
        },
    );
    golden(
        "progress_reply_failed.json",
        &ProgressReply::Failed {
            v: V,
            failure: Failure::new(
                FailureCode::HandleInvalid,
                "the prompt or its lease has ended on context-0",
            ),
        },
    );
    golden(
        "renew.json",
        &Renew {
            v: V,
            request: REQUEST,
            incarnation: Incarnation(0x1122_3344_5566_7788),
            handle: HandleId(9),
            nonce: Nonce(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef),
        },
    );
    golden("renewed.json", &Renewed { v: V, valid: true });
    golden(
        "token_frame.json",
        &TokenFrame {
            v: V,
            worker: worker("decode-0"),
            incarnation: Incarnation(0x99aa_bbcc_ddee_ff00),
            items: vec![
                FrameItem {
                    request: REQUEST,
                    attempt: 0,
                    index: 1,
                    tokens: PackedTokens(vec![30]),
                    logprobs: vec![logprobs()],
                    pulled: Some(PullReport {
                        bytes: 737_280,
                        seconds: 0.0005,
                        handover_seconds: Some(0.0025),
                        parts: Some(PullParts {
                            turn: 0.125,
                            progress: 0.0625,
                            read: 0.00025,
                            release: 0.000125,
                        }),
                    }),
                    end: None,
                },
                FrameItem {
                    request: RequestId(1),
                    attempt: 2,
                    index: 63,
                    tokens: PackedTokens(vec![2]),
                    logprobs: Vec::new(),
                    pulled: None,
                    end: Some(End::Finished(FinishReason::Stop)),
                },
                FrameItem {
                    request: RequestId(2),
                    attempt: 0,
                    index: 1,
                    tokens: PackedTokens::default(),
                    logprobs: Vec::new(),
                    pulled: None,
                    end: Some(End::Failed(Failure::new(
                        FailureCode::PullFailed,
                        "context-1 did not answer within 10000 ms",
                    ))),
                },
            ],
            prompts: vec![RequestId(3)],
        },
    );
}

#[test]
fn a_missing_or_wrong_version_is_told_apart_from_bad_json() {
    let version = decode::<Released>(b"{\"v\":9,\"something\":\"else\"}");
    assert_eq!(version, Err(ProtocolError::Version { theirs: 9, ours: V }));
    for bad in [
        "",
        "{}",
        "[]",
        "null",
        "{\"v\":2}",
        "{\"v\":\"1\",\"valid\":true}",
        "\u{feff}{}",
    ] {
        let error = decode::<Released>(bad.as_bytes()).expect_err("is refused");
        assert!(
            matches!(
                error,
                ProtocolError::Json {
                    what: "Released",
                    ..
                }
            ),
            "{bad}: {error}"
        );
    }
}

/// Within version 1 the API server's incarnation was added: who does not say it is understood, and who does not know it
/// reads the rest.
#[test]
fn an_api_server_of_old_says_no_incarnation() {
    let old = br#"{"v":2,"api_server":"api-0","in_flight":4}"#;
    let beat: ApiBeat = decode(old).expect("an old beat");
    assert_eq!((beat.incarnation, beat.in_flight), (None, 4));
    let again = encode(&beat).expect("encodes");
    assert_eq!(again, old, "a receiver of old reads nothing new");

    for file in ["prefill_job.json", "decode_job.json"] {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
            .join("messages/v2")
            .join(file);
        let text = std::fs::read_to_string(path).expect("a sample");
        let mut job: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        job.as_object_mut()
            .expect("an object")
            .remove("api_incarnation")
            .expect("was there");
        let job = job.to_string();
        let life = match file {
            "prefill_job.json" => {
                decode::<PrefillJob>(job.as_bytes()).map(|job| job.api_incarnation)
            }
            _ => decode::<DecodeJob>(job.as_bytes()).map(|job| job.api_incarnation),
        };
        assert_eq!(life, Ok(None), "{file}");
    }
}

/// A newer worker refuses for a reason of its own: the answer is a refusal all the same, and not unreadable.
#[test]
fn a_reason_of_a_later_release_is_a_refusal_for_an_unknown_reason() {
    let later = br#"{"outcome":"refused","v":2,"refusal":{"reason":"too_hot","celsius":[90,"C"]}}"#;
    let v = V;
    let refusal = Refusal::Unknown;
    assert_eq!(decode(later), Ok(PrefillReply::Refused { v, refusal }));
    let refusal = Refusal::Unknown;
    assert_eq!(decode(later), Ok(DecodeReply::Refused { v, refusal }));
    let known = br#"{"outcome":"refused","v":2,"refusal":{"reason":"busy","retry_after_ms":7}}"#;
    let refusal = Refusal::Busy { retry_after_ms: 7 };
    assert_eq!(decode(known), Ok(DecodeReply::Refused { v, refusal }));
}

/// Within version 1 these were added to beats: who does not say them is understood, and what is not said is not sent.
#[test]
fn beats_of_old_say_neither_pace_nor_ranks_nor_age() {
    let mut old = serde_json::to_value(beat()).expect("encodes");
    let fields = old.as_object_mut().expect("an object");
    for added in ["decode_ms", "ranks", "prefix_version"] {
        fields.remove(added).expect("was there");
    }
    let beat: Beat = decode(old.to_string().as_bytes()).expect("an old beat");
    assert_eq!((beat.decode_ms, beat.ranks), (0, None));
    assert_eq!(beat.prefix_version, None);
    assert_eq!(serde_json::to_value(&beat).expect("encodes"), old);
    let old = br#"{"v":2,"api_server":"api-0","in_flight":4}"#;
    let beat: ApiBeat = decode(old).expect("an old beat");
    assert!(!beat.stands_by());
    let newcomer = br#"{"v":2,"api_server":"api-0","in_flight":0,"serving_ms":0}"#;
    assert!(decode::<ApiBeat>(newcomer).expect("a beat").stands_by());
}

#[test]
fn what_is_wrong_with_a_long_message_is_a_short_sentence() {
    let name = "x".repeat(1 << 20);
    for message in [
        format!(r#"{{"v":2,"worker":"w","incarnation":"0000000000000001","items":"{name}"}}"#),
        format!(r#"{{"v":2,"worker":{name:?},"incarnation":"0000000000000001","items":[]}}"#),
        format!(
            r#"{{"v":2,"worker":"w","incarnation":"0000000000000001","items":[],"v":"{}"}}"#,
            "漢".repeat(1 << 18)
        ),
    ] {
        let error = decode::<TokenFrame>(message.as_bytes())
            .unwrap_err()
            .to_string();
        assert!(error.len() < 1_000, "{} bytes", error.len());
        assert!(error.contains("at line 1 column"), "{error}");
    }
}

#[test]
fn over_the_size_bound_nothing_is_parsed() {
    fn refused<M: Versioned + Debug>(bytes_max: usize) {
        let bytes = vec![b' '; bytes_max + 1];
        let error = decode::<M>(&bytes).expect_err("is refused");
        let expected = ProtocolError::TooLarge {
            what: M::NAME,
            bytes: bytes.len(),
            bytes_max,
        };
        assert_eq!(error, expected);
    }
    refused::<PrefillJob>(limits::MESSAGE_BYTES_MAX);
    refused::<Beat>(limits::BEAT_BYTES_MAX);
    refused::<Released>(limits::SMALL_BYTES_MAX);
    refused::<Abort>(limits::SMALL_BYTES_MAX);
}

#[test]
fn reports_and_pages_hold_no_more_than_their_bounds_and_the_largest_can_be_sent() {
    let links = |count| PackedLinks(vec![u64::MAX; count]);
    let report = |added, removed| PrefixReport {
        added: links(added),
        removed: links(removed),
        ..prefix_report()
    };
    let page = |count| PrefixPage {
        links: links(count),
        ..prefix_page()
    };
    let half = limits::PREFIX_CHANGES_MAX / 2;
    let largest = encode(&report(half, half)).expect("fits");
    assert!(decode::<PrefixReport>(&largest).is_ok());
    assert!(report(half, half + 1).check().is_err());
    let largest = encode(&page(limits::PREFIX_PAGE_MAX)).expect("fits");
    assert!(decode::<PrefixPage>(&largest).is_ok());
    assert!(page(limits::PREFIX_PAGE_MAX + 1).check().is_err());
    let same = PrefixReport {
        since: 57,
        ..prefix_report()
    };
    assert!(same.check().is_err(), "a report comes after another");
    let half_a_link =
        br#"{"v":2,"worker":"w","incarnation":"0000000000000001","version":1,"links":"AAAA"}"#;
    assert!(decode::<PrefixPage>(half_a_link).is_err());
}

/// Ways of a beat to hold more than receivers keep.
fn oversized_beats() -> Vec<Beat> {
    let long = || "x".repeat(limits::SENTENCE_BYTES_MAX + 1);
    let beat = beat();
    let peer = beat.peers[0].clone();
    let mut all: Vec<Beat> = Vec::new();
    let mut add = |change: &dyn Fn(&mut Beat)| {
        let mut changed = beat.clone();
        change(&mut changed);
        all.push(changed);
    };
    add(&|beat| beat.reason = Some(long()));
    add(&|beat| beat.device = long());
    add(&|beat| beat.weights = long());
    add(&|beat| beat.transport = long());
    add(&|beat| beat.peers[0].transport = long());
    add(&|beat| beat.peers[0].error = Some(long()));
    add(&|beat| beat.peers = vec![peer.clone(); limits::PEERS_TOLD_MAX + 1]);
    all
}

#[test]
fn a_beat_that_holds_more_than_receivers_keep_is_refused_with_a_short_sentence() {
    assert_eq!(beat().check(), Ok(()));
    for oversized in oversized_beats() {
        let bytes = encode(&oversized).expect("it is small enough for the bus");
        let error = decode::<Beat>(&bytes).expect_err("is refused").to_string();
        assert!(error.contains("are allowed"), "{error}");
        assert!(error.len() < 200, "{error}");
        let mended = oversized.within_bounds();
        let bytes = encode(&mended).expect("a beat");
        assert_eq!(decode::<Beat>(&bytes).expect("within its bounds"), mended);
    }
}

#[test]
fn the_largest_beat_within_its_bounds_fits_the_bus_and_peers_that_can_be_read_are_kept() {
    // Every sign of these takes six bytes in JSON.
    let worst = "\u{1}".repeat(2 * limits::SENTENCE_BYTES_MAX);
    let mut largest = beat();
    let mut peer = largest.peers[0].clone();
    (peer.transport, peer.error) = (worst.clone(), Some(worst.clone()));
    peer.state = PeerState::Broken;
    largest.reason = Some(worst.clone());
    largest.peers = vec![peer; 2 * limits::PEERS_TOLD_MAX];
    let last = largest.peers.last_mut().expect("there are some");
    last.state = PeerState::Ready;
    let largest = largest.within_bounds();
    assert_eq!(largest.check(), Ok(()));
    assert_eq!(largest.peers.len(), limits::PEERS_TOLD_MAX);
    assert_eq!(largest.peers[0].state, PeerState::Ready);
    let bytes = encode(&largest).expect("within the bound of a beat");
    assert!(bytes.len() <= limits::BEAT_BYTES_MAX);
    decode::<Beat>(&bytes).expect("and it is read");
}

#[test]
fn the_largest_list_of_peers_fits_the_bus_and_larger_ones_are_refused() {
    let worst = "\u{1}".repeat(2 * limits::SENTENCE_BYTES_MAX);
    let mut peer = beat().peers[0].clone();
    (peer.transport, peer.error) = (worst.clone(), Some(worst));
    peer.cut();
    let mut reply = peers_reply();
    reply.peers = vec![peer.clone(); limits::PEERS_MAX];
    let bytes = encode(&reply).expect("within the bound of a message");
    assert_eq!(decode::<PeersReply>(&bytes).expect("is read"), reply);
    reply.peers.push(peer);
    let bytes = encode(&reply).expect("within the bound of a message");
    let error = decode::<PeersReply>(&bytes).expect_err("one too many");
    assert!(error.to_string().contains("are allowed"), "{error}");
    reply.peers.truncate(1);
    reply.peers[0].transport = "x".repeat(limits::SENTENCE_BYTES_MAX + 1);
    let bytes = encode(&reply).expect("within the bound of a message");
    decode::<PeersReply>(&bytes).expect_err("too long a sentence");
}

#[test]
fn names_cannot_leave_their_subject() {
    for bad in ["", "a.b", "*", ">", "a b", "é", "a\n", &"x".repeat(65)] {
        assert!(WorkerId::new(bad).is_err(), "{bad:?}");
        assert!(subjects::Cluster::new(bad).is_err(), "{bad:?}");
        let beat = serde_json::json!({"v": 2, "api_server": bad, "in_flight": 0}).to_string();
        assert!(decode::<ApiBeat>(beat.as_bytes()).is_err(), "{bad:?}");
    }
    let cluster = subjects::Cluster::new("default").expect("a plain name");
    assert_eq!(
        cluster.prefill(&worker("context-0")),
        "baton.default.prefill.context-0"
    );
    assert_eq!(cluster.beats(), "baton.default.beat.*");
}

#[test]
fn a_sequence_says_what_is_wrong_with_it() {
    assert_eq!(sequence().check(), Ok(()));
    let mut none = sequence();
    none.prompt_tokens = 0;
    let mut more = sequence();
    more.prompt_tokens = 6;
    let mut done = sequence();
    done.prompt_tokens = 1;
    done.generation.max_tokens = 4;
    for bad in [none, more, done] {
        assert!(
            matches!(bad.check(), Err(Refusal::Malformed { .. })),
            "{bad:?}"
        );
    }
}

#[test]
fn geometries_name_their_difference() {
    let mut other = kv();
    assert_eq!(kv().difference(&other), None);
    other.block_tokens = 16;
    assert_eq!(
        kv().difference(&other).as_deref(),
        Some("tokens per block is 32 here and 16 there")
    );
    assert_eq!(kv().block_bytes(), 3 * 30 * 2 * 32 * 64 * 2);
}

#[test]
fn a_failure_of_a_newer_release_is_read() {
    let reply = |code: &str| {
        let text =
            format!(r#"{{"outcome":"failed","v":2,"failure":{{"code":"{code}","message":"m"}}}}"#);
        match decode::<PrefillReply>(text.as_bytes()) {
            Ok(PrefillReply::Failed { failure, .. }) => failure.code,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(reply("too_large"), FailureCode::TooLarge);
    assert_eq!(reply("from_the_future"), FailureCode::Unknown);
}

proptest! {
    /// What is refused by its estimated size is refused rightly: nothing that could be sent is larger than that.
    #[test]
    fn an_answer_with_log_probabilities_is_not_larger_than_its_bound(
        tokens in 1usize..40, top in 0u8..=20, vocab in 1u32..300_000,
        numbers in proptest::collection::vec(any::<f32>(), 1..60),
    ) {
        let mut numbers = numbers.into_iter().filter(|number| number.is_finite()).chain([-1.2345678e-5]).collect::<Vec<_>>().into_iter().cycle();
        let mut one = || {
            let mut next = || numbers.next().unwrap_or_default();
            TokenLogprobs { logprob: next(), top: (0..top).map(|_| TopLogprob(vocab - 1, next())).collect() }
        };
        let runs = (0..tokens.div_ceil(4)).map(|_| BlockRun { first: u32::MAX, count: 1 }).collect();
        let reply = PrefillReply::Ready {
            v: V,
            handle: Box::new(KvHandle {
                worker: worker(&"w".repeat(64)), runs, first_logprobs: Some(one()), ..handle()
            }),
            prompt_logprobs: Some((1..tokens).map(|_| one()).collect()),
        };
        let bytes = encode(&reply).expect("encodes").len();
        prop_assert!(bytes <= PrefillReply::bytes_max(tokens, top, vocab));
    }

    #[test]
    fn tokens_survive_packing(tokens in proptest::collection::vec(any::<u32>(), 0..200)) {
        let packed = PackedTokens(tokens);
        let text = serde_json::to_string(&packed).expect("encodes");
        prop_assert_eq!(serde_json::from_str::<PackedTokens>(&text).expect("decodes"), packed);
    }

    #[test]
    fn ids_survive_their_digits(request: u128, handle: u64) {
        let text = RequestId(request).to_string();
        prop_assert_eq!(text.len(), 32);
        prop_assert_eq!(text.parse::<RequestId>(), Ok(RequestId(request)));
        prop_assert_eq!(HandleId(handle).to_string().parse::<HandleId>(), Ok(HandleId(handle)));
    }

    #[test]
    fn hostile_bytes_are_an_error_not_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(decode::<DecodeJob>(&bytes).is_err());
        prop_assert!(decode::<TokenFrame>(&bytes).is_err());
    }

    #[test]
    fn a_damaged_message_is_an_error_or_another_message(at in 0usize..2000, with: u8) {
        let job = PrefillJob {
            v: V, request: REQUEST, api_server: api_server(), budget_ms: 1, api_incarnation: None, model: fingerprint(),
            sequence: sequence(), prompt_logprobs: Some(3), stream: false, source: None, trace: None,
        };
        let mut bytes = encode(&job).expect("encodes");
        let at = at % bytes.len();
        bytes[at] = with;
        let _ = decode::<PrefillJob>(&bytes);
        bytes.truncate(at);
        prop_assert!(decode::<PrefillJob>(&bytes).is_err());
    }
}
