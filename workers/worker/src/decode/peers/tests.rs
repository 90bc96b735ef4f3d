use baton_engine::fake_geometry;
use baton_protocol::{Capacity, KvShares, Load, ModelFingerprint, PROTOCOL_VERSION, Role};

use super::*;

fn name(text: &str) -> WorkerId {
    WorkerId::new(text).unwrap()
}

fn kv() -> KvGeometry {
    fake_geometry(32, 1, 1)
}

fn model(digit: &str) -> ModelInfo {
    ModelInfo {
        name: "m".into(),
        fingerprint: ModelFingerprint::new(digit.repeat(64)).unwrap(),
        tokens_max: 8,
        vocab: 8,
    }
}

fn peers() -> Peers {
    Peers::new(name("me"), model("a"), kv())
}

fn beat(worker: &str, incarnation: u64) -> Beat {
    Beat {
        v: PROTOCOL_VERSION,
        worker: name(worker),
        incarnation: Incarnation(incarnation),
        role: Role::Context,
        state: WorkerState::Serving,
        reason: None,
        model: model("a"),
        kv: kv(),
        device: String::new(),
        ranks: Some(1),
        weights: String::new(),
        load: Load::default(),
        capacity: Capacity::default(),
        peers: Vec::new(),
        changes: None,
        transport: String::new(),
        decode_ms: 0,
        cost: None,
        cost_error: None,
        itl_ms: None,
        step_tokens: None,
        prefix_version: None,
        streams: false,
        leases_prefixes: false,
    }
}

fn connect(worker: &str, incarnation: u64) -> Action {
    Action::Connect {
        worker: name(worker),
        incarnation: Incarnation(incarnation),
    }
}

fn disconnect(incarnation: u64) -> Action {
    Action::Disconnect {
        incarnation: Incarnation(incarnation),
    }
}

fn link() -> LinkInfo {
    let whole = KvShares::whole(&kv());
    let map = BlockMap::new(&kv(), &whole, &whole).unwrap();
    LinkInfo {
        transport: "tcp".into(),
        gigabytes_per_second: 1.5,
        map: Arc::new(map),
    }
}

#[test]
fn a_connection_that_broke_while_nobody_pulled_is_made_anew() {
    let (mut peers, now) = (peers(), Instant::now());
    for (worker, incarnation) in [("broken", 1), ("whole", 2), ("connecting", 3)] {
        peers.heard(now, &beat(worker, incarnation));
    }
    for (worker, incarnation) in [("broken", 1), ("whole", 2)] {
        peers.connected(&name(worker), Incarnation(incarnation), link());
    }
    peers.look(now, |incarnation| incarnation == Incarnation(2));
    assert!(peers.ready(&name("broken"), Incarnation(1)).is_err());
    assert!(peers.ready(&name("whole"), Incarnation(2)).is_ok());
    let again = peers.tick(now + RETRY_MIN);
    assert_eq!(again, [connect("broken", 1)]);
}

#[test]
fn each_incarnation_is_connected_once() {
    let (mut peers, now) = (peers(), Instant::now());
    assert_eq!(peers.heard(now, &beat("ctx", 1)), [connect("ctx", 1)]);
    assert_eq!(peers.heard(now, &beat("ctx", 1)), []);
    assert!(
        peers.ready(&name("ctx"), Incarnation(1)).is_err(),
        "not connected yet"
    );
    assert_eq!(peers.connected(&name("ctx"), Incarnation(1), link()), None);
    assert!(peers.ready(&name("ctx"), Incarnation(1)).is_ok());
    assert_eq!(peers.health()[0].gigabytes_per_second, 1.5);

    assert_eq!(
        peers.heard(now, &beat("ctx", 2)),
        [disconnect(1), connect("ctx", 2)]
    );
    assert!(
        peers.ready(&name("ctx"), Incarnation(1)).is_err(),
        "the old life's KV is gone"
    );
    assert!(
        peers.ready(&name("ctx"), Incarnation(2)).is_err(),
        "not connected yet"
    );
    assert_eq!(
        peers.connected(&name("ctx"), Incarnation(1), link()),
        Some(disconnect(1)),
        "too late"
    );
}

#[test]
fn nobody_is_read_in_anothers_stead() {
    let (mut peers, now) = (peers(), Instant::now());
    peers.heard(now, &beat("ctx", 7));
    peers.connected(&name("ctx"), Incarnation(7), link());
    assert_eq!(peers.heard(now, &beat("thief", 7)), []);
    let error = peers.ready(&name("thief"), Incarnation(7)).unwrap_err();
    assert!(error.contains("the incarnation of ctx"), "{error}");
    assert_eq!(peers.heard(now, &beat("other", 8)), [connect("other", 8)]);
    assert_eq!(peers.heard(now, &beat("other", 7)), [disconnect(8)]);
    let failed = Beat {
        state: WorkerState::Failed,
        ..beat("thief", 7)
    };
    assert_eq!(peers.heard(now, &failed), [], "it closes nothing");
    assert!(peers.ready(&name("ctx"), Incarnation(7)).is_ok());
}

