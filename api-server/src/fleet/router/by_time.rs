//! Choices by time, where workers tell what their steps cost.
//!
//! A prompt goes to who will have its first token soonest. A generation goes where its steps stay within what was promised between tokens:
//!
//! - as long as hardly any prompts wait, to the worker that ran its prompt, which has the KV; else to who has the fewest for its speed;
//! - when prompts wait, to a worker that runs none, and else to the one with the most generations that has room for another. So they are packed on few
//!   workers, and the others run prompts undisturbed: how many of each follows the load.
//!
//! KV that is moved comes after what is under way to the same worker. Where it would come so late that the answer as a whole were slower than promised, another
//! place is taken: the worker that ran the prompt, or one whose link is free.
//!
//! Where nobody has room within that time, it goes to who exceeds it least.
//!
//! Of what was begun since a worker's beat a router knows its own part, and takes the other API servers to have begun as much each: were each to take
//! the worker for as free as it looks, all of them would fill the same room.

use baton_protocol::{Load, Role, Tier};

use super::Given;
use super::columns::{CLASS_SHIFT, Lane};
use crate::fleet::membership::{Facts, Speed};

/// Generations are packed as soon as this part of the workers that run prompts have some to run.
pub(super) const PACK_FROM: f32 = 0.25;

/// Where all of a prompt's KV is there already, a worker may have this part of its batch more to do than others.
pub(super) const CACHED_PART: f32 = 0.125;

/// KV may come late by this part of the time that is promised for all tokens of an answer: workers keep the mean time between tokens to 0.94 of what
/// was promised, and this is of 0.9 of it.
pub(super) const LATE_PART: f32 = 0.06;

/// Steps' time that a worker with little to generate may take for prompts at once.
const SPARE_STEPS: f32 = 96.0;

/// Times that differ by less than this are equal, and workers are chosen in turn.
pub(super) const EQUAL_US: f32 = 250.0;

/// From here on a floating-point number of 32 bits has no room for fractions: to add this is to round.
const WHOLE_FROM: f32 = (1 << 23) as f32;

/// Whole numbers are below this.
const WHOLE_MOST: f32 = ((1 << 22) - 1) as f32;

/// Generations on one worker are fewer.
const MOST: i32 = 1 << 22;

/// Classes of places, best first.
const ROOM: [i32; 2] = [0, 1 << CLASS_SHIFT];
const LATE: i32 = 2 << CLASS_SHIFT;
const FULL: i32 = 3 << CLASS_SHIFT;

/// The next whole number, and the same with its fraction cut away. Neither branches nor calls.
#[inline(always)]
fn whole(number: f32) -> (i32, f32) {
    let number = if number < WHOLE_MOST {
        number
    } else {
        WHOLE_MOST
    };
    let number = if number > 0.0 { number } else { 0.0 };
    let sum = number + WHOLE_FROM;
    let bits = sum.to_bits().wrapping_sub(WHOLE_FROM.to_bits()) as i32;
    (bits, sum - WHOLE_FROM)
}

/// A number that is not negative, as an integer that grows with it.
#[inline(always)]
fn ordered(number: f32) -> i32 {
    (number.to_bits() >> 3) as i32 & ((1 << CLASS_SHIFT) - 1)
}

/// What is ahead of a prompt on one worker, in tokens.
pub(super) struct Queue {
    own: usize,
    others: usize,
    generates: bool,
}

impl Queue {
    /// For a request of this tier: interactive ones do not wait for batch.
    pub(super) fn of(Given { now: own, at_beat }: Given, load: &Load, tier: Tier) -> Self {
        let [mut mine, mut mine_then] = [own.prefill_tokens, at_beat.prefill_tokens];
        let mut told = load.waiting_tokens as usize;
        if tier == Tier::Interactive {
            mine = mine.saturating_sub(own.batch_tokens);
            mine_then = mine_then.saturating_sub(at_beat.batch_tokens);
            told = told.saturating_sub(load.batch_tokens as usize);
        }
        let others_generate = (load.decoding as usize).saturating_sub(at_beat.decodes);
        Self {
            own: mine,
            others: told.saturating_sub(mine_then),
            generates: own.decodes + others_generate > 0,
        }
    }

    /// Tokens; of the prompts of others one part of `parts` counts.
    fn tokens(&self, parts: usize) -> f32 {
        self.own as f32 + self.others as f32 / parts.max(1) as f32
    }

    /// Until the first token of a prompt that needs so many tokens behind those that are cached, with all that is ahead of it.
    pub(super) fn first_token_us(&self, speed: &Speed, need: f32, have: f32) -> f32 {
        let ahead = self.tokens(1);
        let steady = Pace::of(speed, self.generates).first_token_us(ahead, need, have);
        if !self.generates || !speed.limit_us.is_finite() {
            return steady;
        }
        let burst = Pace::burst(speed).first_token_us(ahead, need, have);
        let spare_us = spare_us(speed);
        match burst < steady {
            true if burst <= spare_us => burst,
            true => spare_us + steady * (1.0 - spare_us / burst),
            false => steady,
        }
    }
}

