//! Steps submitted ahead, their sequences going on from tokens that nobody has seen yet: the same tokens as step by step.

use std::collections::VecDeque;
use std::sync::Arc;

use baton_engine::{
    Executor, Follows, SampleRequest, SampleState, Sampled, SequenceStep, StepId, StepOutput,
    StepPlan,
};
use baton_model::UniformSpec;
use baton_protocol::Sampling;

use crate::{Build, Builder, Random, Tiny, tiny_families};

const SEQUENCES: usize = 9;
const PROMPT: usize = 11;
const STEPS: usize = 40;
const BLOCK_TOKENS: u32 = 8;
const BLOCKS_EACH: usize = (PROMPT + STEPS).div_ceil(BLOCK_TOKENS as usize);

/// Runs random batches, in which every sequence is in most steps and at another place in each, one step at a time and
/// then with further steps submitted before the last is collected: one, and as many as the executor bears.
///
/// # Panics
/// If a token or a log-probability differs.
pub fn steps_ahead(build: Builder<'_>) {
    for seed in 0..3 {
        let batches = batches(seed);
        let expected = at_any_depth(build, (12, seed), |executor, depth| {
            run(executor, &batches, depth)
        });
        let mut tokens: Vec<u32> = expected.iter().flatten().map(|s| s.token).collect();
        tokens.sort_unstable();
        tokens.dedup();
        assert!(tokens.len() > 30, "the texts hardly differ: {tokens:?}");
    }
}

/// What `run` is told of a tiny model, by the seeds of its weights and of the batches, with one step at a time, and is told alike with further steps submitted before the last is collected: one, and as
/// many as the executor bears.
fn at_any_depth(
    build: Builder<'_>,
    (weights, batches): (u64, u64),
    run: impl Fn(&mut dyn Executor, usize) -> Vec<Vec<Sampled>>,
) -> Vec<Vec<Sampled>> {
    let spec = UniformSpec {
        vocab: 301,
        ..tiny_families().remove(1)
    };
    let tiny = Tiny::new(spec, weights);
    let expected = run(&mut *on(build, &tiny), 1);
    let depth = on(build, &tiny).info().steps_in_flight.max(2);
    for in_flight in 2..=depth {
        let found = run(&mut *on(build, &tiny), in_flight);
        assert_eq!(
            found, expected,
            "with {in_flight} steps in flight, seed {batches}"
        );
    }
    expected
}

/// An executor of this model, with blocks for all sequences.
fn on(build: Builder<'_>, tiny: &Tiny) -> Box<dyn Executor> {
    build(Build {
        spec: &tiny.spec,
        weights: tiny,
        block_tokens: BLOCK_TOKENS,
        blocks: SEQUENCES * BLOCKS_EACH,
    })
}

/// Tokens of a chunk of a prompt.
const CHUNK: usize = 4;

/// Runs prompts chunk by chunk beside sequences that generate, one step at a time and then with further steps submitted before the
/// last is collected: as many as the executor bears.
///
/// # Panics
/// If a token or a log-probability differs.
pub fn chunks_ahead(build: Builder<'_>) {
    let expected = at_any_depth(build, (13, 0), run_chunks);
    let chosen: usize = expected.iter().map(Vec::len).sum();
    assert!(chosen > SEQUENCES, "{expected:?}");
}

