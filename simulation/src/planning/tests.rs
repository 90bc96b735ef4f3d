//! Loads whose answers can be reckoned by hand.

use baton_api_server::ServiceLevel;
use baton_protocol::{CostPoint, KvGroup};

use super::*;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// Steps take 4 ms up to 128 tokens, and 20 ms with a prompt of 1,024; nothing else costs anything.
fn cost() -> StepCost {
    let point = |tokens, us| CostPoint { tokens, us };
    StepCost {
        layers: vec![
            point(1, 4_000.0),
            point(128, 4_000.0),
            point(1_024, 20_000.0),
        ],
        row_us: 0.0,
        kv_token_us: 0.0,
        pair_us: 0.0,
    }
}

fn deployment(roles: &[Role]) -> Deployment {
    let worker = |role: &Role| PlannedWorker {
        role: *role,
        cost: cost(),
        itl: Some(ms(25)),
        step_tokens: 1_024,
        batch: 256,
        steps_in_flight: 2,
        blocks: 20_000,
        queue: 256,
    };
    let group = KvGroup {
        layers: 1,
        kv_heads: 1,
        // Keys and values of two bytes a number: 128 KiB a token.
        head_dim: 32_768,
    };
    Deployment {
        workers: roles.iter().map(worker).collect(),
        kv: KvGeometry::bf16(32, vec![group]),
        tokens_max: 8_192,
        promises: Promises::default(),
        link_bytes_per_second: f64::INFINITY,
        budget: ms(60_000),
    }
}

fn every(period: Duration, requests: u32, prompt_tokens: usize, max_tokens: u32) -> Vec<Arrival> {
    let arrival = |i| Arrival {
        at: period * i,
        prompt_tokens,
        max_tokens,
    };
    (0..requests).map(arrival).collect()
}

/// Timers are late by less than a millisecond each, and some steps follow each other.
#[track_caller]
fn about(time: Duration, expected: u64) {
    let range = ms(expected)..=ms(expected + 3);
    assert!(range.contains(&time), "{time:?}, not {expected} ms");
}

#[test]
fn alone_a_request_takes_what_its_steps_cost() {
    let load = every(ms(1_000), 5, 1_024, 11);
    for answer in predict(&deployment(&[Role::Both]), &load, 1)
        .unwrap()
        .answers
    {
        assert_eq!(answer.ended, Some(Ended::Whole));
        assert_eq!(answer.tokens, 11);
        about(answer.first.unwrap(), 20);
        about(answer.last.unwrap() - answer.first.unwrap(), 40);
    }
}

#[test]
fn kv_goes_over_the_link_in_the_time_that_it_takes() {
    let mut deployment = deployment(&[Role::Context, Role::Decode]);
    // 128 MiB of KV in 50 ms.
    deployment.link_bytes_per_second = f64::from(128 << 20) / 0.05;
    for answer in predict(&deployment, &every(ms(1_000), 5, 1_024, 11), 1)
        .unwrap()
        .answers
    {
        about(answer.first.unwrap(), 20);
        about(answer.last.unwrap() - answer.first.unwrap(), 50 + 40);
    }
}

/// A worker that runs a prompt of 20 ms after the other has 50 of them a second.
#[test]
fn more_prompts_than_there_is_time_for_are_late_or_refused() {
    let mut deployment = deployment(&[Role::Both]);
    let level = ServiceLevel {
        ttft_ms: Some(300),
        itl_ms: None,
    };
    let met = |deployment: &Deployment, rate: u32| {
        let load = every(Duration::from_secs(1) / rate, 10 * rate, 1_024, 1);
        let answers = predict(deployment, &load, 1).unwrap().answers;
        let count = |is: &dyn Fn(&Answer) -> bool| {
            answers.iter().filter(|answer| is(answer)).count() as f64 / answers.len() as f64
        };
        let refused = count(&|answer| answer.ended == Some(Ended::Refused));
        (
            count(&|answer| answer.is_within(level.ttft(), level.itl())),
            refused,
        )
    };
    assert_eq!(met(&deployment, 45), (1.0, 0.0));
    // The queue grows by 10 requests a second, 0.2 s of work: after 1.4 s or so everybody is late.
    let (within, refused) = met(&deployment, 60);
    assert!(within < 0.25 && refused == 0.0, "{within} {refused}");
    // With a promise those are refused for whom there is no time: one in six, and some more, and hardly anybody is late.
    deployment.promises.level = level;
    let (within, refused) = met(&deployment, 60);
    assert!((0.1..0.35).contains(&refused), "{within} {refused}");
    assert!(within > 0.6, "{within} {refused}");
}

#[test]
fn the_same_seed_gives_the_same_answers() {
    let deployment = deployment(&[Role::Both, Role::Context, Role::Decode]);
    let load = every(ms(12), 200, 700, 20);
    let prediction = predict(&deployment, &load, 7).unwrap();
    assert_eq!(prediction, predict(&deployment, &load, 7).unwrap());
    let prompts = prediction.work.iter().map(|work| work.prompt_tokens);
    assert_eq!(prompts.sum::<u64>(), 200 * 700);
    assert!(
        prediction
            .answers
            .iter()
            .all(|answer| answer.ended == Some(Ended::Whole))
    );
}
