//! What a step made, given to its sequences.

use std::time::Instant;

use baton_protocol::FinishReason;

use super::Engine;
use crate::flight::{Flight, FlightRow};
use crate::scheduler::Scheduler;
use crate::sequence::{Sequence, Streamed};
use crate::{Event, ExecutorError, Sampled, SampledRun, SequenceOutput, StepOutput};

/// A sequence's part of a step, and what it has made.
type Collected = (FlightRow, SequenceOutput);

impl Engine {
    /// Collect the oldest step in flight, if there is one.
    pub(super) fn collect_step(&mut self, events: &mut Vec<Event>) -> Result<(), ExecutorError> {
        self.choose()?;
        let Some(oldest) = self.flights.oldest() else {
            return Ok(());
        };
        let output = self.executor.collect()?;
        self.check_output(&oldest.rows, &output)?;
        let Some(flight) = self.flights.collected() else {
            return Ok(());
        };
        let now = (self.clock)();
        let Flight {
            rows,
            decodes,
            drafts,
            shape,
            submitted,
            ..
        } = flight;
        if let (Some(cost), Some(submitted)) = (&mut self.scheduler.cost, submitted) {
            cost.learn(shape, self.pace.took(submitted, now));
        }
        self.pace.note(now, !self.flights.is_empty());
        let mut decoded: Vec<Collected> = rows.into_iter().zip(output.sequences).collect();
        let prompts = decoded.split_off(decodes);
        self.collect_decodes(decoded, &drafts, events);
        self.collect_prefills(prompts, events);
        Ok(())
    }

    /// The executor's half of the contract: a row for each sequence, and in it what was asked for.
    fn check_output(&self, rows: &[FlightRow], output: &StepOutput) -> Result<(), ExecutorError> {
        let vocab = self.info().vocab;
        let fits = |(row, output): (&FlightRow, &SequenceOutput)| {
            let sampled = output.sampled.len();
            let count_fits = match output.failure {
                Some(_) => sampled < row.choices().max(1),
                None => {
                    sampled == row.choices() && output.target_logprobs.len() == row.targets as usize
                }
            };
            count_fits
                && output
                    .sampled
                    .as_slice()
                    .iter()
                    .all(|sampled| sampled.token < vocab)
        };
        if rows.len() == output.sequences.len() && rows.iter().zip(&output.sequences).all(fits) {
            return Ok(());
        }
        Err(ExecutorError::failed(format!(
            "{} returned an output that does not fit its plan of {} sequences; this is a defect of the executor",
            self.info().device,
            rows.len()
        )))
    }

    /// Rows and sequences are both in order of arrival. Rows of those that have left since are thrown away.
    fn collect_decodes(&mut self, rows: Vec<Collected>, drafts: &[u32], events: &mut Vec<Event>) {
        let Scheduler {
            decoding,
            pool,
            prefix_cache,
            ..
        } = &mut self.scheduler;
        let block_tokens = pool.block_tokens();
        let mut rows = rows.into_iter().peekable();
        decoding.retain_mut(|sequence| {
            while rows
                .next_if(|(row, _)| row.arrival < sequence.arrival)
                .is_some()
            {}
            let row = rows.next_if(|(row, _)| row.arrival == sequence.arrival);
            let Some((row, output)) = row else {
                return true;
            };
            let drafts = &drafts[row.drafts.start as usize..row.drafts.end as usize];
            sequence.in_flight -= row.tokens as usize;
            sequence.drafted -= drafts.len();
            if row.is_void {
                sequence.constrained.is_void = false;
                return true;
            }
            let full_before = sequence.computed / block_tokens;
            let goes_on = commit(sequence, drafts, output.sampled, self.tokens_max, events);
            // Only on top of what is indexed already: a prefix whose hash was taken stays private, and all after it.
            if *prefix_cache
                && sequence.computed / block_tokens > full_before
                && sequence.blocks.indexed() == full_before
            {
                let known = &sequence.tokens[..sequence.computed];
                let given_up = sequence.blocks.index(sequence.cache_salt, known);
                self.flights.give_back(given_up);
            }
            match goes_on {
                GoesOn::Yes => {
                    if !drafts.is_empty() {
                        // No later step touches what rejected drafts have filled: the sequence sat out.
                        let needed = sequence.tokens.len().div_ceil(block_tokens);
                        sequence.blocks.truncate(needed);
                    }
                    return true;
                }
                GoesOn::NoToken => {
                    sequence.blocks.forget();
                    let detail = output.failure.or(sequence.constrained.failure.take());
                    events.push(failed(sequence.key, detail));
                }
                GoesOn::Finished => {}
            }
            self.flights.give_back_of(sequence);
            false
        });
    }