/// What each sequence was told. The first four generate from a prompt of their own; the others come one after the other, in chunks.
fn run_chunks(executor: &mut dyn Executor, in_flight: usize) -> Vec<Vec<Sampled>> {
    let mut told: Vec<Vec<Sampled>> = vec![Vec::new(); SEQUENCES];
    let generate: Vec<usize> = (0..4).collect();
    let mut flights = VecDeque::from([(StepId(0), generate.clone())]);
    executor.submit(&prompt_plan(&generate)).expect("a step");
    let chunks = (4..SEQUENCES).flat_map(|sequence| {
        let starts = (0..PROMPT).step_by(CHUNK);
        starts.map(move |start| (sequence, start))
    });
    for (id, (sequence, start)) in (1..).map(StepId).zip(chunks) {
        if flights.len() == in_flight {
            let output = executor.collect().expect("a step");
            take(&mut told, &flights.pop_front().expect("one").1, output);
        }
        let mut plan = decode_plan(id, &generate, &told, &flights);
        let end = (start + CHUNK).min(PROMPT);
        let tokens = prompt_plan(&[sequence]).tokens[start..end].to_vec();
        push(&mut plan, sequence, tokens, start, None, &[]);
        let mut batch = generate.clone();
        match end {
            PROMPT => batch.push(sequence),
            // A chunk in the middle chooses nothing.
            _ => plan.sequences.last_mut().expect("the chunk").sample = None,
        }
        executor.submit(&plan).expect("a step");
        flights.push_back((id, batch));
    }
    for (_, batch) in flights {
        take(&mut told, &batch, executor.collect().expect("a step"));
    }
    told
}

/// Sequences of each step after the prompts, in random order.
fn batches(seed: u64) -> Vec<Vec<usize>> {
    let mut random = Random(seed + 1);
    let batch = |_| {
        let mut left: Vec<usize> = (0..SEQUENCES).collect();
        let mut batch = Vec::new();
        while !left.is_empty() {
            let sequence = left.swap_remove(random.below(left.len()));
            if random.below(6) > 0 {
                batch.push(sequence);
            }
        }
        batch
    };
    let batches = (0..STEPS).map(batch);
    batches.filter(|batch| !batch.is_empty()).collect()
}

/// Steps that cannot be followed are refused: one that was never submitted, one that was collected, a sequence that the step
/// does not have, and one for which it chooses nothing. The step in flight is not harmed.
///
/// # Panics
/// If one of them is not refused in a sentence that says why.
pub fn only_what_is_in_flight_is_followed(build: Builder<'_>) {
    let tiny = Tiny::new(tiny_families().remove(1), 4);
    let mut executor = on(build, &tiny);
    let prompts = |id: u64, sequences: &[usize]| {
        let mut plan = StepPlan {
            id: StepId(id),
            ..StepPlan::default()
        };
        for sequence in sequences {
            let tokens = (0..PROMPT).map(|i| (i * 5 + sequence) as u32).collect();
            push(&mut plan, *sequence, tokens, 0, None, &[]);
        }
        plan
    };
    executor.submit(&prompts(7, &[0, 1])).expect("a step");
    executor.collect().expect("a step");
    let mut in_flight = prompts(8, &[0, 1, 2]);
    in_flight.sequences[1].sample = None;
    executor.submit(&in_flight).expect("a step");
    for (step, sequence, word) in [
        (6, 0, "step 6, which is not in flight"),
        (7, 0, "step 7, which is not in flight"),
        (9, 0, "step 9, which is not in flight"),
        (8, 3, "does not choose one token"),
        (8, 1, "does not choose one token"),
    ] {
        let mut plan = StepPlan {
            id: StepId(9),
            ..StepPlan::default()
        };
        let follows = Follows {
            step: StepId(step),
            sequence,
        };
        push(&mut plan, 0, vec![1], PROMPT, Some(follows), &[]);
        let error = executor.submit(&plan).expect_err("refused").to_string();
        assert!(error.contains(word), "{error}");
    }
    let output = executor.collect().expect("the step in flight");
    let chosen = output.sequences.iter().map(|s| s.sampled.len());
    assert_eq!(chosen.collect::<Vec<_>>(), [1, 0, 1]);
}

/// A step in flight: its name, and which sequences it has.
type Flight = (StepId, Vec<usize>);

/// What each sequence was told.
fn run(executor: &mut dyn Executor, batches: &[Vec<usize>], in_flight: usize) -> Vec<Vec<Sampled>> {
    let mut told: Vec<Vec<Sampled>> = vec![Vec::new(); SEQUENCES];
    let prompts: Vec<usize> = (0..SEQUENCES).collect();
    // The oldest first.
    let mut flights = VecDeque::from([(StepId(0), prompts.clone())]);
    executor.submit(&prompt_plan(&prompts)).expect("a step");
    for (id, batch) in (1..).map(StepId).zip(batches) {
        if flights.len() == in_flight {
            let output = executor.collect().expect("a step");
            take(&mut told, &flights.pop_front().expect("one").1, output);
        }
        let plan = decode_plan(id, batch, &told, &flights);
        executor.submit(&plan).expect("a step");
        flights.push_back((id, batch.clone()));
    }
    for (_, batch) in flights {
        take(&mut told, &batch, executor.collect().expect("a step"));
    }
    told
}

