//! Beginnings of prompts that one worker has and another is to run: leased, released, pulled.

use async_nats::Message;
use baton_protocol::{LeaseAsk, LeaseReply, PROTOCOL_VERSION, Refusal, Release, decode};
use tokio::task::JoinError;
use tokio::time::Instant;

use super::{Desk, malformed};
use crate::common::task_outcome;
use crate::decode::PrefixPulled;

impl Desk {
    /// Another worker is to run a prompt whose beginning is here.
    pub(super) fn on_lease(&mut self, message: Message) {
        let Some(reply) = message.reply else {
            return;
        };
        let ask = decode::<LeaseAsk>(&message.payload).map_err(malformed);
        let lent = ask.and_then(|ask| {
            let now = Instant::now();
            self.takes_job_of(now, &ask.api_server, ask.api_incarnation)?;
            let context = self.context.as_mut().ok_or_else(|| Refusal::WrongRole {
                detail: "this worker leases no prefixes: its role is decode".to_owned(),
            })?;
            let lent = context.lend(&self.common, now, &ask)?;
            let (api_server, life) = (&ask.api_server, ask.api_incarnation);
            self.presence.note_api_server(now, api_server, life);
            Ok(lent)
        });
        let answer = lent.unwrap_or_else(|refusal| {
            tracing::debug!(%refusal, "a prefix is not leased");
            let v = PROTOCOL_VERSION;
            LeaseReply::Refused { v, refusal }
        });
        self.common.send(reply, &answer);
    }

    /// Whether it was the release of a prompt's beginning, and valid.
    pub(super) fn on_lent_release(&mut self, release: &Release) -> bool {
        let context = self.context.as_mut();
        let valid = context.is_some_and(|context| context.release_lent(&self.common, release));
        if valid {
            tracing::debug!(request = %release.request, handle = %release.handle, by = %release.decode_worker, "a prefix was released");
        }
        valid
    }

    /// The beginning of a prompt was pulled, or not.
    pub(super) fn on_prefix_pulled(&mut self, pulled: Result<PrefixPulled, JoinError>) {
        let lost = pulled.as_ref().err().map(JoinError::id);
        let pulled = task_outcome("pull of a prefix", pulled);
        let Some(context) = &mut self.context else {
            return;
        };
        match (pulled, lost) {
            (Some(pulled), _) => {
                context.on_prefix_pulled(&mut self.common, pulled.key, pulled.report);
                let decode = self.decode.as_mut();
                if decode.is_some_and(|decode| decode.on_prefix_pulled(&pulled)) {
                    self.send_beat();
                }
            }
            (None, Some(task)) => context.on_prefix_pull_lost(&mut self.common, task),
            (None, None) => {}
        }
    }
}
