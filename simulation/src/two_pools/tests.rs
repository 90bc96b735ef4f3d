//! That the model holds, and fails without any one of its rules.

use super::*;

const ALL: Faults = Faults {
    aborts: true,
    crashes: true,
    api_server_lost: true,
    prompts_fail: true,
};

/// Requests of `(prompt, output)` blocks, both pools no larger than the largest needs, or a little larger.
fn models(faults: Faults) -> Vec<Model> {
    let two = [
        vec![(1, 2), (1, 2)],
        vec![(2, 2), (1, 3)],
        vec![(1, 3), (1, 3)],
        vec![(3, 2)],
    ];
    let mut all = Vec::new();
    for requests in two {
        let largest = requests.iter().map(|(p, o)| p + o).max().unwrap_or(0);
        for (more_context, more_decode) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            all.push(Model {
                context_blocks: largest - 1 + more_context,
                decode_blocks: largest - 1 + more_decode,
                requests: requests.clone(),
                faults,
                rules: Rules::default(),
            });
        }
    }
    all
}

fn three(faults: Faults) -> Model {
    Model {
        context_blocks: 3,
        decode_blocks: 3,
        requests: vec![(1, 2), (1, 3), (2, 2)],
        faults,
        rules: Rules::default(),
    }
}

#[test]
fn two_requests_always_end_whatever_goes_wrong() {
    for model in models(ALL) {
        let explored = model
            .explore()
            .unwrap_or_else(|wrong| panic!("{model:?}: {wrong}"));
        let least = if model.requests.len() == 1 {
            100
        } else {
            1_000
        };
        assert!(explored.states > least, "{:?} {explored:?}", model.requests);
    }
}

#[test]
fn three_requests_always_end() {
    let faults = Faults {
        aborts: true,
        ..Faults::default()
    };
    for faults in [Faults::default(), faults] {
        let explored = three(faults)
            .explore()
            .unwrap_or_else(|wrong| panic!("{wrong}"));
        assert!(explored.states > 10_000, "{explored:?}");
    }
}

/// Some model fails without the rule.
fn is_needed(faults: Faults, without: fn(&mut Rules)) -> bool {
    models(faults)
        .into_iter()
        .chain([three(faults)])
        .any(|mut model| {
            without(&mut model.rules);
            model.explore().is_err()
        })
}

#[test]
fn every_rule_is_needed() {
    let none = Faults::default();
    let aborts = Faults {
        aborts: true,
        ..none
    };
    let fails = Faults {
        prompts_fail: true,
        ..none
    };
    let lost = Faults {
        api_server_lost: true,
        ..none
    };
    assert!(
        is_needed(none, |rules| rules.whole_prompts = false),
        "whole prompts"
    );
    assert!(
        is_needed(none, |rules| rules.preemption = false),
        "preemption"
    );
    assert!(is_needed(none, |rules| rules.refusals = false), "refusals");
    assert!(is_needed(ALL, |rules| rules.nonces = false), "nonces");
    assert!(
        is_needed(none, |rules| rules.ended_stays_ended = false),
        "a lease that ended stays ended"
    );
    assert!(
        is_needed(none, |rules| rules.collected_first = false),
        "a block is told when its step was collected"
    );
    assert!(
        is_needed(none, |rules| rules.release_comes_last = false),
        "the release comes after the last read"
    );
    assert!(
        is_needed(aborts, |rules| rules.prompts_end_leases = false),
        "an aborted prompt ends its lease"
    );
    assert!(
        is_needed(fails, |rules| rules.prompts_end_leases = false),
        "a failed prompt ends its lease"
    );
    assert!(
        is_needed(none, |rules| rules.blocks_stay = false),
        "a prompt keeps the blocks of its handle"
    );
    assert!(
        is_needed(aborts, |rules| {
            rules.expiry = false;
            rules.aborts_end_leases = false;
        }),
        "a lease ends by itself or by an abort"
    );
    assert!(
        is_needed(lost, |rules| {
            rules.expiry = false;
            rules.silence_ends = false;
        }),
        "a lease ends by itself or by silence"
    );
}
