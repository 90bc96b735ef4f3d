use std::sync::Arc;

use baton_protocol::Sampling;
use proptest::prelude::*;

use super::*;
use crate::{SampleState, TokenCount};

fn request(state: SampleState, position: u32) -> SampleRequest {
    SampleRequest {
        position,
        state: Arc::new(state),
        ban_stop_ids: false,
        mask: None,
    }
}

fn plain(sampling: Sampling) -> SampleState {
    SampleState {
        sampling,
        ..SampleState::default()
    }
}

fn choose(logits: &[f32], sampling: Sampling, position: u32) -> u32 {
    let sampled = sample(&mut logits.to_vec(), &request(plain(sampling), position));
    sampled.expect("a token is possible").token
}

/// The rules written down as plainly as can be: full sort, f64, libm. Ids that may be drawn, with
/// their probabilities.
fn reference(logits: &[f32], sampling: &Sampling) -> Vec<(u32, f64)> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
    if sampling.top_k > 0 {
        order.truncate(sampling.top_k as usize);
    }
    let peak = f64::from(logits[order[0]]);
    let weight = |i: usize| ((f64::from(logits[i]) - peak) / f64::from(sampling.temperature)).exp();
    let total: f64 = order.iter().map(|i| weight(*i)).sum();
    let mut sum = 0.0;
    let mut kept = Vec::new();
    for i in order {
        if !kept.is_empty() && sum >= total * f64::from(sampling.top_p) {
            break;
        }
        sum += weight(i);
        kept.push(i);
    }
    kept.retain(|i| weight(*i) >= f64::from(sampling.min_p));
    let total: f64 = kept.iter().map(|i| weight(*i)).sum();
    kept.into_iter()
        .map(|i| (i as u32, weight(i) / total))
        .collect()
}

fn spread_logits(len: usize, scale: f32) -> Vec<f32> {
    (0..len)
        .map(|i| (uniform(99, i as u32) as f32 - 0.5) * scale)
        .collect()
}

#[test]
fn greedy_takes_the_lowest_id_of_the_best() {
    let sampling = Sampling::default();
    assert_eq!(choose(&[1.0, 3.0, 3.0, -1.0], sampling.clone(), 0), 1);
    assert_eq!(choose(&[-0.0, 0.0], sampling.clone(), 0), 0);
    assert_eq!(choose(&[f32::NAN, -5.0, f32::NAN], sampling, 0), 1);
}

#[test]
fn broken_rows_do_not_panic() {
    for temperature in [0.0, 0.7, f32::NAN, f32::INFINITY, 1e-30] {
        for (top_k, top_p, min_p) in [(0, 1.0, 0.0), (2, 0.5, 0.1), (0, 0.0, 1.0), (0, 0.9, 2.0)] {
            let sampling = Sampling {
                temperature,
                top_k,
                top_p,
                min_p,
                logprobs: Some(3),
                ..Sampling::default()
            };
            for nothing in [f32::NAN, f32::NEG_INFINITY] {
                let asked = request(plain(sampling.clone()), 0);
                assert_eq!(sample(&mut [nothing; 40], &asked), None);
            }
            let mut one = [f32::NEG_INFINITY; 40];
            one[33] = f32::INFINITY;
            assert_eq!(choose(&one, sampling.clone(), 0), 33);
            one[33] = -1e30;
            assert_eq!(choose(&one, sampling, 0), 33);
        }
    }
    assert_eq!(sample(&mut [], &request(SampleState::default(), 0)), None);
}