/// How long prompts may take the longest steps there are before what generates has no time to spare any more. A sequence may be late by half of
/// its later tokens' time, 64 tokens' at most, if these give it back. How much of that is used already nobody tells; the busier a worker is with generating,
/// the more is used and the less is given back. Found with planned clusters: with less, prompts are refused that would have come in time; with more, goodput
/// beyond the knee falls.
fn spare_us(speed: &Speed) -> f32 {
    let free = (1.0 - speed.decode_us / speed.limit_us).max(0.0);
    SPARE_STEPS * speed.limit_us * free.powi(3)
}

/// How fast a worker runs prompts now.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pace {
    /// Before the first of them: a step under way ends first, in the mean half of one.
    pub(super) wait_us: f32,
    pub(super) token_us: f32,
    pub(super) pair_us: f32,
}

impl Pace {
    /// `generates`: some sequences generate there.
    pub(super) fn of(speed: &Speed, generates: bool) -> Self {
        match generates {
            true => Self::with(speed, speed.beside_us, speed.decode_us / 2.0),
            false => Self::with(speed, speed.alone_us, 0.0),
        }
    }

    /// In the longest steps there are, beside sequences that generate.
    fn burst(speed: &Speed) -> Self {
        Self::with(speed, speed.burst_us, speed.decode_us / 2.0)
    }

    fn with(speed: &Speed, token_us: f32, wait_us: f32) -> Self {
        Self {
            wait_us,
            token_us,
            pair_us: speed.pair_us * (token_us / speed.alone_us.max(1e-6)),
        }
    }

    /// Until a prompt's first token: `ahead` tokens of other prompts, then `need` of its own behind `have` that are cached.
    #[inline(always)]
    pub(super) fn first_token_us(&self, ahead: f32, need: f32, have: f32) -> f32 {
        self.wait_us + (ahead + need) * self.token_us + need * (have + need * 0.5) * self.pair_us
    }

    /// The key of a worker with so much ahead, for a prompt of so many tokens of which it has some.
    #[inline(always)]
    pub(super) fn key(&self, ahead: f32, tokens: f32, have: f32) -> i32 {
        let need = tokens - have;
        let need = if need > 0.0 { need } else { 0.0 };
        whole(self.first_token_us(ahead, need, have) * (1.0 / EQUAL_US)).0
    }
}

/// Tokens of a sequence of those that generate on a worker, in the mean of their time: at least as many as they have now. `None` if there are none.
pub(super) fn lifetime_mean(given: &Given, load: &Load) -> Option<f32> {
    let mean = |tokens: f32, of: f32| (of > 0.0).then(|| tokens / of);
    let own = mean(given.now.decode_tokens as f32, given.now.decodes as f32);
    let now = mean(load.decoding_tokens as f32, load.decoding as f32);
    match (own, now) {
        (Some(own), Some(now)) => Some(own.max(now)),
        (own, now) => own.or(now),
    }
}

/// What a step of a worker's sequences takes in the mean of their time beyond what it took when the worker beat. Many that began
/// together have little KV then, and much of it together later.
pub(super) fn growth_us(given: &Given, load: &Load, speed: &Speed) -> f32 {
    let mean = lifetime_mean(given, load).unwrap_or(0.0);
    let more = mean * load.decoding as f32 - load.decoding_tokens as f32;
    more.max(0.0) * speed.kv_token_us
}

/// A generation that looks for a place.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arrives {
    /// Of the sequence.
    pub(super) tokens: f32,
    /// Those that it is expected to have in the mean of its time.
    pub(super) lifetime_tokens: f32,
    /// Longest step that keeps what it was promised; 0 if that is what workers promise.
    pub(super) limit_us: f32,
    /// Steps that its KV may come late.
    pub(super) late_steps: f32,
    /// Generations are packed.
    pub(super) packs: bool,
}

/// A worker on which a generation could run.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Generates {
    /// What a step takes with one more sequence in it, without its KV,
    pub(super) step_us: f32,
    /// and for each token of that.
    pub(super) step_token_us: f32,
    /// Longest step that keeps what the worker promises.
    pub(super) limit_us: f32,
    /// Sequences that generate.
    pub(super) generates: f32,
    pub(super) batch: f32,
    /// Blocks that are free, less one for each sequence that is coming.
    pub(super) blocks_left: f32,
    /// Blocks for each token of a sequence, times the number of those that are coming.
    pub(super) blocks_per_token: f32,
    /// Until the KV is there that is under way,
    pub(super) link_us: f32,
    /// and for each token of KV that is moved after it.
    pub(super) link_token_us: f32,
    /// 1 where it runs prompts too, and 0 where not.
    pub(super) does_both: f32,
}

