//! A cluster whose processes may say and hear no more than `container/nats-permissions.conf` lets them.

use std::sync::{Arc, Mutex};

use async_nats::{Client, ConnectOptions, Event};
use baton_protocol::{Incarnation, PROTOCOL_VERSION, TokenFrame, WorkerId};
use baton_tests::{Cluster, Message, PATIENCE, Setup, Turn, eventually};

/// The example, for this cluster, with users' names for passwords; whoever gives no name may do all, as the tap does.
fn users() -> String {
    let example = include_str!("../../../container/nats-permissions.conf");
    let mut users = example.replace("baton.baton.", "baton.test.");
    for (variable, name) in [
        ("$BATON_API_0_PASSWORD", "api-0"),
        ("$BATON_CONTEXT_0_PASSWORD", "context-0"),
        ("$BATON_DECODE_0_PASSWORD", "decode-0"),
    ] {
        assert!(users.contains(variable));
        users = users.replace(variable, name);
    }
    let tap = "users: [\n{ user: tap, password: tap }";
    format!(
        "{}\nno_auth_user: tap\n",
        users.replacen("users: [", tap, 1)
    )
}

/// Joins the bus as a worker that was broken into, and collects what the server refuses it.
async fn intruder(cluster: &Cluster, user: &str) -> (Client, Arc<Mutex<Vec<String>>>) {
    let refused = Arc::new(Mutex::new(Vec::new()));
    let heard = Arc::clone(&refused);
    let client = ConnectOptions::new()
        .user_and_password(user.to_owned(), user.to_owned())
        .event_callback(move |event| {
            if let Event::ServerError(error) = event {
                heard.lock().unwrap().push(error.to_string());
            }
            std::future::ready(())
        })
        .connect(cluster.nats.uri())
        .await
        .expect("its account");
    (client, refused)
}

#[tokio::test]
async fn a_cluster_serves_within_its_permissions_and_nobody_speaks_for_another() {
    let turn = Turn::take();
    let setup = Setup {
        users: Some(users()),
        ..Setup::split(1, 1)
    };
    let cluster = Cluster::start(&turn, setup).await;
    cluster.tells_the_capital().await;

    let (client, refused) = intruder(&cluster, "decode-0").await;
    let from = cluster.tap.now();
    let forbidden = [
        "baton.test.beat.context-0",
        "baton.test.tokens.api-0.context-0",
        "baton.test.prefill.context-0",
        "baton.test.renew.context-0",
        "baton.test.peers.context-0",
        "baton.test.prefixes.context-0",
        "baton.test.prefix-pages.context-0",
        "baton.test.abort.context-0",
        "baton.test.drain.context-0",
        "baton.test.api-beat.api-0",
        "_INBOX.api-0.answer",
        // Nobody describes another worker's arena: the decode worker that asks believes what it reads.
        "_INBOX.context-0.answer",
    ];
    for subject in forbidden {
        let sent = client.publish(subject, "{}".into()).await;
        sent.expect("the client does not know what it may");
    }
    let eavesdropped = [
        "_INBOX.api-0.>",
        "baton.test.prefill.*",
        "baton.test.describe.context-0",
        "baton.test.describe.*",
        ">",
    ];
    for subject in eavesdropped {
        let listened = client.subscribe(subject).await;
        listened.expect("the client does not know what it may");
    }
    // In its own name it may speak, but not of being another.
    let frame = TokenFrame {
        v: PROTOCOL_VERSION,
        worker: WorkerId::new("context-0").expect("a name"),
        incarnation: Incarnation(1),
        items: Vec::new(),
        prompts: Vec::new(),
    };
    let frame = serde_json::to_vec(&frame).expect("a message");
    let sent = client.publish("baton.test.tokens.api-0.decode-0", frame.into());
    sent.await.expect("an open connection");
    client.flush().await.expect("an open connection");

    eventually("the server to refuse all of it", PATIENCE, async || {
        let refused = refused.lock().unwrap().join("\n").to_lowercase();
        let missing: Vec<&str> = forbidden
            .iter()
            .chain(&eavesdropped)
            .filter(|subject| !refused.contains(&format!("\"{}\"", subject.to_lowercase())))
            .copied()
            .collect();
        match missing.is_empty() {
            true => Ok(()),
            false => Err(format!("not refused: {missing:?} in {refused}")),
        }
    })
    .await;
    eventually("the API server to notice", PATIENCE, async || {
        let metrics = cluster.api.metrics().await;
        match metrics.sum("baton_bus_faults_total", &["kind=\"frame_forged\""]) {
            Some(1.0) => Ok(()),
            other => Err(format!("forged frames counted: {other:?}")),
        }
    })
    .await;
    cluster.tap.catch_up().await;
    let forged = |message: &Message| message.payload.as_ref() == b"{}";
    let passed = cluster.tap.heard(from, |message| {
        forged(message).then(|| message.subject.clone())
    });
    assert_eq!(passed, Vec::<String>::new());
}
