//! A prompt that takes several steps: its handle comes after the first, a decode worker reads what is there while the rest is
//! computed, and the first token comes in answer to a question.
//!
//! Until then `Staged` and `Pulling` have a handle without first token. The decode worker hears of that token too, and sends it before
//! its own first one: so an answer that is lost here costs no more than that it comes a step later.

use baton_protocol::{FailureCode, KvHandle, ProgressReply};

use super::{Action, Lifecycle, NoReply, Phase, Target, holder};

/// Questions in a row without an answer, after which a context worker is given up.
pub const UNANSWERED_MAX: u32 = 3;

impl Lifecycle {
    /// The first step is over, and there are more.
    pub(super) fn begun(
        &mut self,
        context: &Target,
        mut handle: Box<KvHandle>,
        out: &mut Vec<Action>,
    ) {
        if handle.worker != context.worker {
            let reason = "a handle of another worker came back";
            return self.retry(reason, Some(context.worker.clone()), out);
        }
        (handle.first_token, handle.finish) = (None, None);
        self.report_prompt(&handle, None, out);
        self.next_round();
        self.waited = std::time::Duration::ZERO;
        self.unanswered = 0;
        self.phase = Phase::Staged { handle };
        out.push(Action::AwaitPrompt);
        out.push(Action::ChooseDecode);
    }

    /// The context worker says how far the prompt is.
    pub(super) fn progress(
        &mut self,
        reply: Result<ProgressReply, NoReply>,
        out: &mut Vec<Action>,
    ) {
        let (Phase::Staged { handle } | Phase::Pulling { handle, .. }) = &mut self.phase else {
            return;
        };
        if !handle.is_streamed() {
            return;
        }
        let context = holder(handle).worker;
        self.unanswered = match reply {
            Err(NoReply::TimedOut) => self.unanswered + 1,
            _ => 0,
        };
        match reply {
            Ok(ProgressReply::Done {
                first_token,
                first_logprobs,
                finish,
                ..
            }) => {
                handle.first_token = Some(first_token);
                handle.first_logprobs.clone_from(&first_logprobs);
                self.first_token(first_token, &first_logprobs, finish, out);
                if let Some(finish) = finish {
                    return self.end_early("its first token ended it", Ok(finish), out);
                }
                // Nobody was asked yet: the best worker is the one that ran the prompt, or none was there.
                if matches!(self.phase, Phase::Staged { .. }) && !self.waiting {
                    self.next_round();
                    out.push(Action::ChooseDecode);
                }
            }
            Ok(ProgressReply::Running { .. }) => out.push(Action::AwaitPrompt),
            // The lease has ended, perhaps by the release of who pulls it: who asks a moment after that hears of neither. The decode
            // worker says what came of it, and has the first token.
            Ok(ProgressReply::Failed { failure, .. })
                if failure.code == FailureCode::HandleInvalid
                    && matches!(self.phase, Phase::Pulling { .. }) => {}
            Ok(ProgressReply::Failed { failure, .. }) => self.worker_failed(failure, context, out),
            Err(NoReply::TimedOut) if self.unanswered < UNANSWERED_MAX => {
                out.push(Action::AwaitPrompt);
            }
            Err(NoReply::TimedOut | NoReply::NoResponders) => {
                self.retry("context worker did not answer", Some(context), out);
            }
            Err(NoReply::TooLarge { .. } | NoReply::Broken(_)) => {
                self.retry("context worker's answer was lost", Some(context), out);
            }
        }
    }
}