impl Generates {
    fn of(given: Given, facts: &Facts, speed: &Speed, routers: f32) -> Self {
        let Given { now: own, at_beat } = given;
        let load = &facts.load;
        let begun = (own.decodes as f32 - at_beat.decodes as f32) * routers + load.pulling as f32;
        let coming = begun.max(0.0);
        let (step_us, step_token_us) = match lifetime_mean(&given, load) {
            Some(mean) => (speed.step_us(begun, mean), 0.0),
            None => (
                speed.decode_us + coming * speed.row_us,
                coming * speed.kv_token_us,
            ),
        };
        let (blocks_left, blocks_per_token) = match facts.capacity.blocks {
            0 => (f32::INFINITY, 0.0), // it says nothing of its blocks
            blocks => {
                let used = load.blocks_used as f32 + load.blocks_quarantined as f32;
                let left = blocks as f32 - used - (coming + 1.0);
                (left, (coming + 1.0) / facts.block_tokens as f32)
            }
        };
        let [pulls, pulls_then] = [own, at_beat].map(|jobs| jobs.pull_tokens as f32);
        let pulled = pulls + (pulls - pulls_then).max(0.0) * (routers - 1.0);
        // Taken to be as long as the one that is to be placed.
        let others_pull = (load.pulling as f32 - at_beat.pulls as f32).max(0.0);
        Self {
            step_us: step_us + speed.row_us + growth_us(&given, load, speed),
            step_token_us: step_token_us + speed.kv_token_us,
            limit_us: speed.limit_us,
            generates: (load.decoding as f32 + begun).max(0.0),
            batch: facts.capacity.batch as f32,
            blocks_left,
            blocks_per_token,
            link_us: pulled * facts.link_token_us,
            link_token_us: (1.0 + others_pull) * facts.link_token_us,
            does_both: f32::from(u8::from(facts.role == Role::Both)),
        }
    }

    #[inline(always)]
    fn step_us(&self, arrives: Arrives) -> f32 {
        self.step_us + self.step_token_us * arrives.lifetime_tokens
    }

    #[inline(always)]
    fn limit_us(&self, arrives: Arrives) -> f32 {
        match arrives.limit_us > 0.0 {
            true => arrives.limit_us,
            false => self.limit_us,
        }
    }

    /// The key of a worker that has the KV of so many tokens and reads that of the others.
    #[inline(always)]
    pub(super) fn key(&self, arrives: Arrives, have: f32) -> i32 {
        let (step_us, limit_us) = (self.step_us(arrives), self.limit_us(arrives));
        let (steps, coarse) = whole(step_us * (1.0 / EQUAL_US));
        let have = if have < arrives.tokens {
            have
        } else {
            arrives.tokens
        };
        let late_us = self.link_us + (arrives.tokens - have) * self.link_token_us;
        let is_late = late_us > arrives.late_steps * limit_us;
        let is_full = (step_us > limit_us)
            | (self.generates >= self.batch)
            | (arrives.tokens * self.blocks_per_token > self.blocks_left);
        // As many as by its speed, not all to the fastest: who was measured wrongly has some to do too, by which it is measured again.
        let cached = CACHED_PART * (have / arrives.tokens);
        let others = self.generates - cached * self.batch;
        let others = if others > 0.0 { others } else { 0.0 };
        let least = ordered((1.0 + coarse) * (1.0 + others) * (1.0 - cached));
        let most = self.most(false);
        let key = match (arrives.packs, self.does_both > 0.0) {
            (true, true) => ROOM[1] | most,
            (true, false) => ROOM[0] | least,
            (false, _) => ROOM[1] | least,
        };
        let key = if is_late {
            LATE | whole(late_us * (1.0 / EQUAL_US)).0
        } else {
            key
        };
        if is_full { FULL | steps } else { key }
    }

    /// The key of the worker that ran the prompt.
    pub(super) fn own_key(&self, arrives: Arrives) -> i32 {
        let step_us = self.step_us(arrives);
        if step_us > self.limit_us(arrives) || self.generates >= self.batch {
            return FULL | whole(step_us * (1.0 / EQUAL_US)).0;
        }
        match arrives.packs {
            true => ROOM[1] | self.most(true),
            false => ROOM[0],
        }
    }

    /// The most generations first; among equals the one that has the KV.
    #[inline(always)]
    fn most(&self, is_own: bool) -> i32 {
        (MOST.wrapping_sub(whole(self.generates).0) << 1) | i32::from(!is_own)
    }
}

