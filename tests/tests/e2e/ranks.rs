//! Workers of several tensor-parallel ranks, and KV between workers of unequal sizes.

use std::process::Command;

use baton_tests::{
    Cluster, Network, PATIENCE, Setup, Trace, Turn, baton, divided_model_dir, model_dir,
};

use crate::same_text::{ask, assert_same, plain};

/// The model has nine heads, and three of keys and values: it runs on one rank or three. Its directory is whole or divided.
#[tokio::test]
async fn unequal_sizes_give_the_same_text() {
    let turn = Turn::take();
    let expected = {
        let cluster = Cluster::start(&turn, plain()).await;
        let answers = ask(&cluster).await;
        cluster.drained(PATIENCE).await;
        answers
    };
    let three = Some(3);
    let mut setups = vec![
        ("1 to 3", [1, 3], [None, three], None),
        ("3 to 1", [3, 1], [three, None], None),
        (
            "3 to 3 in a divided directory",
            [3, 3],
            [three, None],
            Some(divided_model_dir()),
        ),
    ]
    .into_iter()
    .map(|(how, ranks, tp_sizes, decode_model)| {
        let setup = Setup {
            step_tokens: 512,
            tp_sizes,
            decode_model,
            ..Setup::split(1, 1)
        };
        (how, ranks, setup)
    })
    .collect::<Vec<_>>();
    if let Some(network) = Network::new() {
        let setup = Setup {
            step_tokens: 512,
            tp_sizes: [three, None],
            network: Some(network),
            ..Setup::split(1, 1)
        };
        setups.push(("3 to 1 between two hosts", [3, 1], setup));
    }
    for (how, [context, decode], setup) in setups {
        let cluster = Cluster::start(&turn, setup).await;
        let from = cluster.tap.now();
        assert_same(how, &expected, &ask(&cluster).await);
        for trace in Trace::all(&cluster.tap, from).await.values() {
            assert!(trace.pulled[0] > 0, "nothing was pulled, {how}");
        }
        let workers = cluster.known_workers().await.expect("/cluster");
        // The directory decides where no size is given.
        assert_eq!(workers["context-0"]["ranks"], context, "{how}");
        assert_eq!(workers["decode-0"]["ranks"], decode, "{how}");
        cluster.drained(PATIENCE).await;
    }
}

/// What cannot be shared out is said in one sentence, before anything is loaded.
#[test]
fn a_size_that_does_not_fit_is_refused_at_the_start() {
    let told = |model: &std::path::Path, args: &[&str]| {
        let output = Command::new(baton())
            .args(["worker", "--role", "both", "--model"])
            .arg(model)
            .args(args)
            .output()
            .expect("the binary was built");
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let two = told(model_dir(), &["--tp-size", "2"]);
    assert!(
        two.contains("tensor-parallel size 2 does not divide the model's 9 query heads"),
        "{two}"
    );
    let other = told(divided_model_dir(), &["--tp-size", "1"]);
    assert!(
        other.contains("divided over 3 ranks, and the tensor-parallel size is 1"),
        "{other}"
    );
    let none = told(model_dir(), &["--tp-size", "0"]);
    assert!(none.contains("--tp-size"), "{none}");
}
