//! Carries out what the peers' state machine wants: describe, connect, probe, disconnect.

use std::time::Duration;

use baton_bus::Wire;
use baton_protocol::limits::CONTROL_TIMEOUT_MS;
use baton_protocol::{Incarnation, WorkerDescriptor, WorkerId, decode};
use baton_transfer::PeerKey;
use bytes::Bytes;
use tokio::task::JoinError;
use tokio::time::{Instant, timeout};

use crate::desk::{Desk, task_outcome};
use crate::mover::Mover;
use crate::peers::{Action, Link};

/// A connection with its warm-up and measurement may take this long.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// What became of a connection attempt.
pub(crate) struct LinkOutcome {
    worker: WorkerId,
    incarnation: Incarnation,
    link: Result<Link, String>,
}

impl Desk {
    pub(crate) fn act(&mut self, action: Action) {
        let Some(agent) = self.agent.clone() else {
            return;
        };
        match action {
            Action::Connect {
                worker,
                incarnation,
            } => {
                let wire = self.wire.clone();
                let describe = self.cluster.describe(&worker);
                self.links.spawn(async move {
                    let link = connect(&wire, describe, &agent, incarnation).await;
                    LinkOutcome {
                        worker,
                        incarnation,
                        link,
                    }
                });
            }
            Action::Disconnect { incarnation } => {
                // Nobody waits for it; the agent bounds it.
                tokio::spawn(async move { agent.disconnect(PeerKey(incarnation.0)).await });
            }
        }
    }

    pub(crate) fn on_link(&mut self, outcome: Result<LinkOutcome, JoinError>) {
        let Some(LinkOutcome {
            worker,
            incarnation,
            link,
        }) = task_outcome("connect", outcome)
        else {
            return;
        };
        match link {
            Ok(link) => {
                tracing::info!(%worker, transport = link.transport, gigabytes_per_second = link.gigabytes_per_second, "KV peer connected");
                if let Some(action) = self.peers.connected(&worker, incarnation, link) {
                    self.act(action);
                }
            }
            Err(error) => {
                tracing::warn!(%worker, error, "KV peer not connected, trying again");
                self.peers
                    .connect_failed(Instant::now(), &worker, incarnation, error);
            }
        }
        self.send_beat();
    }
}

async fn connect(
    wire: &Wire,
    describe: String,
    agent: &Mover,
    incarnation: Incarnation,
) -> Result<Link, String> {
    let key = PeerKey(incarnation.0);
    agent.disconnect(key).await;
    let control = Duration::from_millis(CONTROL_TIMEOUT_MS);
    let answer = timeout(control, wire.request(describe, Bytes::new()))
        .await
        .map_err(|_| "it did not describe itself in time".to_owned())?
        .map_err(|error| format!("it did not describe itself: {error}"))?;
    let descriptor: WorkerDescriptor =
        decode(&answer.payload).map_err(|error| error.to_string())?;
    if descriptor.incarnation != incarnation {
        return Err("it was restarted meanwhile".to_owned());
    }
    let transfer = descriptor
        .transfer
        .ok_or("it moves no KV: it was started without UCX")?;
    let report = agent
        .connect(key, transfer, CONNECT_TIMEOUT)
        .await
        .map_err(|error| error.to_string())?;
    Ok(Link {
        transport: report.transport,
        gigabytes_per_second: report.gigabytes_per_second,
    })
}