impl Lane {
    /// What choices read of a worker that says what its steps cost. `routers`: how many API servers there are.
    pub(super) fn of(given: Given, facts: &Facts, routers: usize) -> Self {
        let Given {
            now: own,
            at_beat: _,
        } = given;
        let load = &facts.load;
        // Of a worker that does both nobody can tell which of those that run are prompts.
        let running = match facts.role {
            Role::Both => 0,
            _ => load.running,
        };
        let told = [load.waiting, running, load.leased].map(u64::from);
        let ahead = (own.prefills + own.staged) as u64 + told.iter().sum::<u64>();
        let prompts_ahead = match facts.role.prefills() {
            true => ahead.min(u32::MAX.into()) as u32,
            false => 0,
        };
        let Some(speed) = &facts.speed else {
            return Self {
                prompts_ahead,
                ..Self::default()
            };
        };
        let [interactive, batch] =
            [Tier::Interactive, Tier::Batch].map(|tier| Queue::of(given, load, tier));
        Self {
            ahead: [interactive.tokens(routers), batch.tokens(routers)],
            pace: Pace::of(speed, interactive.generates),
            generates: Generates::of(given, facts, speed, routers.max(1) as f32),
            block_tokens: facts.block_tokens as f32,
            prompts_ahead,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompts_first_token_comes_after_what_is_ahead_and_what_it_needs() {
        let few = Speed {
            alone_us: 20.0,
            beside_us: 40.0,
            burst_us: 25.0,
            pair_us: 0.001,
            decode_us: 4_000.0,
            row_us: 2.0,
            kv_token_us: 0.03,
            limit_us: 9_000.0,
        };
        let first = |ahead, need, have, generates| {
            Pace::of(&few, generates).first_token_us(ahead, need, have)
        };
        assert!(first(0.0, 500.0, 0.0, false) < first(0.0, 500.0, 0.0, true));
        assert!(first(0.0, 500.0, 0.0, true) < first(500.0, 500.0, 0.0, true));
        // What is cached need not be computed, but is attended to.
        assert!(first(0.0, 100.0, 400.0, true) < first(0.0, 500.0, 0.0, true));
        assert!(first(0.0, 100.0, 400.0, true) > first(0.0, 100.0, 0.0, true));
    }

    #[test]
    fn what_a_worker_has_to_spare_is_counted_on_until_it_is_used() {
        let speed = |decode_us| Speed {
            alone_us: 20.0,
            beside_us: 40.0,
            burst_us: 25.0,
            pair_us: 0.0,
            decode_us,
            row_us: 2.0,
            kv_token_us: 0.03,
            limit_us: 9_000.0,
        };
        let first = |speed: &Speed, tokens| {
            let queue = Queue {
                own: 0,
                others: 0,
                generates: true,
            };
            queue.first_token_us(speed, tokens, 0.0)
        };
        let (quiet, busy) = (speed(4_000.0), speed(8_900.0));
        // Little is done at once, ten times as much partly so, and where all time goes to generating nothing is.
        assert_eq!(first(&quiet, 2_000.0), 2_000.0 + 2_000.0 * 25.0);
        let steady = |tokens: f32| 2_000.0 + tokens * 40.0;
        let partly = first(&quiet, 20_000.0);
        let saved = steady(20_000.0) - partly;
        assert!(
            partly > 2_000.0 + 20_000.0 * 25.0 && saved > 10_000.0,
            "{partly}"
        );
        let (more, much) = (first(&quiet, 40_000.0), first(&quiet, 80_000.0));
        assert!(
            more > partly && (much - more) / 40_000.0 > 39.0,
            "{more} {much}"
        );
        assert!((first(&busy, 2_000.0) - 4_450.0 - 2_000.0 * 40.0).abs() < 1.0);
        // Who promises no time has no debts.
        let free = Speed {
            limit_us: f32::INFINITY,
            ..quiet
        };
        assert_eq!(first(&free, 2_000.0), steady(2_000.0));
    }

    #[test]
    fn whole_numbers_are_those_next_to_any_and_bounded() {
        let of = |number| whole(number);
        assert_eq!(of(0.0), (0, 0.0));
        assert_eq!(of(7.4), (7, 7.0));
        assert_eq!(of(7.6), (8, 8.0));
        assert_eq!(of(-3.0), (0, 0.0));
        for large in [1e9, f32::INFINITY, f32::NAN] {
            assert_eq!(of(large).0, (1 << 22) - 1);
        }
    }

    #[test]
    fn ordered_numbers_grow_and_stay_below_the_class() {
        let all = [
            0.0,
            1e-3,
            0.5,
            1.0,
            1.5,
            300.0,
            1e9,
            f32::MAX,
            f32::INFINITY,
        ];
        assert!(
            all.windows(2)
                .all(|pair| ordered(pair[0]) < ordered(pair[1]))
        );
        assert!(ordered(f32::NAN) < 1 << CLASS_SHIFT && ordered(f32::INFINITY) < 1 << CLASS_SHIFT);
    }
}
