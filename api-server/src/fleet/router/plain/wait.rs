//! The wait for a decode worker by the plainest rule: all workers with everything that is known of them.

use super::*;
use crate::fleet::membership::limit_us;
use crate::fleet::router::by_time::{Pace, growth_us, lifetime_mean};
use crate::fleet::router::wait::LASTS;

impl Plain {
    /// For a prompt of so many tokens, and an answer of `output` where none has ended before.
    pub(super) fn decode_wait(
        &self,
        rules: Constraints<'_>,
        prompt_tokens: usize,
        output: usize,
    ) -> Duration {
        let serving = || {
            let all = self.workers.values();
            all.filter(|known| known.serves(rules.model, rules.now))
        };
        let decoders: Vec<_> = serving().filter(|k| k.beat.role.decodes()).collect();
        let prefillers: Vec<_> = serving().filter(|k| k.beat.role.prefills()).collect();
        let lifetime = (prompt_tokens + output / 2) as f32;
        let is_interactive = rules.service.tier == Tier::Interactive;
        let itl_ms = rules.service.itl_ms;
        let given = |known: &Known| {
            let [now, at_beat] = self.counted(&known.beat.worker);
            Given { now, at_beat }
        };

        let (mut free, mut beyond, mut per_ms, mut pulling) = (0, 0, 0.0, 0);
        // Of workers that tell their cost: places free, generations there, as many as they keep to the time, how many workers they are, and how many do both.
        let (mut timed_free, mut timed_taken, mut most, mut timed, mut both) =
            (0, 0, 0.0, 0.0, 0.0);
        for known in decoders {
            let (Given { now: own, at_beat }, load) = (given(known), known.beat.load);
            let is_both = known.beat.role == Role::Both;
            let waiting = if is_both { 0 } else { load.waiting };
            let told = (waiting + load.running + load.pulling) as usize;
            let generate = own.decodes + told.saturating_sub(at_beat.decodes);
            let others_batch = (load.batch_decoding as usize).saturating_sub(at_beat.batch_decodes);
            let yielding = match is_interactive {
                true => own.batch_decodes + others_batch,
                false => 0,
            };
            let taken = generate.saturating_sub(yielding);
            let capacity = known.beat.capacity;
            let speed = Speed::of(&known.beat);
            let mut places = capacity.batch as usize;
            if let (Some(speed), Some(itl_ms)) = (&speed, itl_ms) {
                let limit = limit_us(itl_ms) - growth_us(&given(known), &load, speed);
                let mean = lifetime_mean(&given(known), &load).unwrap_or(lifetime);
                let now = load.decoding as f32;
                timed_taken += taken;
                most += (now + speed.room(limit, mean)).max(0.0);
                timed += 1.0;
                both += f32::from(u8::from(is_both));
                places = places.min((now + speed.room(limit, lifetime)).max(1.0) as usize);
            }
            let need = (prompt_tokens + 1).div_ceil(known.beat.kv.block_tokens as usize);
            let used = (load.blocks_used + load.blocks_quarantined) as usize;
            let coming = own.decodes.saturating_sub(at_beat.decodes) * need;
            let blocks = (capacity.blocks as usize).saturating_sub(used + coming) / need;
            let own_free = match is_both {
                true => places.saturating_sub(taken),
                false => places.saturating_sub(taken).min(blocks),
            };
            beyond += taken.saturating_sub(places);
            free += own_free;
            if speed.is_some() && itl_ms.is_some() {
                timed_free += own_free;
            }
            pulling += load.pulling as usize;
            let lasts_ms = match (known.beat.decode_ms, &speed) {
                (0, Some(speed)) => output as f32 * speed.step_us(own_free as f32, lifetime) / 1e3,
                (told, _) => told as f32,
            };
            if own_free == 0 && lasts_ms <= 0.0 {
                return Duration::ZERO;
            }
            if lasts_ms > 0.0 {
                let then = generate.max(taken + own_free);
                let then = then.clamp(1, (capacity.batch as usize).max(1));
                per_ms += then as f64 / f64::from(lasts_ms);
            }
        }

        let (mut ahead, mut leased) = (1, 0);
        let (mut run_prompts, mut apart, mut prompt_us) = (0.0, 0.0, 0.0);
        for known in prefillers {
            let (Given { now: own, at_beat }, load) = (given(known), known.beat.load);
            if let Some(speed) = Speed::of(&known.beat) {
                run_prompts += 1.0;
                apart += f32::from(u8::from(known.beat.role == Role::Context));
                prompt_us += Pace::of(&speed, false).first_token_us(0.0, prompt_tokens as f32, 0.0);
            }
            let running = match known.beat.role {
                Role::Both => 0,
                _ => load.running,
            };
            let others = ((load.waiting + running) as usize).saturating_sub(at_beat.prefills);
            let tokens = u64::from(load.waiting_tokens);
            let of_interactive = tokens.saturating_sub(load.batch_tokens.into());
            ahead += match is_interactive {
                true if load.batch_tokens > 0 => {
                    let own = (own.prefills + own.staged).saturating_sub(own.batch_prompts);
                    own + (others as u64 * of_interactive).div_ceil(tokens.max(1)) as usize
                }
                true => (own.prefills + own.staged).saturating_sub(own.batch_prompts) + others,
                false => own.prefills + own.staged + others,
            };
            leased += (load.leased as usize).saturating_sub(at_beat.staged);
        }
        if let Some(itl_ms) = itl_ms
            && both > 0.0
            && run_prompts > 0.0
            && most > 0.0
            && itl_ms > 0
        {
            let lasts = Duration::from_millis(u64::from(itl_ms) * output as u64).max(LASTS);
            let share = prompt_us / run_prompts / 1e6 / lasts.as_secs_f32();
            let each = most / timed;
            let bound = (most + apart * each) / (1.0 + share * each);
            let bound = (bound + bound.sqrt() / 2.0).clamp(1.0, most.max(1.0)) as usize;
            free -= timed_free - timed_free.min(bound.saturating_sub(timed_taken));
            beyond = beyond.max(timed_taken.saturating_sub(bound));
        }
        let ahead = ahead + usize::saturating_sub(leased, pulling);
        let missing = ahead.saturating_sub(free);
        if missing == 0 || per_ms <= 0.0 {
            return Duration::ZERO;
        }
        let wait_ms = ((missing + beyond) as f64 / per_ms).min(f64::from(u16::MAX) * 1e3);
        Duration::from_millis(wait_ms.round() as u64)
    }
}
