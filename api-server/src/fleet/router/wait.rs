//! Looking ahead: how long a prompt that begins now would wait for a decode worker, once its first token is there.
//!
//! Ahead of it are the prompts that run and the KV that is staged; they and it share the places that decode workers have
//! free and those that become free. A worker whose `n` generations last `t` each has one place free every `t / n`, in the
//! mean (Little's law). Where nothing has ended yet nothing is known, and the answer is that there is room.

use std::time::Duration;

use baton_protocol::{ModelFingerprint, Role};
use tokio::time::Instant;

use super::{Given, Router, Serving, given};
use crate::fleet::membership::{Facts, Membership, Slot};

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
        let Some(serving) = Serving::new(members, model, now) else {
            return Duration::ZERO;
        };
        let mut places = Places::default();
        for (slot, member) in members.in_any_order() {
            if member.facts.role.decodes()
                && serving.has(member)
                && !self.count_places((slot, &member.facts), prompt_tokens, &mut places)
            {
                return Duration::ZERO;
            }
        }
        let (mut prompts, mut own_staged, mut others_leased) = (0, 0, 0);
        for (slot, member) in members.in_any_order() {
            if !member.facts.role.prefills() || !serving.has(member) {
                continue;
            }
            let Given { now: own, at_beat } = given(&self.given, slot);
            let load = &member.facts.load;
            // Of a worker that does both nobody can tell which of those that run are prompts.
            let running = match member.facts.role {
                Role::Both => 0,
                _ => load.running,
            };
            let others =
                (load.waiting as usize + running as usize).saturating_sub(at_beat.prefills);
            prompts += own.prefills + others;
            own_staged += own.staged;
            others_leased += (load.leased as usize).saturating_sub(at_beat.staged);
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
    fn count_places(
        &self,
        (slot, facts): (Slot, &Facts),
        prompt_tokens: usize,
        places: &mut Places,
    ) -> bool {
        let Given { now: own, at_beat } = given(&self.given, slot);
        let waiting = match facts.role {
            Role::Both => 0,
            _ => facts.load.waiting as usize,
        };
        let beaten = waiting + facts.load.running as usize + facts.load.pulling as usize;
        let taken = own.decodes + beaten.saturating_sub(at_beat.decodes);
        let batch = facts.capacity.batch as usize;
        let of_batch = batch.saturating_sub(taken);
        let need = (prompt_tokens + 1).div_ceil(facts.block_tokens as usize);
        let used = facts.load.blocks_used as usize + facts.load.blocks_quarantined as usize;
        let begun = own
            .decodes
            .saturating_sub(at_beat.decodes)
            .saturating_mul(need);
        let blocks = (facts.capacity.blocks as usize).saturating_sub(used.saturating_add(begun));
        let of_blocks = match facts.role {
            // It takes over the blocks of what it has staged itself.
            Role::Both => of_batch,
            _ => blocks / need,
        };
        let free = of_batch.min(of_blocks);
        places.free += free;
        places.pulling += facts.load.pulling as usize;
        if facts.decode_ms > 0 {
            places.per_ms += taken.clamp(1, batch.max(1)) as f64 / f64::from(facts.decode_ms);
        }
        free > 0 || facts.decode_ms > 0
    }
}
