//! Looking ahead: how long a prompt that begins now would wait for a decode worker, once its first token is there.
//!
//! Ahead of it are the prompts that run and the KV that is staged; they and it share the places that decode workers have
//! free and those that become free. A worker whose `n` generations last `t` each has one place free every `t / n`, in the
//! mean (Little's law); whoever waits does so for workers that are full by then. Places that batch requests have are free for interactive
//! ones. Where nothing has ended yet and a worker does not say what its steps cost nothing is known, and the answer is that
//! there is room.

use std::time::Duration;

use baton_protocol::{Load, ModelFingerprint, Role, Service, Tier};
use tokio::time::Instant;

use super::by_time::{Pace, growth_us, lifetime_mean};
use super::{Given, Router};
use crate::fleet::membership::{Facts, Membership, Speed, limit_us};

/// How long generations last that have to leave time for prompts. Found with planned clusters: with less, loads in bursts of two seconds are refused that
/// would be kept.
pub(super) const LASTS: Duration = Duration::from_secs(4);

/// What is known of the decode workers together. Of a worker that says what its steps cost, only as many places count as keep the time between
/// tokens that the request was promised.
#[derive(Default)]
struct Places {
    free: usize,
    /// Generations beyond the places: steps take longer with each of them, and an end makes no room while there are any.
    beyond: usize,
    /// Places that become free in a millisecond.
    per_ms: f64,
    pulling: usize,
    /// Of workers that say what their steps cost.
    timed: Timed,
}

/// What is known of the decode workers that say what their steps cost, together.
#[derive(Default)]
struct Timed {
    /// Places of them that are free, and generations under way.
    free: usize,
    taken: usize,
    /// As many generations as keep the promised time, if they run no prompts.
    most: f32,
    /// How many they are; those of them that run prompts too.
    workers: f32,
    both: f32,
}

/// What prompts need of the workers' time.
#[derive(Default)]
struct Prompts {
    /// Workers that run prompts and do not generate.
    apart: f32,
    /// Those that run prompts, and the time of a prompt on all of them, one after the other.
    workers: f32,
    prompt_us: f32,
}

impl Prompts {
    fn add(&mut self, speed: &Speed, decodes: bool, tokens: f32) {
        self.workers += 1.0;
        self.prompt_us += Pace::of(speed, false).first_token_us(0.0, tokens, 0.0);
        if !decodes {
            self.apart += 1.0;
        }
    }
}

/// What a wait depends on of one worker, whatever waits: worked out when a beat comes or a job begins or ends.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Room {
    prefills: bool,
    decodes: bool,
    /// Generations there, and under way to it; how many of them are batch requests', and how many it takes.
    generate: usize,
    batch_decodes: usize,
    batch: usize,
    pulling: usize,
    /// How long its generations last, in milliseconds; 0 if none has ended.
    decode_ms: u32,
    block_tokens: usize,
    /// Blocks that were free when it beat, and sequences that came since.
    blocks: usize,
    begun: usize,
    /// Prompts that may want a place before an interactive one that comes now, and before a batch one.
    prompts: [usize; 2],
    /// Prompts of other API servers whose KV waits.
    others_leased: usize,
    told: Option<Told>,
}

/// Of a worker that says what its steps cost.
#[derive(Clone, Copy, Debug)]
struct Told {
    speed: Speed,
    /// Sequences that generated when it beat.
    decoding: f32,
    /// See [`growth_us`] and [`lifetime_mean`].
    growth_us: f32,
    lifetime_mean: Option<f32>,
}

/// What there is to be a place for.
#[derive(Clone, Copy)]
struct Wanted {
    prompt_tokens: usize,
    lifetime_tokens: usize,
    output_tokens: usize,
}

/// Those of so many prompts that are no batch requests', by what tokens of a worker's prompts are.
fn not_batch(prompts: usize, load: &Load) -> usize {
    let all = u64::from(load.waiting_tokens).max(1);
    let interactive = u64::from(load.waiting_tokens.saturating_sub(load.batch_tokens));
    match load.batch_tokens {
        0 => prompts,
        _ => (prompts as u64 * interactive).div_ceil(all) as usize,
    }
}

