//! Carries out what the peers' state machine wants: describe, connect, probe, disconnect.

use std::time::Duration;

use baton_bus::Wire;
use baton_protocol::deadlines::{CONTROL_TIMEOUT_MS, PULL_STALL_MS};
use baton_protocol::{
    Incarnation, KvGeometry, ModelFingerprint, TransferDescriptor, WorkerDescriptor, WorkerId,
    decode,
};
use baton_transfer::PeerKey;
use bytes::Bytes;
use tokio::task::JoinError;
use tokio::time::{Instant, timeout};

use crate::desk::{Desk, task_outcome};
use crate::mover::Mover;
use crate::peers::{Action, Link};

/// A connection with its warm-up and measurement may take this long over a slow link. One that delivers nothing is given up after
/// [`PULL_STALL_MS`].
const CONNECT_TIMEOUT: Duration = Duration::from_millis(3 * PULL_STALL_MS);

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
                let expected = Expected {
                    worker,
                    incarnation,
                    model: self.checks.model.fingerprint.clone(),
                    kv: self.checks.kv.clone(),
                };
                self.links.spawn(async move {
                    let link = connect(&wire, describe, &agent, &expected).await;
                    LinkOutcome {
                        worker: expected.worker,
                        incarnation,
                        link,
                    }
                });
            }
            Action::Disconnect { incarnation } => {
                self.pull_places.lost(incarnation);
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
        self.beat_soon();
    }
}

/// Who is to be connected, and what its KV must be like.
struct Expected {
    worker: WorkerId,
    incarnation: Incarnation,
    model: ModelFingerprint,
    kv: KvGeometry,
}

impl Expected {
    /// What a description says of the arena, if it is of this worker and its KV can be used. Its beat said so before, but a
    /// description is another message.
    fn arena(&self, described: WorkerDescriptor) -> Result<TransferDescriptor, String> {
        if described.worker != self.worker {
            return Err(format!("it describes {}", described.worker));
        }
        if described.incarnation != self.incarnation {
            return Err("it was restarted meanwhile".to_owned());
        }
        if described.model.fingerprint != self.model {
            return Err("it describes another model".to_owned());
        }
        if let Some(difference) = self.kv.difference(&described.kv) {
            return Err(format!("it describes KV laid out otherwise: {difference}"));
        }
        let arena = described
            .transfer
            .ok_or("it moves no KV: it was started without UCX")?;
        let mut ranks = arena.ranks.iter();
        let bytes = ranks.try_fold(0_u64, |sum, rank| sum.checked_add(rank.bytes));
        let block_bytes = self.kv.block_bytes() as u64;
        match bytes.and_then(|bytes| bytes.checked_rem(block_bytes)) {
            Some(0) => Ok(arena),
            _ => Err(format!(
                "its arena is not a number of whole blocks of {block_bytes} bytes"
            )),
        }
    }
}

async fn connect(
    wire: &Wire,
    describe: String,
    agent: &Mover,
    expected: &Expected,
) -> Result<Link, String> {
    let key = PeerKey(expected.incarnation.0);
    agent.disconnect(key).await;
    let control = Duration::from_millis(CONTROL_TIMEOUT_MS);
    let answer = timeout(control, wire.request(describe, Bytes::new()))
        .await
        .map_err(|_| "it did not describe itself in time".to_owned())?
        .map_err(|error| format!("it did not describe itself: {error}"))?;
    let described = decode(&answer.payload).map_err(|error| error.to_string())?;
    let report = agent
        .connect(key, expected.arena(described)?, CONNECT_TIMEOUT)
        .await
        .map_err(|error| error.to_string())?;
    Ok(Link {
        transport: report.transport,
        gigabytes_per_second: report.gigabytes_per_second,
    })
}

#[cfg(test)]
mod tests {
    use baton_protocol::{
        Base64Bytes, KvDtype, MemoryType, ModelInfo, PROTOCOL_VERSION, RankRegion, Role, UcxVersion,
    };

    use super::*;

    fn described() -> WorkerDescriptor {
        let rank = RankRegion {
            rkey: Base64Bytes(vec![1]),
            base: 4096,
            bytes: 3 * 256,
            memory: MemoryType::Host,
        };
        WorkerDescriptor {
            v: PROTOCOL_VERSION,
            worker: WorkerId::new("ctx").unwrap(),
            incarnation: Incarnation(1),
            role: Role::Context,
            model: ModelInfo {
                name: "m".into(),
                fingerprint: ModelFingerprint::new("a".repeat(64)).unwrap(),
                tokens_max: 8,
                vocab: 8,
            },
            kv: KvGeometry {
                layout: 1,
                dtype: KvDtype::Bf16,
                block_tokens: 32,
                kv_heads: 1,
                layers: 1,
                head_dim: 2,
            },
            transfer: Some(TransferDescriptor {
                ucx: UcxVersion(1, 13, 1),
                address: Base64Bytes(vec![1]),
                ranks: vec![rank],
            }),
        }
    }

    #[test]
    fn only_the_description_of_a_usable_arena_is_connected() {
        let good = described();
        let expected = Expected {
            worker: good.worker.clone(),
            incarnation: good.incarnation,
            model: good.model.fingerprint.clone(),
            kv: good.kv.clone(),
        };
        assert!(expected.arena(good.clone()).is_ok());
        let alter = |alter: fn(&mut WorkerDescriptor), words: &str| {
            let mut bad = good.clone();
            alter(&mut bad);
            let error = expected.arena(bad).unwrap_err();
            assert!(error.contains(words), "{error}");
        };
        alter(|d| d.worker = WorkerId::new("thief").unwrap(), "thief");
        alter(|d| d.incarnation = Incarnation(2), "restarted");
        alter(
            |d| d.model.fingerprint = ModelFingerprint::new("b".repeat(64)).unwrap(),
            "another model",
        );
        alter(|d| d.kv.layers = 2, "layers is 1 here and 2 there");
        alter(|d| d.transfer = None, "without UCX");
        alter(
            |d| d.transfer.as_mut().unwrap().ranks[0].bytes = 257,
            "whole blocks of 256 bytes",
        );
        alter(
            |d| {
                let ranks = &mut d.transfer.as_mut().unwrap().ranks;
                ranks[0].bytes = u64::MAX;
                ranks.push(ranks[0].clone());
            },
            "whole blocks",
        );
    }
}
