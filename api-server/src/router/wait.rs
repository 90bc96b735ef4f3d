//! Looking ahead: how long a prompt that begins now would wait for a decode worker, once its first token is there.
//!
//! Ahead of it are the prompts that run and the KV that is staged; they and it share the places that decode workers have
//! free and those that become free. A worker whose `n` generations last `t` each has one place free every `t / n`, in the
//! mean (Little's law). Where nothing has ended yet nothing is known, and the answer is that there is room.

use std::time::Duration;

use baton_protocol::{ModelFingerprint, Role};
use tokio::time::Instant;

use super::Router;
use crate::membership::{Member, Membership};

/// What is known of the decode workers together.
#[derive(Default)]
struct Places {
    free: usize,
    /// Places that become free in a millisecond.
    per_ms: f64,
    pulling: usize,
}

impl Router {
    /// How long a prompt of so many tokens would wait for a decode worker with room, in the mean. Zero where there is room,
    /// or nothing is known.
    pub fn decode_wait(
        &self,
        members: &Membership,
        model: &ModelFingerprint,
        now: Instant,
        prompt_tokens: usize,
    ) -> Duration {
        let serving = || members.workers().filter(|m| m.serves(model, now));
        let mut places = Places::default();
        for member in serving().filter(|m| m.beat.role.decodes()) {
            if !self.count_places(member, prompt_tokens, &mut places) {
                return Duration::ZERO;
            }
        }
        let (mut prompts, mut own_staged, mut others_leased) = (0, 0, 0);
        for member in serving().filter(|m| m.beat.role.prefills()) {
            let (own, then) = (
                self.own(&member.beat.worker),
                self.own_at_beat(&member.beat.worker),
            );
            let load = &member.beat.load;
            // Of a worker that does both nobody can tell which of those that run are prompts.
            let running = match member.beat.role {
                Role::Both => 0,
                _ => load.running,
            };
            let others = (load.waiting as usize + running as usize).saturating_sub(then.prefills);
            prompts += own.prefills + others;
            own_staged += own.staged;
            others_leased += (load.leased as usize).saturating_sub(then.staged);
        }
        // What is being pulled is leased too, and has its place already.
        let ahead = prompts + own_staged + others_leased.saturating_sub(places.pulling) + 1;
        let missing = ahead.saturating_sub(places.free);
        if missing == 0 || places.per_ms <= 0.0 {
            return Duration::ZERO;
        }
        let wait_ms = (missing as f64 / places.per_ms).min(f64::from(u16::MAX) * 1e3);
        Duration::from_millis(wait_ms.round() as u64)
    }

    /// Adds a worker's places. False if it is full and nobody knows for how long.
    fn count_places(&self, member: &Member, prompt_tokens: usize, places: &mut Places) -> bool {
        let beat = &member.beat;
        let (own, then) = (self.own(&beat.worker), self.own_at_beat(&beat.worker));
        let waiting = match beat.role {
            Role::Both => 0,
            _ => beat.load.waiting as usize,
        };
        let beaten = waiting + beat.load.running as usize + beat.load.pulling as usize;
        let taken = own.decodes + beaten.saturating_sub(then.decodes);
        let batch = beat.capacity.batch as usize;
        let of_batch = batch.saturating_sub(taken);
        let need = (prompt_tokens + 1).div_ceil(beat.kv.block_tokens.max(1) as usize);
        let used = beat.load.blocks_used as usize + beat.load.blocks_quarantined as usize;
        let begun = own
            .decodes
            .saturating_sub(then.decodes)
            .saturating_mul(need);
        let blocks = (beat.capacity.blocks as usize).saturating_sub(used.saturating_add(begun));
        let of_blocks = match beat.role {
            // It takes over the blocks of what it has staged itself.
            Role::Both => of_batch,
            _ => blocks / need,
        };
        let free = of_batch.min(of_blocks);
        places.free += free;
        places.pulling += beat.load.pulling as usize;
        if beat.decode_ms > 0 {
            places.per_ms += taken.clamp(1, batch.max(1)) as f64 / f64::from(beat.decode_ms);
        }
        free > 0 || beat.decode_ms > 0
    }
}
