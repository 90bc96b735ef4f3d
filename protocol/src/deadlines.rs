//! Every wait on a request's way that more than one process takes part in, in the order in which a request meets them.
//! A wait that depends on another one is computed from it here, and the assertions at the end hold the order between
//! them: whoever waits for somebody else's wait waits longer than that.
//!
//! All are in milliseconds. Waits inside one process that nobody else depends on stand where they are used. The table
//! "Deadlines, hop by hop" of `docs/reliability.md` is made from these (`tests/deadlines_page.rs`).

/// A request's time from its arrival, if its client named none. Ends every wait below.
pub const REQUEST_BUDGET_MS: u32 = 600_000;

/// Workers and API servers beat this often.
pub const BEAT_INTERVAL_MS: u64 = 1_000;

/// A worker whose beats have been missing for this long gets no new jobs: two and a half beats.
pub const SUSPECT_AFTER_MS: u64 = 5 * BEAT_INTERVAL_MS / 2;

/// A worker or API server whose beats have been missing for this long is gone: its requests go elsewhere, or are ended.
pub const GONE_AFTER_MS: u64 = SUSPECT_AFTER_MS + 2 * BEAT_INTERVAL_MS;

/// An API server of another incarnation takes a name over once the one that has it has been silent for this long: a beat
/// and a half. Until then workers refuse the newcomer and keep what the first one asked for.
pub const NAME_FREE_AFTER_MS: u64 = 3 * BEAT_INTERVAL_MS / 2;

/// An API server with a name that another one may have listens for this long before it serves: by then whoever had the
/// name and died has been silent for [`NAME_FREE_AFTER_MS`] at every worker.
pub const NAME_CLAIM_MS: u64 = NAME_FREE_AFTER_MS + BEAT_INTERVAL_MS / 2;

/// A worker answers a control request (decode admission, release, renewal, describe) within this time, or is taken not to
/// answer at all.
pub const CONTROL_TIMEOUT_MS: u64 = 3_000;

/// A context worker that is asked how far a prompt is ([`crate::Progress`]) answers within this time even where there is nothing
/// new: with its next beat.
pub const PROGRESS_WAIT_MS: u64 = BEAT_INTERVAL_MS;

/// A prompt whose first token would wait longer than this for a decode worker with room is not begun: the client is told
/// to come back, before its first token. What waits longer than a lease only holds blocks of a context worker.
pub const DECODE_WAIT_MAX_MS: u64 = LEASE_MS as u64;

/// A prefill job, or its answer, may be lost on the bus: the job is sent again when its worker has not reported it for this
/// time, then after twice this time, and so on. A worker that has the job goes on with it.
pub const PREFILL_PATIENCE_MS: u64 = 10_000;

/// A staged handle is kept this long for its release, or for the next renewal.
pub const LEASE_MS: u32 = 30_000;

/// The API server that owns a request renews its lease this often, from the handle's arrival until its release: two
/// renewals in a row may be lost.
pub const LEASE_RENEW_INTERVAL_MS: u64 = lease_renew_interval_ms(LEASE_MS);

/// [`LEASE_RENEW_INTERVAL_MS`] of a handle whose worker gives leases of this length.
pub const fn lease_renew_interval_ms(lease_ms: u32) -> u64 {
    let interval = lease_ms as u64 / 3;
    if interval == 0 { 1 } else { interval }
}

/// Shortest time before a request that was refused for want of room is sent to the same worker again. Between this and
/// [`ASK_AGAIN_MAX_MS`] the worker's hint decides.
pub const ASK_AGAIN_MIN_MS: u64 = 50;

/// Longest time before it is.
pub const ASK_AGAIN_MAX_MS: u64 = 500;

/// A decode worker keeps a refused job's place in its line this long after the job last asked.
pub const PLACE_KEPT_MS: u64 = 4 * ASK_AGAIN_MAX_MS;

/// A prompt whose beginning is pulled from another worker is given up to as long for that as computing it would take, and at least this
/// long: a question and its answer, and the same for the release. Where nobody knows what computing takes it is [`CONTROL_TIMEOUT_MS`].
pub const PREFIX_PULL_MIN_MS: u64 = ASK_AGAIN_MIN_MS;

/// A request that was begun waits this long for a worker where none is there at all: one that was killed is started again
/// meanwhile. For one that is full it waits until the request's deadline.
pub const ABSENT_WAIT_MS: u64 = 30_000;

/// Batch requests wait while interactive ones do; one of them has its turn after no more than this, wherever they wait.
pub const BATCH_TURN_MS: u64 = 5_000;

/// A connection on which reads are outstanding and not one of them ends for this long is broken. As long as they do end,
/// a pull may take until its request's deadline.
pub const PULL_STALL_MS: u64 = 10_000;

