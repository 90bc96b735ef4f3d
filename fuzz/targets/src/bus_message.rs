//! One message from the bus, of any kind.

use std::fmt::Debug;
use tokio::time::Instant;

use baton_api_server::fuzzing::Membership;
use baton_protocol::{
    Abort, ApiBeat, Beat, BlockRun, DecodeJob, DecodeReply, Hello, KvShares, PrefillJob,
    PrefillReply, Release, Released, TokenFrame, UcxVersion, Versioned, WorkerDescriptor, decode,
    encode,
};
use baton_transfer::{BlockMap, plan_reads};

use crate::fixture;

/// Longest sentence about a message that is none: it goes into logs and refusals.
const DETAIL_BYTES_MAX: usize = 1 << 10;

/// The first byte says which message the rest is to be. What can be read must read the same again, and jobs, descriptors
/// and beats go on to whoever judges them.
pub fn bus_message(data: &[u8]) {
    let Some((kind, bytes)) = data.split_first() else {
        return;
    };
    match kind % 12 {
        0 => only::<Abort>(bytes),
        1 => only::<ApiBeat>(bytes),
        2 => read::<Beat>(bytes).into_iter().for_each(beat),
        3 => read::<DecodeJob>(bytes).into_iter().for_each(decode_job),
        4 => only::<DecodeReply>(bytes),
        5 => only::<Hello>(bytes),
        6 => read::<PrefillJob>(bytes).into_iter().for_each(prefill_job),
        7 => only::<PrefillReply>(bytes),
        8 => only::<Release>(bytes),
        9 => only::<Released>(bytes),
        10 => only::<TokenFrame>(bytes),
        _ => read::<WorkerDescriptor>(bytes)
            .into_iter()
            .for_each(descriptor),
    }
}

fn read<M: Versioned + PartialEq + Debug>(bytes: &[u8]) -> Option<M> {
    match decode::<M>(bytes) {
        Ok(message) => {
            // Numbers beyond f32 are read as infinite, which JSON cannot write.
            if let Ok(again) = encode(&message).and_then(|bytes| decode::<M>(&bytes)) {
                assert_eq!(again, message);
            }
            Some(message)
        }
        Err(error) => {
            let detail = error.to_string();
            assert!(detail.len() <= DETAIL_BYTES_MAX, "{} bytes", detail.len());
            None
        }
    }
}

/// Of whose content nothing more is asked.
fn only<M: Versioned + PartialEq + Debug>(bytes: &[u8]) {
    let _ = read::<M>(bytes);
}

fn prefill_job(mut job: PrefillJob) {
    let checks = fixture::checks();
    let _ = checks.model(&job.model);
    if checks.sequence(&mut job.sequence).is_ok() {
        let sequence = &job.sequence;
        assert!(sequence.tokens.0.len() < fixture::TOKENS_MAX as usize);
        assert!(sequence.output_tokens() < sequence.generation.max_tokens);
    }
}

fn decode_job(mut job: DecodeJob) {
    let checks = fixture::checks();
    if checks.handle(&mut job).is_ok() {
        let blocks = checks.kv.blocks_for(job.handle.valid_tokens as usize);
        let local: Vec<u32> = (0..blocks as u32).collect();
        let whole = KvShares::whole(&checks.kv);
        if let Ok(reads) = plan_reads(&checks.kv, &whole, &whole, &job.handle.runs, &local) {
            let bytes: u64 = reads.iter().map(|read| read.bytes).sum();
            assert_eq!(bytes, (blocks * checks.kv.block_bytes()) as u64);
        }
    }
    job.handle.runs.push(BlockRun {
        first: u32::MAX,
        count: u32::MAX,
    });
    let halves = KvShares::parallel(&checks.kv, 2, 1);
    let whole = KvShares::whole(&checks.kv);
    let _ = plan_reads(&checks.kv, &halves, &whole, &job.handle.runs, &[0, 1]);
}

fn beat(beat: Beat) {
    let now = Instant::now();
    let _ = fixture::kv().difference(&beat.kv);
    let fingerprint = beat.model.fingerprint.clone();
    let mut members = Membership::default();
    members.beat(beat, now);
    let _ = members.faults(&fingerprint, now);
}

fn descriptor(descriptor: WorkerDescriptor) {
    let kv = fixture::kv();
    let ours = KvShares::parallel(&kv, 2, 1);
    if let Ok(map) = BlockMap::new(&kv, &descriptor.shares, &ours) {
        let run = BlockRun { first: 5, count: 3 };
        let reads = map.reads(&[run], &[1, 2, 0]).expect("three blocks");
        let bytes: u64 = reads.iter().map(|read| read.bytes).sum();
        assert_eq!(bytes, (3 * kv.block_bytes()) as u64);
    }
    if let Some(transfer) = descriptor.transfer {
        let ours = UcxVersion(1, 13, 1);
        if baton_transfer::fuzzing::descriptor(&transfer, ours).is_ok() {
            assert!(transfer.ucx.compatible(ours) && !transfer.ranks.is_empty());
        }
    }
}
