//! What the decode worker does next.

use super::Model;
use super::state::{Context, Decode, News, Next, Phase, Pull, Renewal, State, Surely};

impl Model {
    pub(super) fn decode_worker(
        &self,
        state: &State,
        r: usize,
        next: &mut Vec<Next>,
    ) -> Result<(), String> {
        let request = &state.requests[r];
        let (prompt, output) = self.requests[r];
        let mut put = |what, state| next.push((Surely::Comes, what, r, state));
        if let Decode::Pulling(pull) = request.decode {
            let need = pull.blocks;
            let has_lease = request.context == Context::Leased
                && (pull.is_whole || !self.rules.nonces)
                || request.is_ghost;
            // What `ContextSide::progress` says: of a lease that ended, nothing.
            let told = match request.context {
                _ if !pull.is_whole => need,
                Context::Running if self.rules.collected_first => request.computed,
                Context::Running => request.computed + 1,
                _ => need,
            };
            if request.decode_blocks < need + 1 {
                // Only where nothing is refused: it waits for the rest.
                if state.decode_free > 0 {
                    let mut after = state.clone();
                    after.decode_free -= 1;
                    after.requests[r].decode_blocks += 1;
                    put("the pull takes a block", after);
                }
            } else if pull.is_released && pull.read == need {
                if !pull.is_whole {
                    return Err("KV is used that was read after its release".to_owned());
                }
            } else if pull.read < told.min(need) {
                // `Pull::read_blocks`.
                let mut after = state.clone();
                let is_early = pull.is_whole
                    && request.context == Context::Running
                    && pull.read >= request.computed;
                after.requests[r].decode = Decode::Pulling(Pull {
                    read: pull.read + 1,
                    is_torn: pull.is_torn || is_early,
                    ..pull
                });
                put("a block is read", after);
            }
            let may_release = pull.read == need || !self.rules.release_comes_last;
            let is_done = request.context != Context::Running || !pull.is_whole || request.is_ghost;
            if request.decode_blocks > need && may_release && is_done && !pull.is_released {
                // `Pull::outcome`, `Desk::on_release`, `Desk::on_pulled`: valid if the lease is there, and is that one.
                let mut after = state.clone();
                if !has_lease {
                    after.end_decode(r);
                    after.requests[r].news =
                        (request.phase == Phase::Pulling).then_some(News::Again);
                } else if pull.read < need {
                    after.end_context(r);
                    after.requests[r].decode = Decode::Pulling(Pull {
                        is_released: true,
                        is_whole: false,
                        ..pull
                    });
                } else if !pull.is_whole || request.is_void {
                    return Err("KV is used whose lease had ended".to_owned());
                } else if pull.is_torn {
                    return Err("KV is used that was read before it was there".to_owned());
                } else {
                    after.end_context(r);
                    after.requests[r].decode = Decode::Running;
                    after.running.push(r);
                    let request = &mut after.requests[r];
                    if request.phase == Phase::Pulling {
                        request.phase = Phase::Decoding;
                        request.renewal = Renewal::Idle;
                        // It brings the first token itself, should the API server not have it yet.
                        request.made += u8::from(std::mem::take(&mut request.is_streamed));
                        request.ready = None;
                    }
                }
                put("the release is answered", after);
            }
        }
        // `Scheduler::plan_decodes`, `make_room`: one token more, whoever has to give way.
        if request.decode == Decode::Running {
            let mut after = state.clone();
            if request.decode_blocks < prompt + request.made {
                if after.decode_free == 0 {
                    if !self.rules.preemption {
                        return Ok(());
                    }
                    let youngest = *state.running.last().expect("at least this one runs");
                    after.end_decode(youngest);
                    let victim = &mut after.requests[youngest];
                    victim.news = (victim.phase == Phase::Decoding).then_some(News::Again);
                    put("the youngest gives way", after);
                    return Ok(());
                }
                after.decode_free -= 1;
                after.requests[r].decode_blocks += 1;
            }
            after.requests[r].made += 1;
            if after.requests[r].made == output {
                after.end_decode(r);
                after.requests[r].news =
                    (request.phase == Phase::Decoding).then_some(News::Finished);
            }
            put("a token is made", after);
        }
        if request.decode_abort {
            let mut after = state.clone();
            after.requests[r].decode_abort = false;
            after.end_decode(r);
            put("the decode worker hears the abort", after);
        }
        Ok(())
    }
}
