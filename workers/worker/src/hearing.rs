//! Who was heard, who fell silent, and when silence says anything at all.
//!
//! Silence says something only as long as we hear ourselves ([`baton_bus::Presence`]).

use std::time::Duration;

use async_nats::Message;
use baton_protocol::deadlines::GONE_AFTER_MS;
use baton_protocol::subjects::speaker;
use baton_protocol::{ApiBeat, ApiServerId, Refusal, decode};
use tokio::time::Instant;

use crate::api_servers::{Heard, Life};
use crate::desk::Desk;

/// Others who say hello within this time get the same beat.
const HELLO_WAIT: Duration = Duration::from_millis(10);

impl Desk {
    /// Whether those who are silent now are so by themselves.
    pub(crate) fn hears(&self, now: Instant) -> bool {
        self.presence.hears(now)
    }

    /// Our own beat came back.
    pub(crate) fn on_echo(&mut self) {
        let now = Instant::now();
        if !self.hears(now) {
            tracing::info!("the bus carries messages again");
            self.peers.excuse_silence(now);
            self.api_servers.excuse_silence(now);
        }
        self.presence.echo(now);
    }

    /// Somebody wants to know who is there. One beat answers all who ask within a moment.
    pub(crate) fn on_hello(&mut self) {
        self.beat_due
            .get_or_insert_with(|| Instant::now() + HELLO_WAIT);
    }

    /// The connection came or went. What was said meanwhile was said to nobody.
    pub(crate) fn on_bus(&mut self, is_up: bool) {
        self.presence.set_connected(is_up);
        if is_up {
            let now = Instant::now();
            self.peers.excuse_silence(now);
            self.api_servers.excuse_silence(now);
            self.send_beat();
        }
    }

    pub(crate) fn on_api_beat(&mut self, message: &Message) {
        match decode::<ApiBeat>(&message.payload) {
            Ok(beat) if speaker(&message.subject) != beat.api_server.as_str() => {
                tracing::warn!(subject = %message.subject, api_server = %beat.api_server, "a beat in another API server's name");
            }
            // It serves nobody yet, and has no claim on the name.
            Ok(beat) if beat.stands_by() => {}
            Ok(beat) => {
                // One whose life is over has nothing more to say.
                let _ = self.heard_api_server(Instant::now(), &beat.api_server, beat.incarnation);
            }
            Err(error) => tracing::debug!(%error, "an API server's beat was not understood"),
        }
    }

    /// A beat or a job came from this life of an API server. What a former one asked for ends at once.
    pub(crate) fn heard_api_server(
        &mut self,
        now: Instant,
        api_server: &ApiServerId,
        life: Life,
    ) -> Result<(), Refusal> {
        match self.api_servers.heard(now, api_server, life) {
            Heard::Alive => Ok(()),
            Heard::Restarted => {
                self.end_requests_of(
                    api_server,
                    "API server restarted: requests of its previous incarnation end",
                );
                Ok(())
            }
            Heard::Contested(wait) => Err(Refusal::Busy {
                retry_after_ms: wait.as_millis() as u32,
            }),
            Heard::Ended => Err(Refusal::Malformed {
                detail: format!(
                    "another API server has joined as {api_server} since: give each a name of its own"
                ),
            }),
        }
    }

    pub(crate) fn drop_gone_api_servers(&mut self, now: Instant) {
        let gone_after = Duration::from_millis(GONE_AFTER_MS);
        for api_server in self.api_servers.forget_silent(now, gone_after) {
            self.end_requests_of(&api_server, "API server gone: its requests end");
        }
    }

    /// Nobody waits for what this API server asked for until now.
    fn end_requests_of(&mut self, api_server: &ApiServerId, why: &str) {
        let leases = self.leases.abandon(api_server);
        let keys = self.keys_of(|of, _| of == api_server);
        if leases + keys.len() > 0 {
            tracing::info!(%api_server, requests = keys.len(), leases, "{why}");
        }
        for key in keys {
            self.end_key(key, None);
        }
    }
}