/// A worker reports each job that it has with each of its beats: a context worker each prompt that waits or runs and is not answered
/// yet, a decode worker, by an item without tokens, each job that waits for its turn to pull, pulls, waits for its release, or generates.
pub const JOB_REPORT_INTERVAL_MS: u64 = BEAT_INTERVAL_MS;

/// An API server that hears nothing of a job that is being pulled for this long gives the decode worker up.
pub const PULL_SILENCE_MS: u64 = PULL_STALL_MS + 2 * CONTROL_TIMEOUT_MS;

/// The same while it generates. Longer than for a pull, for the sake of workers of earlier releases, which say nothing
/// between tokens.
pub const DECODE_SILENCE_MS: u64 = 30_000;

/// The same after frames were lost, or the bus was away: the news of the end may have been among them.
/// Two reports are due in what is left of it after [`LATE_AFTER_LOSS_MS`].
pub const SILENCE_AFTER_LOSS_MS: u64 = LATE_AFTER_LOSS_MS + 2 * JOB_REPORT_INTERVAL_MS;

/// An API server may still be reading what it received before a loss for this long after the loss: until then it does not
/// take what it reads for a sign that the worker is at it.
pub const LATE_AFTER_LOSS_MS: u64 = JOB_REPORT_INTERVAL_MS;

/// Longest step of an executor on a GPU. One that takes longer hangs: its worker says so and ends.
pub const STEP_MAX_GPU_MS: u64 = 30_000;

/// Longest step of an executor on CPUs.
pub const STEP_MAX_CPU_MS: u64 = 300_000;

const _: () = {
    assert!(GONE_AFTER_MS > SUSPECT_AFTER_MS + BEAT_INTERVAL_MS);
    // Who lost one beat to the bus keeps its name; who is gone has lost it.
    assert!(NAME_FREE_AFTER_MS > BEAT_INTERVAL_MS && NAME_FREE_AFTER_MS < GONE_AFTER_MS);
    // When a newcomer speaks, workers have missed its predecessor for long enough.
    assert!(NAME_CLAIM_MS > NAME_FREE_AFTER_MS && NAME_CLAIM_MS < GONE_AFTER_MS);
    // One renewal and its answer may be lost twice and the lease is still alive.
    assert!(3 * LEASE_RENEW_INTERVAL_MS <= LEASE_MS as u64);
    assert!(CONTROL_TIMEOUT_MS < LEASE_RENEW_INTERVAL_MS);
    // What is pulled before a prompt has ended before anybody sends the prompt again, or gives a lease of it up.
    assert!(PREFIX_PULL_MIN_MS < CONTROL_TIMEOUT_MS && CONTROL_TIMEOUT_MS < LEASE_MS as u64);
    // A question that waits for news is answered before its asker gives it up, with a beat's delay.
    assert!(PROGRESS_WAIT_MS + BEAT_INTERVAL_MS < CONTROL_TIMEOUT_MS);
    // Who waits for room is back before its place is given away, with a beat's delay on the bus.
    assert!(ASK_AGAIN_MIN_MS < ASK_AGAIN_MAX_MS);
    assert!(PLACE_KEPT_MS > ASK_AGAIN_MAX_MS + BEAT_INTERVAL_MS);
    // Who waits for an absent worker sees that it is gone, and sees it come back.
    assert!(ABSENT_WAIT_MS > 2 * GONE_AFTER_MS);
    // Who waits for a pull hears of it several times before it gives up, and longer than the pull's own end takes.
    assert!(PULL_SILENCE_MS >= 5 * JOB_REPORT_INTERVAL_MS);
    assert!(PULL_SILENCE_MS > PULL_STALL_MS + CONTROL_TIMEOUT_MS);
    // A worker that is gone is seen by its beats before anybody gives up waiting for what it reports.
    assert!(GONE_AFTER_MS < PULL_SILENCE_MS && PULL_SILENCE_MS <= DECODE_SILENCE_MS);
    // A loss is not told by silence before a report was due.
    assert!(SILENCE_AFTER_LOSS_MS > LATE_AFTER_LOSS_MS + JOB_REPORT_INTERVAL_MS);
    // A job that waits or runs is reported several times before it is taken for lost.
    assert!(PREFILL_PATIENCE_MS >= 5 * JOB_REPORT_INTERVAL_MS);
    // A lost job is sent again before its sender would be missed for it, and long before the request's end.
    assert!(PREFILL_PATIENCE_MS > CONTROL_TIMEOUT_MS);
    assert!(DECODE_WAIT_MAX_MS < REQUEST_BUDGET_MS as u64);
    assert!((LEASE_MS as u64) < REQUEST_BUDGET_MS as u64);
};
