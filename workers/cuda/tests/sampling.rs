//! The GPU chooses the token that the engine's rules choose, with the same log-probabilities, whatever the logits and the
//! parameters. Ignored where `cargo test` runs, which need not have a GPU; `tests/gpu.sh` runs it.

use std::sync::Arc;

use baton_cuda::{Answer, Batch, Buffer, Compiler, Device, Sampler};
use baton_engine::{
    SampleRequest, SampleState, TokenCount, TokenMask, Want, What, random_bits, sample,
    token_logprobs,
};
use baton_protocol::Sampling;

/// Numbers that follow from a seed and how many were drawn before.
struct Random {
    seed: u64,
    drawn: u32,
}

impl Random {
    fn bits(&mut self) -> u64 {
        self.drawn += 1;
        random_bits(self.seed, self.drawn)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.bits() % bound as u64) as usize
    }

    fn unit(&mut self) -> f32 {
        self.bits() as f32 / (1u64 << 53) as f32
    }

    fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    fn bell(&mut self) -> f32 {
        (0..6).map(|_| self.unit()).sum::<f32>() - 3.0
    }
}

/// Logits as models have them, and as they should never be.
fn logits(random: &mut Random, vocab: usize) -> Vec<f32> {
    let kind = random.below(12);
    let scale = random.one_of(&[0.5, 2.0, 5.0, 30.0]);
    let cluster = random.below(vocab);
    let mut logit = |i: usize| match kind {
        0 => random.bell() * 0.01,                             // flat
        1 => (random.bell() * 4.0).round(),                    // ties
        2 => 1.5,                                              // nothing but ties
        3 if random.below(50) > 0 => f32::NEG_INFINITY,        // few are possible
        4 if i.abs_diff(cluster) < 600 => random.bell() + 9.0, // the best are neighbours
        5 => -random.bell().abs() * 1e30,
        6 if random.below(9) == 0 => f32::NAN,
        7 if random.below(900) == 0 => f32::INFINITY,
        8 if random.below(40) == 0 => -0.0,
        8 => -random.unit().round() * 1e-3,
        _ => random.bell() * scale,
    };
    (0..vocab).map(&mut logit).collect()
}

/// Of three rows one has a mask: of a few tokens, of most, or of one; now and then it ends before the vocabulary does.
fn mask(random: &mut Random, vocab: usize) -> Option<Arc<TokenMask>> {
    let ids = match random.below(4) {
        0 => vocab.div_ceil(2).max(1),
        _ => vocab,
    };
    let one_in = match random.below(9) {
        0 => 1,
        1 => 50,
        2 => ids,
        _ => return None,
    };
    let first = random.below(one_in);
    let allowed = (first..ids).step_by(one_in).map(|id| id as u32);
    Some(Arc::new(TokenMask::of(ids as u32, allowed)))
}

fn state(random: &mut Random, vocab: usize) -> SampleState {
    let ids = (vocab + vocab / 8 + 1) as u64; // some beyond the end
    let mut sampling = Sampling {
        temperature: random.one_of(&[0.0, 0.3, 0.7, 1.0, 1.5, 10.0, 1e-20, 1e20]),
        top_k: random.one_of(&[
            0,
            0,
            0,
            1,
            5,
            40,
            200,
            256,
            257,
            3000,
            vocab as u32 - 1,
            u32::MAX,
        ]),
        top_p: random.one_of(&[1.0, 1.0, 0.0, 0.1, 0.5, 0.9, 0.95, 0.9999]),
        min_p: random.one_of(&[0.0, 0.0, 0.0, 0.01, 0.2, 1.0, 2.0]),
        seed: random.bits(),
        logprobs: random.one_of(&[None, None, Some(0), Some(1), Some(5), Some(20), Some(255)]),
        ..Sampling::default()
    };
    if random.below(4) == 0 {
        for _ in 0..random.one_of(&[1, 3, 300]) {
            let token = (random.bits() % ids) as u32;
            sampling.logit_bias.push((token, random.bell() * 5.0));
            if random.below(3) == 0 {
                sampling.logit_bias.push((token, random.bell()));
            }
        }
    }
    let mut state = SampleState {
        sampling,
        ..SampleState::default()
    };
    if random.below(3) == 0 {
        state.stop_token_ids = (0..3).map(|_| (random.bits() % ids) as u32).collect();
    }
    if random.below(3) == 0 {
        state.sampling.repetition_penalty = random.one_of(&[1.0, 1.1, 2.0]);
        state.sampling.presence_penalty = random.one_of(&[0.0, 0.5, -0.5]);
        state.sampling.frequency_penalty = random.one_of(&[0.01, 0.25]);
        let mut tokens: Vec<u32> = (0..random.one_of(&[1, 40, 2000]))
            .map(|_| (random.bits() % ids) as u32)
            .collect();
        tokens.sort_unstable();
        tokens.dedup();
        let mut count = |token| TokenCount {
            token,
            prompt: random.below(2) as u32,
            output: random.below(4) as u32,
        };
        state.counts = tokens.into_iter().map(&mut count).collect();
    }
    state
}

