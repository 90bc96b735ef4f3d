//! Carries out what the peers' state machine wants: describe, connect, probe, disconnect.

use std::sync::Arc;
use std::time::Duration;

use baton_bus::Wire;
use baton_protocol::deadlines::{CONTROL_TIMEOUT_MS, PULL_STALL_MS};
use baton_protocol::{
    Incarnation, KvGeometry, KvShares, ModelFingerprint, TransferDescriptor, WorkerDescriptor,
    WorkerId, decode,
};
use baton_transfer::{BlockMap, PeerKey};
use bytes::Bytes;
use tokio::task::JoinError;
use tokio::time::{Instant, timeout};

use super::DecodeSide;
use super::peers::{Action, LinkInfo};
use crate::common::{Common, task_outcome};
use crate::mover::Mover;
use crate::run::three_digits;

/// A connection with its warm-up and measurement may take this long over a slow link. One that delivers nothing is given up after
/// [`PULL_STALL_MS`].
const CONNECT_TIMEOUT: Duration = Duration::from_millis(3 * PULL_STALL_MS);

/// What became of a connection attempt.
pub(crate) struct LinkOutcome {
    worker: WorkerId,
    incarnation: Incarnation,
    link: Result<LinkInfo, String>,
}

impl DecodeSide {
    pub(super) fn act_all(&mut self, common: &Common, actions: Vec<Action>) {
        for action in actions {
            self.act(common, action);
        }
    }

    fn act(&mut self, common: &Common, action: Action) {
        let Some(mover) = common.mover.clone() else {
            return;
        };
        match action {
            Action::Connect {
                worker,
                incarnation,
            } => {
                let wire = common.wire.clone();
                let describe = common.cluster.describe(&worker);
                let expected = Expected {
                    worker,
                    incarnation,
                    model: common.checks.model.fingerprint.clone(),
                    kv: common.checks.kv.clone(),
                    shares: self.shares.clone(),
                };
                self.links.spawn(async move {
                    let link = connect(&wire, describe, &mover, &expected).await;
                    LinkOutcome {
                        worker: expected.worker,
                        incarnation,
                        link,
                    }
                });
            }
            Action::Disconnect { incarnation } => {
                self.pull_permits.lost(incarnation);
                // Nobody waits for it; the agent bounds it.
                tokio::spawn(async move { mover.disconnect(PeerKey(incarnation.0)).await });
            }
        }
    }

    /// A connection was made, or was not. Whether there is news of it.
    pub(crate) fn on_link(
        &mut self,
        common: &Common,
        outcome: Result<LinkOutcome, JoinError>,
    ) -> bool {
        let Some(LinkOutcome {
            worker,
            incarnation,
            link,
        }) = task_outcome("connect", outcome)
        else {
            return false;
        };
        match link {
            Ok(link) => {
                tracing::info!(%worker, transport = &*link.transport, gigabytes_per_second = three_digits(link.gigabytes_per_second), "KV peer connected");
                if let Some(action) = self.peers.connected(&worker, incarnation, link) {
                    self.act(common, action);
                }
            }
            Err(error) => {
                tracing::warn!(%worker, error, "KV peer not connected, trying again");
                self.peers
                    .connect_failed(Instant::now(), &worker, incarnation, error);
            }
        }
        true
    }
}

/// Who is to be connected, and what its KV must be like.
struct Expected {
    worker: WorkerId,
    incarnation: Incarnation,
    model: ModelFingerprint,
    kv: KvGeometry,
    /// What our ranks hold.
    shares: KvShares,
}

impl Expected {
    /// What a description says of the arenas, if it is of this worker and its KV can be used. Its beat said so before, but a
    /// description is another message.
    fn arenas(
        &self,
        described: WorkerDescriptor,
    ) -> Result<(TransferDescriptor, BlockMap), String> {
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
        let transfer = described
            .transfer
            .ok_or("it moves no KV: it was started without UCX")?;
        let map = BlockMap::new(&self.kv, &described.shares, &self.shares)
            .map_err(|error| format!("it describes KV that cannot be read: {error}"))?;
        let (ranks, arenas) = (described.shares.ranks(), transfer.ranks.len());
        if ranks != arenas {
            return Err(format!("it describes {ranks} ranks and {arenas} arenas"));
        }
        for (rank, arena) in transfer.ranks.iter().enumerate() {
            let block_bytes = described.shares.block_bytes(&self.kv, rank);
            if arena.bytes % block_bytes != 0 {
                return Err(format!(
                    "the arena of its rank {rank} is not a number of whole blocks of {block_bytes} bytes"
                ));
            }
        }
        Ok((transfer, map))
    }
}

async fn connect(
    wire: &Wire,
    describe: String,
    mover: &Mover,
    expected: &Expected,
) -> Result<LinkInfo, String> {
    let key = PeerKey(expected.incarnation.0);
    mover.disconnect(key).await;
    let control = Duration::from_millis(CONTROL_TIMEOUT_MS);
    let answer = timeout(control, wire.request(describe, Bytes::new()))
        .await
        .map_err(|_| "it did not describe itself in time".to_owned())?
        .map_err(|error| format!("it did not describe itself: {error}"))?;
    let described = decode(&answer.payload).map_err(|error| error.to_string())?;
    let (arenas, map) = expected.arenas(described)?;
    let report = mover
        .connect(key, arenas, CONNECT_TIMEOUT)
        .await
        .map_err(|error| error.to_string())?;
    Ok(LinkInfo {
        transport: report.transport.into(),
        gigabytes_per_second: report.gigabytes_per_second,
        map: Arc::new(map),
    })
}

#[cfg(test)]
mod tests {
    use baton_engine::fake_geometry;
    use baton_protocol::{
        Base64Bytes, MemoryType, ModelInfo, PROTOCOL_VERSION, RankRegion, Role, UcxVersion,
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
            shares: KvShares::whole(&fake_geometry(32, 1, 1)),
            kv: fake_geometry(32, 1, 1),
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
            shares: good.shares.clone(),
        };
        assert!(expected.arenas(good.clone()).is_ok());
        let alter = |alter: fn(&mut WorkerDescriptor), words: &str| {
            let mut bad = good.clone();
            alter(&mut bad);
            let error = expected.arenas(bad).unwrap_err();
            assert!(error.contains(words), "{error}");
        };
        alter(|d| d.worker = WorkerId::new("thief").unwrap(), "thief");
        alter(|d| d.incarnation = Incarnation(2), "restarted");
        alter(
            |d| d.model.fingerprint = ModelFingerprint::new("b".repeat(64)).unwrap(),
            "another model",
        );
        alter(
            |d| d.kv.groups[0].layers = 2,
            "layers is 1 here and 2 there",
        );
        alter(|d| d.transfer = None, "without UCX");
        alter(
            |d| d.transfer.as_mut().unwrap().ranks[0].bytes = 257,
            "whole blocks of 256 bytes",
        );
        alter(
            |d| {
                let ranks = &mut d.transfer.as_mut().unwrap().ranks;
                ranks.push(ranks[0].clone());
            },
            "1 ranks and 2 arenas",
        );
        alter(|d| d.shares.0.clear(), "no rank");
        alter(|d| d.shares.0[0][0].head_count = 0, "cannot be read");
    }
}