#[test]
fn only_useful_workers_are_peers() {
    let (mut peers, now) = (peers(), Instant::now());
    let decode = Beat {
        role: Role::Decode,
        ..beat("d", 1)
    };
    let mut other_model = beat("m", 1);
    other_model.model = ModelInfo {
        name: "another".into(),
        ..model("b")
    };
    for beat in [decode, other_model, beat("me", 1)] {
        assert_eq!(peers.heard(now, &beat), [], "{}", beat.worker);
    }
    assert_eq!(peers.health(), []);
    peers.heard(now, &beat("ctx", 1));
    let failed = Beat {
        state: WorkerState::Failed,
        ..beat("ctx", 1)
    };
    assert_eq!(peers.heard(now, &failed), [disconnect(1)]);
}

#[test]
fn workers_of_the_model_with_other_kv_are_shown_and_left_alone() {
    let (mut peers, now) = (peers(), Instant::now());
    let mut namesake = beat("namesake", 1);
    namesake.model = model("b");
    let other_kv = Beat {
        kv: fake_geometry(32, 1, 2),
        ..beat("other-kv", 1)
    };
    for beat in [&namesake, &other_kv] {
        assert_eq!(peers.heard(now, beat), []);
        assert_eq!(peers.heard(now, beat), []);
    }
    let expected = [
        (
            "namesake",
            "it serves another m (bbbbbbbbbbbb…, here aaaaaaaaaaaa…)",
        ),
        (
            "other-kv",
            "its KV is laid out otherwise: layers is 1 here and 2 there",
        ),
    ];
    for (health, (worker, error)) in peers.health().iter().zip(expected) {
        assert_eq!(
            (health.worker.as_str(), health.state),
            (worker, PeerState::Broken)
        );
        assert!(health.error.as_ref().unwrap().contains(error), "{health:?}");
        let refused = peers.ready(&name(worker), Incarnation(1)).unwrap_err();
        assert!(refused.contains(error), "{refused}");
    }
    assert_eq!(peers.next_retry(), None);
    assert_eq!(peers.tick(now), []);

    // Restarted with the right one it is a peer, and then again with a wrong one.
    assert_eq!(
        peers.heard(now, &beat("other-kv", 2)),
        [connect("other-kv", 2)]
    );
    let wrong_again = Beat {
        incarnation: Incarnation(3),
        ..other_kv
    };
    assert_eq!(peers.heard(now, &wrong_again), [disconnect(2)]);
    let gone = Duration::from_millis(GONE_AFTER_MS);
    assert_eq!(peers.tick(now + gone), [], "nothing was connected");
    assert_eq!(peers.health(), []);
}

#[test]
fn a_broken_peer_is_tried_again_with_growing_pauses() {
    let (mut peers, mut now) = (peers(), Instant::now());
    peers.heard(now, &beat("ctx", 1));
    let mut pauses = Vec::new();
    for _ in 0..8 {
        peers.pull_failed(
            now,
            &name("ctx"),
            Incarnation(1),
            "a pull on the old connection".into(),
        );
        peers.connect_failed(now, &name("ctx"), Incarnation(1), "no route".into());
        let retry = peers.next_retry().unwrap();
        peers.heard(retry, &beat("ctx", 1));
        assert_eq!(peers.tick(retry - Duration::from_millis(1)), []);
        assert_eq!(peers.tick(retry), [connect("ctx", 1)]);
        assert_eq!(peers.tick(retry), [], "one try at a time");
        pauses.push(retry.duration_since(now));
        now = retry;
    }
    assert_eq!(pauses[0], RETRY_MIN);
    assert!(
        pauses.is_sorted() && *pauses.last().unwrap() <= RETRY_MAX,
        "{pauses:?}"
    );
    assert!(peers.ready(&name("ctx"), Incarnation(1)).is_err());
    peers.connected(&name("ctx"), Incarnation(1), link());
    peers.pull_failed(now, &name("ctx"), Incarnation(1), "cut".into());
    peers.pull_failed(
        now,
        &name("ctx"),
        Incarnation(1),
        "another pull on it".into(),
    );
    assert_eq!(
        peers.next_retry().unwrap().duration_since(now),
        RETRY_MIN,
        "success resets the pause"
    );
}

#[test]
fn a_silent_peer_is_let_go() {
    let (mut peers, now) = (peers(), Instant::now());
    let gone = Duration::from_millis(GONE_AFTER_MS);
    peers.heard(now, &beat("ctx", 1));
    peers.connected(&name("ctx"), Incarnation(1), link());
    assert_eq!(peers.tick(now + gone - Duration::from_millis(1)), []);
    peers.excuse_silence(now + gone);
    assert_eq!(peers.tick(now + gone), [], "the bus was away");
    assert_eq!(peers.tick(now + gone + gone), [disconnect(1)]);
    assert!(peers.health().is_empty());
}