/// What the engine answers. A sequence that follows has its last token counted, which the GPU is not told by the host.
fn expected(logits: &[f32], want: &Want, follows: Option<u32>) -> Answer {
    let mut logits = logits.to_vec();
    match &want.what {
        What::Target { token, top } => Answer::Target(token_logprobs(&mut logits, *token, *top)),
        What::Sample(request) => {
            let mut request = request.clone();
            let state = Arc::make_mut(&mut request.state);
            if let (Some(token), true) = (follows, state.has_penalty()) {
                match state.counts.binary_search_by_key(&token, |c| c.token) {
                    Ok(at) => state.counts[at].output += 1,
                    Err(at) => {
                        let (prompt, output) = (0, 1);
                        state.counts.insert(
                            at,
                            TokenCount {
                                token,
                                prompt,
                                output,
                            },
                        );
                    }
                }
            }
            Answer::Sampled(sample(&mut logits, &request))
        }
    }
}

/// The best token of logits that nobody has edited, or -1: what is found with the logits.
fn best(logits: &[f32]) -> i32 {
    let rank = |x: f32| {
        if x.is_nan() {
            f32::NEG_INFINITY
        } else {
            x.min(f32::MAX)
        }
    };
    let mut best = -1;
    let mut peak = f32::NEG_INFINITY;
    for (i, x) in logits.iter().enumerate() {
        if rank(*x) > peak {
            (best, peak) = (i as i32, rank(*x));
        }
    }
    best
}

struct Setup {
    device: Arc<Device>,
    compiler: Compiler,
}

/// Samples rows, twice, and compares with the engine; how many rows agreed.
fn compare(
    setup: &Setup,
    sampler: &mut Sampler,
    batch: &mut Batch,
    vocab: usize,
    rows: usize,
    seed: u64,
) -> usize {
    let random = &mut Random { seed, drawn: 0 };
    let device = &setup.device;
    let logits: Vec<Vec<f32>> = (0..rows).map(|_| logits(random, vocab)).collect();
    let row_token: Vec<i32> = (0..rows).map(|_| random.below(vocab) as i32).collect();
    let mut follows = Vec::new();
    let wants: Vec<Want> = (0..rows)
        .map(|row| {
            follows.push(random.below(2) == 0);
            let what = match random.below(6) {
                0 => What::Target {
                    token: random.below(vocab) as u32,
                    top: random.one_of(&[0, 1, 20]),
                },
                _ => What::Sample(SampleRequest {
                    position: random.below(1000) as u32,
                    state: Arc::new(state(random, vocab)),
                    ban_stop_ids: random.below(2) == 0,
                    mask: mask(random, vocab),
                }),
            };
            let sequence = row;
            Want {
                sequence,
                row,
                what,
            }
        })
        .collect();
    let flat: Vec<f32> = logits.iter().flatten().copied().collect();
    let bests: Vec<i32> = logits.iter().map(|logits| best(logits)).collect();
    let row_token_at = Buffer::of(device, &row_token, "tokens").expect("GPU memory");
    let mut found = Vec::new();
    for _ in 0..2 {
        let logits_at = Buffer::of(device, &flat, "logits").expect("GPU memory");
        let tokens_at = Buffer::of(device, &bests, "tokens").expect("GPU memory");
        // SAFETY: rows as the sampler wants them; waited for below.
        unsafe {
            sampler.launch(
                batch,
                &wants,
                |want| follows[want.row],
                tokens_at.at(0),
                logits_at.at(0),
                row_token_at.at(0),
            )
        }
        .expect("a launch");
        device.synchronize().expect("the kernel");
        found.push(batch.answers(&wants));
    }
    assert_eq!(
        found[0], found[1],
        "vocab {vocab}, seed {seed}: twice the same"
    );
    for (row, want) in wants.iter().enumerate() {
        let follows = follows[row].then_some(row_token[row] as u32);
        let expected = expected(&logits[row], want, follows);
        assert_eq!(
            found[0][row], expected,
            "vocab {vocab}, {rows} rows, seed {seed}, row {row}, follows {follows:?}: {want:?}"
        );
    }
    rows
}

#[test]
#[ignore = "needs a GPU"]
fn tokens_and_log_probabilities_are_the_engines() {
    let device = Device::open(0).unwrap_or_else(|error| panic!("{error}"));
    let compiler = Compiler::for_capability(device.capability()).expect("NVRTC");
    let setup = Setup { device, compiler };
    let mut compared = 0;
    for (vocab, rounds) in [
        (3, 2),
        (40, 6),
        (257, 6),
        (3001, 12),
        (49_152, 5),
        (128_256, 3),
    ] {
        let mut sampler =
            Sampler::new(&setup.device, &setup.compiler, vocab, 140).expect("a sampler");
        let mut batch = sampler.batch().expect("room");
        for round in 0..rounds {
            for rows in [1, 7, 30, 60, 140] {
                let seed = (vocab * 1000 + round * 10 + rows) as u64;
                compared += compare(&setup, &mut sampler, &mut batch, vocab, rows, seed);
            }
        }
        println!("vocabulary of {vocab}: as the engine, {compared} rows so far");
    }
    assert!(compared > 5000);
}
