//! Runs of tokens: an executor that chooses several at once chooses what single steps would.

use std::sync::Arc;

use baton_engine::{Executor, SampleRun, SampleState, Sampled, SequenceStep, StepId, StepPlan};

use crate::ahead::sampling;
use crate::{Applies, Build, Builder, Random, Tiny, tiny_families};

const SEQUENCES: usize = 9;
const PROMPT: usize = 13;
const OUTPUT: usize = 60;
const BLOCK_TOKENS: u32 = 8;
const BLOCKS_EACH: usize = (PROMPT + OUTPUT).div_ceil(BLOCK_TOKENS as usize);
/// These cannot end a text before it has [`MIN_TOKENS`].
const STOP_IDS: [u32; 40] = {
    let mut ids = [0; 40];
    let mut i = 0;
    while i < ids.len() {
        ids[i] = i as u32 * 3;
        i += 1;
    }
    ids
};
const MIN_TOKENS: usize = 20;

/// Generates texts token by token, and then by runs of all lengths that the executor bears
/// ([`ExecutorInfo::run_max`](baton_engine::ExecutorInfo::run_max)), with drafts of which some are right. Every sequence has a
/// rule of its own, penalties and banned stop ids among them.
///
/// # Panics
/// If a token or a log-probability differs, or if the executor takes a run longer than it says it bears.
pub fn runs_choose_what_single_steps_do(build: Builder<'_>) -> Applies {
    let spec = baton_model::UniformSpec {
        vocab: 301,
        ..tiny_families().remove(1)
    };
    let tiny = Tiny::new(spec, 12);
    let build = || {
        build(Build {
            spec: &tiny.spec,
            weights: &tiny,
            block_tokens: BLOCK_TOKENS,
            blocks: SEQUENCES * BLOCKS_EACH,
        })
    };
    let mut executor = build();
    let run_max = executor.info().run_max;
    let expected = generate(&mut *executor, 1, |_, _, _| Vec::new());
    for run in 2..=run_max {
        for spoiled in [0, 3, 1] {
            let mut random = Random(run as u64);
            let found = generate(&mut *build(), run, |sequence, known, most| {
                let text = expected[sequence].iter().skip(known).take(most);
                // Of three drafts none is wrong, one, or all.
                let mut spoil = |token| match spoiled > 0 && random.below(spoiled) == 0 {
                    true => (token + 1) % 301,
                    false => token,
                };
                text.map(|sampled| spoil(sampled.token)).collect()
            });
            assert_eq!(
                found, expected,
                "runs of {run}, one of {spoiled} drafts wrong"
            );
        }
    }

    let mut plan = StepPlan::default();
    push(&mut plan, 0, &[1; PROMPT], 0, run_max + 1, &[]);
    let error = executor.submit(&plan).expect_err("refused").to_string();
    assert!(error.contains("a run has 1 to"), "{error}");
    plan.sequences[0].sample.as_mut().expect("it is set").len = 0;
    assert!(executor.submit(&plan).is_err(), "a run of none");
    match run_max {
        1 => Applies::No("it bears runs of one token alone"),
        _ => Applies::Yes,
    }
}

/// What each sequence is told. `draft` guesses at most so many tokens of a sequence after so many known ones.
fn generate(
    executor: &mut dyn Executor,
    run: usize,
    mut draft: impl FnMut(usize, usize, usize) -> Vec<u32>,
) -> Vec<Vec<Sampled>> {
    let mut told: Vec<Vec<Sampled>> = vec![Vec::new(); SEQUENCES];
    let mut id = 0;
    while told.iter().any(|told| told.len() < OUTPUT) {
        id += 1;
        let mut plan = StepPlan {
            id: StepId(id),
            want_logits: id % 2 == 0,
            ..StepPlan::default()
        };
        let mut parts = Vec::new();
        let unfinished = |(_, told): &(usize, &Vec<Sampled>)| told.len() < OUTPUT;
        for (sequence, known) in told.iter().enumerate().filter(unfinished) {
            let (start, mut tokens, drafts) = match known.last() {
                None => (0, prompt(sequence), Vec::new()),
                Some(last) => (
                    PROMPT + known.len() - 1,
                    vec![last.token],
                    draft(sequence, known.len(), run - 1),
                ),
            };
            tokens.extend(&drafts);
            push(&mut plan, sequence, &tokens, start, drafts.len() + 1, known);
            parts.push((sequence, drafts));
        }
        let output = executor.forward(&plan).expect("a step");
        for ((sequence, drafts), output) in parts.into_iter().zip(output.sequences) {
            assert_eq!(
                (output.sampled.len(), output.failure),
                (drafts.len() + 1, None)
            );
            let logits = if plan.want_logits {
                drafts.len() + 1
            } else {
                0
            };
            assert_eq!(output.logits.len(), logits * 301);
            let mut drafts = drafts.into_iter();
            for sampled in output.sampled {
                let is_last = drafts.next() != Some(sampled.token);
                told[sequence].push(sampled);
                if is_last {
                    break;
                }
            }
        }
    }
    told.iter_mut().for_each(|told| told.truncate(OUTPUT));
    told
}

fn prompt(sequence: usize) -> Vec<u32> {
    let token = |i| ((i * 31 + sequence * 7) % 301) as u32;
    (0..PROMPT).map(token).collect()
}

/// Of the last `run` tokens a choice each.
fn push(
    plan: &mut StepPlan,
    sequence: usize,
    tokens: &[u32],
    start: usize,
    run: usize,
    known: &[Sampled],
) {
    let mut state = SampleState {
        sampling: sampling(sequence),
        stop_token_ids: STOP_IDS.to_vec(),
        ..SampleState::default()
    };
    known.iter().for_each(|sampled| state.count(sampled.token));
    let (token, block) = (plan.tokens.len(), plan.blocks.len());
    plan.tokens.extend(tokens);
    plan.blocks
        .extend((0..BLOCKS_EACH).map(|i| (i * SEQUENCES + sequence) as u32));
    plan.sequences.push(SequenceStep {
        key: sequence as u64,
        tokens: token..plan.tokens.len(),
        follows: None,
        start: start as u32,
        blocks: block..plan.blocks.len(),
        sample: Some(SampleRun {
            len: run,
            position: (start + tokens.len()).saturating_sub(run) as u32 + 1,
            state: Arc::new(state),
            stop_ids_banned: MIN_TOKENS.saturating_sub(known.len()).min(run),
            mask: None,
        }),
        targets: 0..0,
        target_top: 0,
    });
}