fn take(told: &mut [Vec<Sampled>], batch: &[usize], output: StepOutput) {
    // A chunk in the middle of a prompt stands last and is not in the batch.
    let rows = output.sequences.len();
    assert!(rows == batch.len() || rows == batch.len() + 1, "{rows}");
    for (sequence, output) in batch.iter().zip(output.sequences) {
        assert_eq!(output.sampled.len(), 1, "one was asked for");
        told[*sequence].extend(output.sampled);
    }
}

fn prompt_plan(batch: &[usize]) -> StepPlan {
    let mut plan = StepPlan::default();
    for sequence in batch {
        let tokens = (0..PROMPT).map(|i| ((i * 31 + sequence * 7) % 301) as u32);
        push(&mut plan, *sequence, tokens.collect(), 0, None, &[]);
    }
    plan
}

/// Sequences whose last token is in flight follow it, the others have it.
fn decode_plan(
    id: StepId,
    batch: &[usize],
    told: &[Vec<Sampled>],
    flights: &VecDeque<Flight>,
) -> StepPlan {
    let mut plan = StepPlan {
        id,
        ..StepPlan::default()
    };
    for sequence in batch {
        let place = |(step, batch): &Flight| {
            let sequence = batch.iter().position(|other| other == sequence)?;
            Some(Follows {
                step: *step,
                sequence,
            })
        };
        let unknown: Vec<Follows> = flights.iter().filter_map(place).collect();
        let follows = unknown.last().copied();
        let known = &told[*sequence];
        let tokens = known.len() + unknown.len();
        // What stands beside `follows` means nothing.
        let token = match follows {
            Some(_) => u32::MAX,
            None => known.last().expect("told").token,
        };
        push(
            &mut plan,
            *sequence,
            vec![token],
            PROMPT + tokens - 1,
            follows,
            known,
        );
    }
    plan
}

fn push(
    plan: &mut StepPlan,
    sequence: usize,
    tokens: Vec<u32>,
    start: usize,
    follows: Option<Follows>,
    known: &[Sampled],
) {
    let mut state = SampleState {
        sampling: sampling(sequence),
        ..SampleState::default()
    };
    known.iter().for_each(|sampled| state.count(sampled.token));
    let (token, block) = (plan.tokens.len(), plan.blocks.len());
    let end = start + tokens.len();
    plan.tokens.extend(tokens);
    plan.blocks
        .extend((0..BLOCKS_EACH).map(|i| (i * SEQUENCES + sequence) as u32));
    plan.sequences.push(SequenceStep {
        key: sequence as u64,
        tokens: token..plan.tokens.len(),
        follows,
        start: start as u32,
        blocks: block..plan.blocks.len(),
        sample: Some(
            SampleRequest {
                position: end as u32,
                state: Arc::new(state),
                ban_stop_ids: false,
                mask: None,
            }
            .into(),
        ),
        targets: 0..0,
        target_top: 0,
    });
}

/// Each sequence has a rule of its own.
pub(crate) fn sampling(sequence: usize) -> Sampling {
    let base = Sampling {
        temperature: 1.5,
        seed: sequence as u64,
        ..Sampling::default()
    };
    match sequence {
        0 => Sampling::default(),
        1 => Sampling { top_k: 9, ..base },
        2 => Sampling { top_p: 0.7, ..base },
        3 => Sampling {
            min_p: 0.05,
            ..base
        },
        4 => Sampling {
            logprobs: Some(2),
            ..base
        },
        5 => Sampling {
            logit_bias: vec![(17, 4.0)],
            ..base
        },
        6 => Sampling {
            repetition_penalty: 1.5,
            frequency_penalty: 0.5,
            ..base
        },
        _ => base,
    }
}