impl Places {
    /// Bounds the places by the time of prompts. Each generation that ends makes room for another, whose prompt takes time on workers that generate too:
    /// `n` generations, each of `lasts`, bring `n · prompt / lasts` of a worker's time in prompts. Without this bound a cluster that is loaded all at
    /// once is filled with generations that leave no time for the prompts that follow them. Generations that end sooner than [`LASTS`] count less: what a burst
    /// brought of them is gone when the next one comes.
    fn leave_time(&mut self, prompts: &Prompts, lasts: Duration) {
        let Timed {
            free,
            taken,
            most,
            workers,
            both,
        } = self.timed;
        if both == 0.0 || prompts.workers == 0.0 || most <= 0.0 || lasts.is_zero() {
            return;
        }
        let prompt_s = prompts.prompt_us / prompts.workers / 1e6;
        let share = prompt_s / lasts.max(LASTS).as_secs_f32();
        let each = most / workers;
        // Prompts run on workers of their own first; what is left of them, `n · share - apart` workers' time, is taken from places.
        let bound = (most + prompts.apart * each) / (1.0 + share * each);
        // As many more as their number swings by itself, half of it.
        let bound = bound + bound.sqrt() / 2.0;
        let bound = bound.clamp(1.0, most.max(1.0)) as usize;
        self.free -= free.saturating_sub(bound.saturating_sub(taken));
        self.beyond = self.beyond.max(taken.saturating_sub(bound));
    }
}

impl Router {
    /// How long a prompt of so many tokens, and at most so many of its answer, would wait for a decode worker with room, in the mean. Zero where there is room,
    /// or nothing is known.
    pub fn decode_wait(
        &mut self,
        members: &Membership,
        model: &ModelFingerprint,
        service: Service,
        now: Instant,
        (prompt_tokens, max_tokens): (usize, usize),
    ) -> Duration {
        if !self.eligible.bring_up(members, model, now) {
            return Duration::ZERO;
        }
        let mut places = Places::default();
        let wanted = Wanted {
            prompt_tokens,
            lifetime_tokens: self.lifetime_tokens(prompt_tokens, max_tokens),
            output_tokens: self.output_tokens(max_tokens),
        };
        // Where all that may be ahead, whoever serves, have places, this one has too. If a time between tokens was promised prompts bound the places,
        // which takes a look at all workers.
        let enough = match service.itl_ms {
            None => usize::try_from(self.columns.prompts_ahead()).unwrap_or(usize::MAX),
            Some(_) => usize::MAX,
        };
        let computed = self.prompt_tokens.unwrap_or(prompt_tokens as f32);
        let mut time = Prompts::default();
        let (mut prompts, mut others_leased) = (0, 0);
        let serving = &self.eligible.serving;
        for (slot, room) in self.rooms.iter().enumerate() {
            if !serving.contains(slot) {
                continue;
            }
            if places.free > enough {
                return Duration::ZERO;
            }
            if room.decodes && !room.count_places(service, wanted, &mut places) {
                return Duration::ZERO;
            }
            if !room.prefills {
                continue;
            }
            if let Some(told) = &room.told {
                time.add(&told.speed, room.decodes, computed);
            }
            prompts += room.prompts[match service.tier {
                Tier::Interactive => 0,
                Tier::Batch => 1,
            }];
            others_leased += room.others_leased;
        }
        if let Some(itl_ms) = service.itl_ms {
            let tokens = u32::try_from(wanted.output_tokens).unwrap_or(u32::MAX);
            let lasts = Duration::from_millis(itl_ms.into()).saturating_mul(tokens);
            places.leave_time(&time, lasts);
        }
        // What is being pulled is leased too, and has its place already.
        let ahead = prompts + others_leased.saturating_sub(places.pulling) + 1;
        let missing = ahead.saturating_sub(places.free);
        if missing == 0 || places.per_ms <= 0.0 {
            return Duration::ZERO;
        }
        let missing = missing + places.beyond;
        let wait_ms = (missing as f64 / places.per_ms).min(f64::from(u16::MAX) * 1e3);
        Duration::from_millis(wait_ms.round() as u64)
    }
}