    fn collect_prefills(&mut self, rows: Vec<Collected>, events: &mut Vec<Event>) {
        let Scheduler {
            prefilling,
            prefix_cache,
            ..
        } = &mut self.scheduler;
        let mut done: Vec<(usize, Result<Sampled, String>)> = Vec::new();
        for (row, output) in rows {
            let Some(at) = prefilling.iter().position(|s| s.arrival == row.arrival) else {
                continue;
            };
            let sequence = &mut prefilling[at];
            sequence.computed += row.tokens as usize;
            sequence.in_flight -= row.tokens as usize;
            if let Some(detail) = output.failure {
                done.push((at, Err(detail)));
                continue;
            }
            sequence.prompt.logprobs.extend(output.target_logprobs);
            if *prefix_cache {
                let known = &sequence.tokens[..sequence.computed];
                match sequence.prompt.stream {
                    Some(Streamed::Begun) => {
                        sequence.blocks.index_in_place(sequence.cache_salt, known);
                    }
                    Some(Streamed::No) | None => {
                        let given_up = sequence.blocks.index(sequence.cache_salt, known);
                        self.flights.give_back(given_up);
                    }
                }
            }
            if sequence.computed < sequence.tokens.len() {
                events.extend(news(sequence));
            }
            // A prompt's last chunk chooses one token, the others none.
            let sampled = output.sampled.split_first().0;
            done.extend(sampled.map(|sampled| (at, Ok(sampled))));
        }
        done.sort_unstable_by_key(|(at, _)| *at);
        for (removed, (at, end)) in done.into_iter().enumerate() {
            let mut sequence = prefilling.remove(at - removed);
            let finish = end.and_then(|sampled| {
                let finish = sequence.finish_of(sampled.token, self.tokens_max)?;
                Ok((sampled, finish))
            });
            events.push(match finish {
                Ok((sampled, finish)) => prefilled(sequence, sampled, finish, (self.clock)()),
                Err(detail) => {
                    sequence.blocks.forget();
                    self.flights.give_back_of(&mut sequence);
                    failed(sequence.key, Some(detail))
                }
            });
        }
    }
}

/// What is told of a prompt's step that was not the last, if anybody wants to know.
fn news(sequence: &mut Sequence) -> Option<Event> {
    let (key, computed) = (sequence.key, sequence.computed as u32);
    let prompt = &mut sequence.prompt;
    Some(match prompt.stream.as_mut()? {
        Streamed::Begun => Event::Computed { key, computed },
        streamed @ Streamed::No => {
            *streamed = Streamed::Begun;
            let started = prompt.started.unwrap_or(prompt.submitted);
            Event::Begun {
                key,
                runs: sequence.blocks.runs(),
                computed,
                cached_tokens: prompt.cached_tokens as u32,
                queue: started.saturating_duration_since(prompt.submitted),
            }
        }
    })
}

/// Whether a sequence generates on after a step.
#[derive(Clone, Copy, PartialEq, Eq)]
enum GoesOn {
    Yes,
    Finished,
    /// A token that it needs could not be chosen.
    NoToken,
}

/// Takes over the tokens that a step chose for a generating sequence: all up to the first that is not the draft that was run
/// behind it, and that one. A token that ends the sequence is the last.
#[inline]
fn commit(
    sequence: &mut Sequence,
    drafts: &[u32],
    sampled: SampledRun,
    tokens_max: usize,
    events: &mut Vec<Event>,
) -> GoesOn {
    let (mut next, mut rest) = sampled.split_first();
    let mut drafts = drafts.iter();
    while let Some(sampled) = next {
        let token = sampled.token;
        let finish = match sequence.finish_of(token, tokens_max) {
            Ok(finish) => finish,
            Err(detail) => {
                sequence.constrained.failure = Some(detail);
                return GoesOn::NoToken;
            }
        };
        events.push(Event::Token {
            key: sequence.key,
            index: sequence.output_tokens() as u32,
            sampled,
            finish,
        });
        sequence.computed += 1;
        sequence.push(token);
        if finish.is_some() {
            return GoesOn::Finished;
        }
        if drafts.next() != Some(&token) {
            return GoesOn::Yes;
        }
        next = rest.next();
    }
    GoesOn::NoToken
}

fn failed(key: u64, detail: Option<String>) -> Event {
    let detail = detail.unwrap_or_else(|| "no token was chosen".to_owned());
    Event::Failed { key, detail }
}

fn prefilled(
    sequence: Sequence,
    sampled: Sampled,
    finish: Option<FinishReason>,
    now: Instant,
) -> Event {
    let Sequence {
        key,
        blocks,
        prompt,
        ..
    } = sequence;
    let started = prompt.started.unwrap_or(prompt.submitted);
    Event::Prefilled {
        key,
        blocks,
        sampled,
        finish,
        cached_tokens: prompt.cached_tokens as u32,
        prompt_logprobs: prompt.logprobs_top.map(|_| prompt.logprobs),
        queue: started.saturating_duration_since(prompt.submitted),
        compute: now.saturating_duration_since(started),
    }
}
