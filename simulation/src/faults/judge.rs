//! What a request may come to, given what its run was to show.

use baton_api_server::ErrorKind;
use baton_protocol::FinishReason;

use crate::faults::plan::{Plan, Scenario};

/// Why generations are retried though nothing is wrong: a decode worker had no block left for the next token.
const RETRIES_FOR_ROOM: [&str; 1] = ["preempted"];

/// And if one link has died: its pulls end, and until that is known others are sent there.
const RETRIES_FOR_A_DYING_LINK: [&str; 2] = ["pull_failed", "no decode worker can reach the KV"];

/// What is known of a request that has ended.
#[derive(Clone, Copy, Debug)]
pub struct Ended {
    /// How.
    pub outcome: Result<FinishReason, ErrorKind>,
    /// Tokens that its client has heard.
    pub tokens: usize,
    /// Its client has left.
    pub left: bool,
    /// Its time was over.
    pub is_late: bool,
    /// There was time and room for it, generously reckoned.
    pub must_be_answered: bool,
}

impl Plan {
    /// What is wrong with this end, if anything is.
    pub fn judge(&self, ended: Ended) -> Option<String> {
        let kind = ended.outcome.err()?;
        let allowed = match kind {
            ErrorKind::Busy | ErrorKind::Deadline => true,
            ErrorKind::Worker => self.scenario == Scenario::Faults,
            ErrorKind::NoWorker | ErrorKind::Bus => !self.is_calm,
            ErrorKind::ClientLeft => ended.left,
            _ => false,
        };
        if !allowed {
            return Some(format!("ended with {kind:?}"));
        }
        if self.scenario == Scenario::Faults || ended.left {
            return None;
        }
        if ended.tokens > 0 && !ended.is_late {
            let tokens = ended.tokens;
            return Some(format!(
                "was given up with {kind:?} after {tokens} tokens, and its time is not over"
            ));
        }
        let seconds = self.work.as_secs_f32();
        ended.must_be_answered.then(|| {
            format!("ended with {kind:?}, and {seconds:.1} s were enough for all that was asked")
        })
    }

    /// Whether generations may be retried for this reason.
    pub fn may_retry(&self, reason: &str) -> bool {
        self.scenario == Scenario::Faults
            || RETRIES_FOR_ROOM.contains(&reason)
            || (self.has_dying_link && RETRIES_FOR_A_DYING_LINK.contains(&reason))
    }
}