impl Room {
    pub(super) fn of(given: Given, facts: &Facts) -> Self {
        let Given { now: own, at_beat } = given;
        let (load, role) = (&facts.load, facts.role);
        let [waiting, running, pulling] =
            [load.waiting, load.running, load.pulling].map(|jobs| jobs as usize);
        // Of a worker that does both nobody can tell which of those that run are prompts, and what waits there are prompts.
        let (to_generate, to_prefill) = match role {
            Role::Both => (running + pulling, waiting),
            _ => (waiting + running + pulling, waiting + running),
        };
        let others = to_prefill.saturating_sub(at_beat.prefills);
        let own_ahead = own.prefills + own.staged;
        let interactive = own_ahead.saturating_sub(own.batch_prompts) + not_batch(others, load);
        let used = load.blocks_used as usize + load.blocks_quarantined as usize;
        let others_batch = (load.batch_decoding as usize).saturating_sub(at_beat.batch_decodes);
        Self {
            prefills: role.prefills(),
            decodes: role.decodes(),
            generate: own.decodes + to_generate.saturating_sub(at_beat.decodes),
            batch_decodes: own.batch_decodes + others_batch,
            batch: facts.capacity.batch as usize,
            pulling,
            decode_ms: facts.decode_ms,
            block_tokens: facts.block_tokens as usize,
            blocks: (facts.capacity.blocks as usize).saturating_sub(used),
            begun: own.decodes.saturating_sub(at_beat.decodes),
            prompts: [interactive, own_ahead + others],
            others_leased: (load.leased as usize).saturating_sub(at_beat.staged),
            told: facts.speed.map(|speed| Told {
                speed,
                decoding: load.decoding as f32,
                growth_us: growth_us(&given, load, &speed),
                lifetime_mean: lifetime_mean(&given, load),
            }),
        }
    }

    /// Adds its places. False if it is full and nobody knows for how long.
    fn count_places(&self, service: Service, wanted: Wanted, places: &mut Places) -> bool {
        // Places of batch requests are free for interactive ones, and not for batch ones.
        let taken = match service.tier {
            Tier::Interactive => self.generate.saturating_sub(self.batch_decodes),
            Tier::Batch => self.generate,
        };
        let mut batch = self.batch;
        let timed = self.told.as_ref().zip(service.itl_ms);
        if let Some((told, itl_ms)) = timed {
            // More would make its steps longer than was promised; one is always taken.
            let limit_us = limit_us(itl_ms) - told.growth_us;
            let wanted = wanted.lifetime_tokens as f32;
            let room = told.speed.room(limit_us, wanted);
            let like_others = match told.lifetime_mean {
                Some(mean) => told.speed.room(limit_us, mean),
                None => room,
            };
            let timed = &mut places.timed;
            timed.taken += taken;
            timed.most += (told.decoding + like_others).max(0.0);
            timed.workers += 1.0;
            if self.prefills {
                timed.both += 1.0;
            }
            batch = batch.min((told.decoding + room).max(1.0) as usize);
        }
        places.beyond += taken.saturating_sub(batch);
        let of_batch = batch.saturating_sub(taken);
        let free = match self.prefills {
            // It takes over the blocks of what it has staged itself.
            true => of_batch,
            false => {
                let need = (wanted.prompt_tokens + 1).div_ceil(self.block_tokens);
                let begun = self.begun.saturating_mul(need);
                of_batch.min(self.blocks.saturating_sub(begun) / need)
            }
        };
        places.free += free;
        if timed.is_some() {
            places.timed.free += free;
        }
        places.pulling += self.pulling;
        // Who waits does so until after the free places are taken: as many generate by then, and as many leave.
        let then = self.generate.max(taken.saturating_add(free));
        let lasts_ms = match (self.decode_ms, &self.told) {
            (0, Some(told)) => {
                let step_us = told
                    .speed
                    .step_us(free as f32, wanted.lifetime_tokens as f32);
                wanted.output_tokens as f32 * step_us / 1e3
            }
            (lasts_ms, _) => lasts_ms as f32,
        };
        if lasts_ms > 0.0 {
            let most = self.batch.max(1);
            places.per_ms += then.clamp(1, most) as f64 / f64::from(lasts_ms);
        }
        free > 0 || lasts_ms > 0.0
    }
}