#[test]
fn bias_bans_and_penalties_in_order() {
    let mut state = plain(Sampling {
        repetition_penalty: 2.0,
        frequency_penalty: 0.5,
        presence_penalty: 0.25,
        logit_bias: vec![(0, 1.0), (99, 5.0)],
        logprobs: Some(5),
        ..Sampling::default()
    });
    state.stop_token_ids = vec![4];
    state.counts = vec![
        TokenCount {
            token: 0,
            prompt: 1,
            output: 0,
        },
        TokenCount {
            token: 1,
            prompt: 0,
            output: 2,
        },
        TokenCount {
            token: 2,
            prompt: 1,
            output: 1,
        },
    ];
    let request = SampleRequest {
        position: 0,
        state: Arc::new(state),
        ban_stop_ids: true,
        mask: None,
    };
    let mut logits = [3.0, 4.0, -1.0, 1.0, 50.0];
    penalties::apply(&mut logits, &request.state, true);
    // (3 + 1) / 2; 4 / 2 - 2 * 0.5 - 0.25; -1 * 2 - 0.5 - 0.25; untouched; banned.
    assert_eq!(logits, [2.0, 0.75, -2.75, 1.0, f32::NEG_INFINITY]);

    let sampled = sample(&mut [3.0, 4.0, -1.0, 1.0, 50.0], &request).expect("possible");
    assert_eq!(sampled.token, 0);
    let logprobs = sampled.logprobs.expect("asked for");
    let sum: f32 = [2.0f32, 0.75, -2.75, 1.0].iter().map(|x| x.exp()).sum();
    assert!((logprobs.logprob - (2.0 - sum.ln())).abs() < 1e-5);
    let ids: Vec<u32> = logprobs.top.iter().map(|top| top.0).collect();
    assert_eq!(ids, [0, 3, 1, 2, 4]);
    assert_eq!(logprobs.top[4].1, LOGPROB_MIN);
}

#[test]
fn logprobs_are_those_before_temperature_and_truncation() {
    let logits = spread_logits(1000, 12.0);
    let ask = |temperature: f32, top_k: u32| {
        let sampling = Sampling {
            temperature,
            top_k,
            logprobs: Some(4),
            ..Sampling::default()
        };
        sample(&mut logits.clone(), &request(plain(sampling), 3))
            .and_then(|sampled| sampled.logprobs)
            .expect("asked for")
    };
    let greedy = ask(0.0, 0);
    assert_eq!(greedy.top[0].1, greedy.logprob);
    assert_eq!(ask(0.2, 0).top, greedy.top);
    assert_eq!(ask(3.0, 7).top, greedy.top);
    let token = choose(
        &logits,
        Sampling {
            temperature: 3.0,
            ..Sampling::default()
        },
        3,
    );
    let exact = token_logprobs(&mut logits.clone(), token, 4);
    assert_eq!(ask(3.0, 0), exact);
}

#[test]
fn ties_in_the_top_list_go_to_the_lowest_id() {
    let top = token_logprobs(&mut [1.0; 300], 7, 3).top;
    assert_eq!(top.iter().map(|top| top.0).collect::<Vec<_>>(), [0, 1, 2]);
}

#[test]
fn a_draw_depends_on_seed_and_position_alone() {
    let logits = spread_logits(500, 2.0);
    let at = |seed, position| {
        let sampling = Sampling {
            temperature: 1.0,
            seed,
            ..Sampling::default()
        };
        choose(&logits, sampling, position)
    };
    assert_eq!(at(1, 5), at(1, 5));
    let stream = |seed| (0..32).map(|p| at(seed, p)).collect::<Vec<_>>();
    assert_ne!(stream(1), stream(2));
    assert_ne!(stream(1)[1..], stream(2)[..31]);
}

#[test]
fn uniform_numbers_are_uniform() {
    let mut buckets = [0u32; 64];
    for seed in 0..16 {
        for position in 0..4096 {
            let u = uniform(seed, position);
            assert!((0.0..1.0).contains(&u));
            buckets[(u * 64.0) as usize] += 1;
        }
    }
    // Chi-square with 63 degrees of freedom: 99.9% lie under 103.
    let expected = 1024.0f64;
    let chi: f64 = buckets
        .iter()
        .map(|n| (f64::from(*n) - expected).powi(2) / expected)
        .sum();
    assert!(chi < 103.0, "chi-square {chi}");
}

