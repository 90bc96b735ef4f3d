//! What the API server does next.

use super::Model;
use super::state::{Context, Decode, News, Next, Phase, Pull, Renewal, State, Surely};

impl Model {
    pub(super) fn api_server(&self, state: &State, r: usize, next: &mut Vec<Next>) {
        let request = &state.requests[r];
        if request.is_orphan {
            return;
        }
        let mut put = |what, state| next.push((Surely::Comes, what, r, state));
        // `Driver::send_prefill`, `Desk::take_prefill`, `Engine::submit`. What an earlier try left ends; an abort sent
        // before comes before.
        if request.phase == Phase::Queued && !request.context_abort {
            let mut after = state.clone();
            after.end_context(r);
            after.requests[r].is_ghost = false;
            after.requests[r].phase = Phase::Prefilling;
            after.requests[r].context = Context::Waiting;
            after.waiting.push(r);
            put("the prompt is queued", after);
        }
        // `Lifecycle::begun`.
        if request.phase == Phase::Prefilling && request.begun {
            let mut after = state.clone();
            let request = &mut after.requests[r];
            (request.begun, request.is_streamed) = (false, true);
            request.phase = Phase::Staged;
            put("the handle of a prompt that runs comes", after);
        }
        // `Lifecycle::prompt_done`: the first token of a prompt whose handle is here.
        if let (true, Some(is_finished)) = (request.is_streamed, request.ready) {
            let mut after = state.clone();
            let request = &mut after.requests[r];
            (request.is_streamed, request.ready) = (false, None);
            request.made += 1;
            if is_finished {
                after.give_up(r, Phase::Ended);
            }
            put("the first token comes", after);
        }
        // `Lifecycle::prefilled`.
        if let (Phase::Prefilling, false, Some(is_finished)) =
            (request.phase, request.begun, request.ready)
        {
            let mut after = state.clone();
            let request = &mut after.requests[r];
            request.ready = None;
            request.made += 1;
            request.phase = if is_finished {
                Phase::Ended
            } else {
                Phase::Staged
            };
            put("the handle comes", after);
        }
        // `Lease::renew`: by the clock, and mostly not at all.
        let has_handle = matches!(request.phase, Phase::Staged | Phase::Pulling);
        if has_handle && !request.is_streamed && request.renewal == Renewal::Idle {
            let mut after = state.clone();
            after.requests[r].renewal = Renewal::Asked;
            next.push((Surely::Perhaps, "a renewal is sent", r, after));
        }
        let mut put = |what, state| next.push((Surely::Comes, what, r, state));
        // `Lease::renewed`, `Lifecycle::lease_lost`: while it is pulled the release decides.
        if let Renewal::Answered { is_valid } = request.renewal {
            let mut after = state.clone();
            after.requests[r].renewal = Renewal::Idle;
            if !is_valid && request.phase == Phase::Staged {
                after.give_up(r, Phase::Queued);
            }
            put("a renewal is answered", after);
        }
        // `Driver::send_decode`, `Desk::take_decode`: refused without blocks, and tried again (`no_decode_worker`).
        let need = self.requests[r].0 + request.made + u8::from(request.is_streamed);
        let has_room = match self.rules.refusals {
            true => state.decode_free >= need,
            false => state.decode_free > 0,
        };
        if request.phase == Phase::Staged && !request.decode_abort && has_room {
            let mut after = state.clone();
            after.end_decode(r);
            let taken = need.min(after.decode_free);
            after.decode_free -= taken;
            let request = &mut after.requests[r];
            request.phase = Phase::Pulling;
            request.decode_blocks = taken;
            let is_there = matches!(request.context, Context::Running | Context::Leased);
            request.decode = Decode::Pulling(Pull {
                blocks: need - 1,
                read: 0,
                is_whole: request.is_current && is_there,
                is_torn: false,
                is_released: false,
            });
            put("the pull begins", after);
        }
        // `Lifecycle::item` with an end, `worker_failed`.
        if let (Phase::Pulling | Phase::Decoding, Some(news)) = (request.phase, request.news) {
            let mut after = state.clone();
            after.requests[r].news = None;
            match news {
                News::Finished => after.requests[r].phase = Phase::Ended,
                News::Again => after.give_up(r, Phase::Queued),
            }
            put("the end of a try is heard", after);
        }
    }
}
