//! What the context worker does next.

use super::Model;
use super::state::{Context, Next, Phase, Renewal, Request, State, Surely};

impl Model {
    pub(super) fn context_worker(&self, state: &State, r: usize, next: &mut Vec<Next>) {
        let request = &state.requests[r];
        let mut put = |what, state| next.push((Surely::Comes, what, r, state));
        let need = self.requests[r].0 + request.made;
        // `Scheduler::admit_prompt`: the first of the queue, with all its blocks.
        let is_first = state.waiting.first() == Some(&r);
        if request.context == Context::Waiting && self.rules.whole_prompts {
            if is_first && state.context_free >= need {
                let mut after = state.clone();
                after.waiting.retain(|other| *other != r);
                after.context_free -= need;
                after.requests[r].context_blocks = need;
                after.requests[r].context = Context::Running;
                put("the prompt is admitted", after);
            }
        } else if request.context == Context::Waiting && state.context_free > 0 {
            let mut after = state.clone();
            after.context_free -= 1;
            after.requests[r].context_blocks += 1;
            if after.requests[r].context_blocks == need {
                after.waiting.retain(|other| *other != r);
                after.requests[r].context = Context::Running;
            }
            put("the prompt takes a block", after);
        }
        // `Engine::collect_prefills`, `Desk::on_computed`: a chunk that is not the last. After the first the handle goes out.
        if request.context == Context::Running && request.computed + 1 < need {
            let mut after = state.clone();
            let request = &mut after.requests[r];
            request.computed += 1;
            if request.computed == 1 {
                (request.is_current, request.is_void) = (true, false);
                request.begun = request.phase == Phase::Prefilling;
            }
            put("a chunk is done", after);
        }
        // `BlockTable::index` against `BlockTable::index_in_place`.
        if request.context == Context::Running && request.computed > 0 && !self.rules.blocks_stay {
            let mut after = state.clone();
            after.requests[r].is_void = true;
            next.push((Surely::Perhaps, "its blocks are exchanged", r, after));
        }
        let mut put = |what, state| next.push((Surely::Comes, what, r, state));
        // `Engine::collect_prefills`, `Desk::on_prefilled`, `LeaseTable::grant`. The last token of all needs no lease.
        if request.context == Context::Running && request.computed + 1 == need {
            let mut after = state.clone();
            let is_finished = request.made + 1 == self.requests[r].1;
            if is_finished {
                after.end_context(r);
            }
            let request = &mut after.requests[r];
            if !is_finished {
                request.context = Context::Leased;
                request.is_void &= request.computed > 0;
                request.is_current = true;
                request.computed = need;
            }
            let waits = request.phase == Phase::Prefilling || request.is_streamed;
            request.ready = waits.then_some(is_finished);
            put("the prompt is done", after);
        }
        // `LeaseTable::expire`. Nothing to wait for while its API server renews it.
        if request.context == Context::Leased && self.rules.expiry {
            let mut after = state.clone();
            after.end_context(r);
            let is_renewed = request.is_current
                && !request.is_orphan
                && matches!(request.phase, Phase::Staged | Phase::Pulling);
            let surely = match is_renewed {
                true => Surely::Perhaps,
                false => Surely::Comes,
            };
            next.push((surely, "the lease ends", r, after));
        }
        let mut put = |what, state| next.push((Surely::Comes, what, r, state));
        // `Desk::on_renew`, `LeaseTable::renew`.
        if request.renewal == Renewal::Asked {
            let mut after = state.clone();
            let renewed = &mut after.requests[r];
            let mut is_valid = request.context == Context::Leased && request.is_current;
            if !self.rules.ended_stays_ended && request.context == Context::Nothing {
                renewed.context = Context::Leased;
                (renewed.is_current, renewed.is_void) = (true, true);
                renewed.computed = need;
                is_valid = true;
            }
            renewed.renewal = Renewal::Answered { is_valid };
            put("the context worker hears the renewal", after);
        }
        // `Desk::on_abort`.
        if request.context_abort {
            let mut after = state.clone();
            after.requests[r].context_abort = false;
            if request.context != Context::Leased || self.rules.aborts_end_leases {
                after.requests[r].is_ghost = self.leaves_ghost(request);
                after.end_context(r);
            }
            put("the context worker hears the abort", after);
        }
        // `Desk::drop_gone_api_servers`, on both workers.
        if request.is_orphan && self.rules.silence_ends {
            for of_context in [true, false] {
                let mut after = state.clone();
                match of_context {
                    true => after.end_context(r),
                    false => after.end_decode(r),
                }
                put("a worker misses the API server", after);
            }
        }
    }

    /// Whether the lease of a prompt that ends now goes on without it.
    pub(super) fn leaves_ghost(&self, request: &Request) -> bool {
        !self.rules.prompts_end_leases
            && request.context == Context::Running
            && request.computed > 0
    }
}