/// Frequencies over many positions against the reference's probabilities, for every path through the
/// truncation.
#[test]
fn draws_follow_the_distribution() {
    let base = Sampling {
        temperature: 0.8,
        ..Sampling::default()
    };
    let cases = [
        base.clone(),
        Sampling {
            top_k: 20,
            ..base.clone()
        },
        Sampling {
            top_p: 0.9,
            ..base.clone()
        },
        Sampling {
            top_p: 0.9,
            temperature: 5.0,
            ..base.clone()
        },
        Sampling {
            min_p: 0.05,
            ..base.clone()
        },
        Sampling {
            top_k: 50,
            top_p: 0.8,
            min_p: 0.02,
            ..base
        },
    ];
    let logits = spread_logits(600, 14.0);
    const DRAWS: u32 = 20_000;
    for sampling in cases {
        let expected = reference(&logits, &sampling);
        let mut seen = vec![0u32; logits.len()];
        for position in 0..DRAWS {
            seen[choose(&logits, sampling.clone(), position) as usize] += 1;
        }
        let mut total = 0;
        for (token, probability) in &expected {
            let n = f64::from(seen[*token as usize]);
            let mean = probability * f64::from(DRAWS);
            assert!(
                (n - mean).abs() < 5.0 * mean.sqrt() + 3.0,
                "{sampling:?}: {token}: {n} for {mean}"
            );
            total += seen[*token as usize];
        }
        assert_eq!(total, DRAWS, "{sampling:?}: drew outside the kept set");
    }
}

proptest! {
    #[test]
    fn the_largest_are_those_of_a_sort(
        logits in prop::collection::vec((-20i32..20).prop_map(|x| x as f32 / 4.0), 1..700),
        count in 0usize..300,
    ) {
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
        order.truncate(count);
        let found: Vec<u32> = truncate::largest(&logits, count).iter().map(|r| r.token()).collect();
        prop_assert_eq!(found, order);
    }

    #[test]
    fn a_draw_stays_in_the_kept_set(
        logits in prop::collection::vec(-30.0f32..30.0, 1..900),
        temperature in 0.05f32..4.0,
        top_k in prop_oneof![Just(0u32), 1u32..400],
        top_p in prop_oneof![Just(1.0f32), 0.0f32..1.0],
        min_p in prop_oneof![Just(0.0f32), 0.0f32..1.0],
        seed: u64,
    ) {
        let sampling = Sampling { temperature, top_k, top_p, min_p, seed, ..Sampling::default() };
        // The boundary itself may fall either way by rounding: widen the set by a hair.
        let wide = Sampling { top_p: (top_p * 1.00001).min(1.0), min_p: min_p * 0.99999, ..sampling.clone() };
        let kept = reference(&logits, &wide);
        let token = choose(&logits, sampling, 17);
        prop_assert!(kept.iter().any(|(id, _)| *id == token), "{} not in {:?}", token, kept);
    }

    #[test]
    fn nothing_panics(
        logits in prop::collection::vec(any::<f32>(), 0..200),
        temperature: f32, top_k: u32, top_p: f32, min_p: f32,
        repetition_penalty: f32, presence_penalty: f32, frequency_penalty: f32,
        bias: f32, logprobs: Option<u8>,
    ) {
        let mut state = plain(Sampling {
            temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty,
            logit_bias: vec![(3, bias)], seed: 0, logprobs,
        });
        state.counts = vec![TokenCount { token: 5, prompt: 1, output: 3 }];
        let len = logits.len();
        if let Some(sampled) = sample(&mut logits.clone(), &request(state, 0)) {
            prop_assert!((sampled.token as usize) < len);
            for top in sampled.logprobs.iter().flat_map(|l| &l.top) {
                prop_assert!(top.1.is_finite());
            }
        }
    }
}

#[test]
fn a_draw_says_what_was_asked_in_numbers() {
    let warm = || Sampling {
        temperature: 0.5,
        min_p: 2.0,
        seed: 9,
        ..Sampling::default()
    };
    let asked = |sampling| Draw::of(&request(plain(sampling), 3), 100);
    assert_eq!(asked(Sampling::default()), None);
    let draw = Draw {
        inverse_temperature: 2.0,
        top_k: 0,
        top_p: 1.0,
        weight_min: 1.0,
        bits: random_bits(9, 3),
    };
    assert_eq!(asked(warm()), Some(draw));
    // Keeping the best hundred of a hundred keeps all.
    let all = Sampling {
        top_k: 100,
        top_p: f32::NAN,
        ..warm()
    };
    assert_eq!(asked(all), Some(draw));
    let few = Sampling {
        top_k: 99,
        top_p: -1.0,
        ..warm()
    };
    let (top_k, top_p) = (99, 0.0);
    assert_eq!(
        asked(few),
        Some(Draw {
            top_k,
            top_p,
            ..draw
        })
    );
}
