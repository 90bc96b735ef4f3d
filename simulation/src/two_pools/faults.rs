//! What may go wrong next.

use super::Model;
use super::state::{Context, Next, Phase, Renewal, State, Surely};

impl Model {
    pub(super) fn faults(&self, state: &State, r: usize, next: &mut Vec<Next>) {
        let request = &state.requests[r];
        let mut put = |what, state| next.push((Surely::Perhaps, what, r, state));
        let is_alive = request.phase != Phase::Ended;
        if self.faults.aborts && is_alive {
            // `Lifecycle::end_early`.
            let mut after = state.clone();
            after.give_up(r, Phase::Ended);
            put("the client leaves", after);
        }
        if self.faults.api_server_lost && is_alive {
            let mut after = state.clone();
            let request = &mut after.requests[r];
            request.phase = Phase::Ended;
            request.is_orphan = true;
            request.renewal = Renewal::Idle;
            (request.begun, request.is_streamed) = (false, false);
            (request.ready, request.news) = (None, None);
            put("the API server is lost", after);
        }
        // `Desk::end_late`, `Event::Failed`: the API server hears of it, and the decode worker that its lease is gone.
        if self.faults.prompts_fail && request.context == Context::Running {
            let mut after = state.clone();
            after.requests[r].is_ghost = self.leaves_ghost(request);
            after.end_context(r);
            if request.phase == Phase::Prefilling || request.is_streamed {
                after.give_up(r, Phase::Queued);
            }
            put("the prompt fails", after);
        }
        // One crash takes everything, so it is drawn once.
        if self.faults.crashes && r == 0 {
            let mut after = state.clone();
            for r in 0..state.requests.len() {
                after.end_context(r);
                let request = &mut after.requests[r];
                // What it had said before is heard before the loss.
                if request.phase == Phase::Prefilling && request.ready.is_none()
                    || request.phase == Phase::Staged
                    || request.phase == Phase::Pulling
                {
                    after.give_up(r, Phase::Queued);
                }
                after.requests[r].context_abort = false;
            }
            put("the context worker is lost", after);
            let mut after = state.clone();
            for r in 0..state.requests.len() {
                after.end_decode(r);
                let request = &mut after.requests[r];
                let is_open = matches!(request.phase, Phase::Pulling | Phase::Decoding);
                if is_open && request.news.is_none() {
                    after.give_up(r, Phase::Queued);
                }
                after.requests[r].decode_abort = false;
            }
            put("the decode worker is lost", after);
        }
    }
}
