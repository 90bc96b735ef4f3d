//! Reads along on the bus of a run in which nothing goes wrong, and says what must not be: pulls that are not served in
//! their turn, admissions that are wasted, and processes whose waits contradict each other.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use baton_protocol::deadlines::ASK_AGAIN_MAX_MS;
use baton_protocol::{
    Abort, DecodeJob, DecodeReply, Progress, ProgressReply, Release, Released, RequestId, Tier,
    TokenFrame, Versioned, WorkerId, decode,
};
use tokio::time::Instant;

use crate::faults::links::Links;
use crate::network;
use crate::weather::Kind;

/// As many pulls share a link, each with an equal part of it (`PULLS_OF_ONE_MAX` in the worker).
const SHARING_MAX: u32 = 8;

/// So many that came later may be admitted while a request waits for room: it asks again within half a second, and meanwhile
/// others pass as long as there is room for it too.
const OVERTAKERS_MAX: usize = 12;

/// Who still waits has asked again within this time, many times over.
const ASKS_WITHIN: Duration = Duration::from_millis(10 * ASK_AGAIN_MAX_MS);

/// A pull may take this much longer than it must: messages under way, and the release.
const SLACK: Duration = Duration::from_secs(2);

/// So much of the link later pulls may have beyond their share: pauses between reads are not the same for all.
const PASSED_SLACK: Duration = Duration::from_millis(500);

/// What was seen on the bus.
#[derive(Default)]
pub struct Witness {
    links: Links,
    /// For so long a link that is dead keeps its pulls, if one may be.
    stall: Duration,
    /// Requests whose answers are under way, by the subject of the answer.
    asked: BTreeMap<String, Asked>,
    /// Pulls that were admitted and have not ended, by decode worker and request.
    pulls: BTreeMap<(WorkerId, RequestId), Pull>,
    /// Requests that these workers were told to end: what is admitted of them is wasted by intent.
    aborted: BTreeSet<(WorkerId, RequestId)>,
    /// Requests that a decode worker refused, and that ask it again.
    waiting: BTreeMap<(WorkerId, RequestId), Waiting>,
    /// Decode jobs so far.
    jobs: u64,
    wrong: Vec<String>,
}

enum Asked {
    Decode {
        by: WorkerId,
        job: Box<DecodeJob>,
    },
    Release {
        from: WorkerId,
        release: Box<Release>,
    },
    Progress {
        by: WorkerId,
        request: RequestId,
    },
}

/// A request that waits for room on one decode worker.
struct Waiting {
    /// Interactive before batch, and the higher priority first.
    class: (Tier, Reverse<i32>),
    /// When it was refused last.
    asked: Instant,
    /// The number of the first decode job that the worker refused.
    first: u64,
    /// How often it was refused.
    refusals: u32,
    /// Who came later, and was admitted before it.
    overtakers: BTreeSet<RequestId>,
}

struct Pull {
    from: WorkerId,
    since: Instant,
    /// What its bytes take if it has the link alone.
    link_time: Duration,
    /// Had it its turn, it has ended by then. None while its prompt runs, which it follows.
    by: Option<Instant>,
    /// The number of its job, or of the last when its prompt was done.
    number: u64,
    /// It followed a prompt: most of it was read before that was done.
    is_streamed: bool,
    /// What those take that were admitted after it and read before it.
    passed_by: Duration,
}

impl Witness {
    /// Of a cluster with these links, of which one may die: then pulls may wait for as long as `stall`.
    pub fn new(links: Links, stall: Duration) -> Self {
        Self {
            links,
            stall,
            ..Self::default()
        }
    }
}

impl network::Witness for Witness {
    fn saw(&mut self, kind: Kind, subject: &str, reply: Option<&str>, payload: &[u8]) {
        let to = || WorkerId::new(subject.rsplit('.').next().unwrap_or_default()).ok();
        match kind {
            Kind::Decode => {
                if let (Some(reply), Some(by), Some(job)) =
                    (reply, to(), read::<DecodeJob>(payload))
                {
                    // A later try: what it has was not aborted.
                    self.aborted.remove(&(by.clone(), job.request));
                    self.aborted
                        .remove(&(job.handle.worker.clone(), job.request));
                    let asked = Asked::Decode { by, job };
                    self.asked.insert(reply.to_owned(), asked);
                }
            }
            Kind::Release => {
                let Some(release) = read::<Release>(payload) else {
                    return;
                };
                // Who gives a pull up waits for no answer.
                if reply.is_some() {
                    self.has_read(&release.decode_worker, release.request);
                }
                self.ended(&release.decode_worker, release.request);
                if let (Some(reply), Some(from)) = (reply, to()) {
                    let asked = Asked::Release { from, release };
                    self.asked.insert(reply.to_owned(), asked);
                }
            }
            Kind::Answer => match self.asked.remove(subject) {
                Some(Asked::Decode { by, job }) => self.decode_answered(by, &job, payload),
                Some(Asked::Release { from, release }) => {
                    self.release_answered(from, &release, payload);
                }
                Some(Asked::Progress { by, request }) => {
                    self.progress_answered((by, request), payload);
                }
                None => {}
            },
            Kind::Progress => {
                // Who asks is in the subject of the answer.
                let by = |reply: &str| WorkerId::new(reply.split('.').nth(1)?).ok();
                if let (Some(reply), Some(progress)) = (reply, read::<Progress>(payload))
                    && let Some(by) = by(reply)
                {
                    let request = progress.request;
                    let asked = Asked::Progress { by, request };
                    self.asked.insert(reply.to_owned(), asked);
                }
            }
            Kind::Abort => {
                if let (Some(worker), Some(abort)) = (to(), read::<Abort>(payload)) {
                    self.abort(worker, &abort);
                }
            }
            // What it says of a pull is that it failed, or that it is over.
            Kind::Tokens if !self.pulls.is_empty() => {
                if let Some(frame) = read::<TokenFrame>(payload) {
                    for item in frame.items.iter().filter(|item| item.end.is_some()) {
                        self.ended(&frame.worker, item.request);
                    }
                }
            }
            Kind::Tokens | Kind::Prefill | Kind::Renew | Kind::Beat | Kind::Describe => {}
        }
    }

    fn take_wrong(&mut self) -> Vec<String> {
        let now = Instant::now();
        let late: Vec<_> = self
            .pulls
            .iter()
            .filter(|(_, pull)| pull.by.is_some_and(|by| by < now))
            .map(|(key, _)| key.clone())
            .collect();
        for (worker, request) in late {
            self.ended(&worker, request);
        }
        std::mem::take(&mut self.wrong)
    }
}

impl Witness {
    fn decode_answered(&mut self, by: WorkerId, job: &DecodeJob, payload: &[u8]) {
        let from = job.handle.worker.clone();
        let answer = read::<DecodeReply>(payload);
        let is_admitted = matches!(answer.as_deref(), Some(DecodeReply::Admitted { .. }));
        self.jobs += 1;
        if !is_admitted {
            return self.refused(by, job);
        }
        self.admitted(&by, job);
        // A worker that does both takes its own KV over.
        if from == by {
            return;
        }
        let now = Instant::now();
        let block = u64::from(job.handle.kv.block_tokens);
        let tokens = u64::from(job.handle.valid_tokens).div_ceil(block) * block;
        let link_time = self.links.time(by.as_str(), from.as_str(), tokens);
        let ends_by = self.ends_by(&by, &from, link_time);
        let pull = Pull {
            from,
            since: now,
            link_time,
            by: (!job.handle.is_streamed()).then_some(ends_by),
            number: self.jobs,
            is_streamed: job.handle.is_streamed(),
            passed_by: Duration::ZERO,
        };
        self.pulls.insert((by, job.request), pull);
    }

    /// By when a pull that begins now ends, or whose prompt is done now.
    fn ends_by(&self, by: &WorkerId, from: &WorkerId, link_time: Duration) -> Instant {
        let pulls = self.pulls.iter();
        let before = pulls.filter(|((worker, _), pull)| worker == by && pull.from == *from);
        let before: Duration = before.map(|(_, pull)| pull.link_time).sum();
        let takes = before + SHARING_MAX * link_time;
        Instant::now() + takes + takes / 4 + self.stall + SLACK
    }

    /// Its prompt is done: a pull that followed it has the last chunk to read.
    fn progress_answered(&mut self, key: (WorkerId, RequestId), payload: &[u8]) {
        match read::<ProgressReply>(payload).as_deref() {
            Some(ProgressReply::Done { finish: None, .. }) => {}
            Some(ProgressReply::Running { .. }) | None => return,
            Some(_) => return drop(self.pulls.remove(&key)),
        }
        let Some(pull) = self.pulls.get(&key) else {
            return;
        };
        let by = self.ends_by(&key.0, &pull.from, pull.link_time);
        let number = self.jobs;
        if let Some(pull) = self.pulls.get_mut(&key)
            && pull.by.is_none()
        {
            (pull.by, pull.number) = (Some(by), number);
            (pull.since, pull.passed_by) = (Instant::now(), Duration::ZERO);
        }
    }

    fn refused(&mut self, by: WorkerId, job: &DecodeJob) {
        let (number, now) = (self.jobs, Instant::now());
        let waiting = self.waiting.entry((by, job.request)).or_insert(Waiting {
            class: class(job),
            asked: now,
            first: number,
            refusals: 0,
            overtakers: BTreeSet::new(),
        });
        waiting.asked = now;
        waiting.refusals += 1;
    }

    /// Of those of its class and lower ones, who asked this worker first, and again and again, should have had the place.
    fn admitted(&mut self, by: &WorkerId, job: &DecodeJob) {
        let request = job.request;
        let number = self.jobs;
        let first = self.waiting.get(&(by.clone(), request));
        let first = first.map_or(number, |waiting| waiting.first);
        self.waiting
            .retain(|(_, of), waiting| *of != request && waiting.asked.elapsed() < ASKS_WITHIN);
        for ((worker, of), waiting) in &mut self.waiting {
            // A place in the line counts once its job has come back.
            let is_before = waiting.first < first && waiting.class <= class(job);
            if worker == by && is_before && waiting.refusals > 1 {
                waiting.overtakers.insert(request);
                if waiting.overtakers.len() == OVERTAKERS_MAX {
                    self.wrong.push(format!(
                        "{of} waits for room on {worker}, and {OVERTAKERS_MAX} that came later were admitted there"
                    ));
                }
            }
        }
    }

    fn release_answered(&mut self, from: WorkerId, release: &Release, payload: &[u8]) {
        let is_valid = read::<Released>(payload).is_some_and(|released| released.valid);
        let Release {
            request,
            decode_worker,
            ..
        } = release;
        let workers = [from, decode_worker.clone()];
        let mut told = workers.into_iter().map(|worker| (worker, *request));
        if !is_valid && !told.any(|told| self.aborted.contains(&told)) {
            self.wrong.push(format!(
                "{decode_worker} admitted and read {request} for nothing: the lease of its handle had ended"
            ));
        }
    }

    fn abort(&mut self, worker: WorkerId, abort: &Abort) {
        let key = (worker.clone(), abort.request);
        // Told to a worker that did not refuse it, it is not about a place in a line: the request, or its try, has ended.
        if self.waiting.remove(&key).is_none() {
            self.waiting.retain(|(_, of), _| *of != abort.request);
        }
        let pull = self.pulls.remove(&key);
        self.aborted.insert(key);
        if let Some(pull) = pull
            && abort.reason.contains("silent")
        {
            let seconds = pull.since.elapsed().as_secs_f32();
            self.wrong.push(format!(
                "an API server gave up the pull of {} after {seconds:.1} s ({}), and {worker} was still at it",
                abort.request, abort.reason
            ));
        }
    }

    /// A pull has read its KV, and so passes those from the same worker that were admitted earlier and have not. A pull that
    /// reads has an eighth of the link: those that pass it meanwhile take no more than seven times what it takes.
    fn has_read(&mut self, worker: &WorkerId, request: RequestId) {
        let pull = self.pulls.get(&(worker.clone(), request));
        let Some(pull) = pull.filter(|pull| !pull.is_streamed) else {
            return;
        };
        let (from, number, link_time) = (pull.from.clone(), pull.number, pull.link_time);
        let earlier = self
            .pulls
            .iter_mut()
            .filter(|((by, _), pull)| by == worker && pull.from == from)
            .filter(|(_, pull)| pull.number < number && pull.by.is_some());
        for ((_, of), pull) in earlier {
            let most = SHARING_MAX * pull.link_time;
            let most = most + most / 4 + PASSED_SLACK;
            let before = pull.passed_by;
            pull.passed_by += link_time;
            if before <= most && pull.passed_by > most {
                let seconds = pull.passed_by.as_secs_f32();
                let own = pull.link_time.as_secs_f32();
                self.wrong.push(format!(
                    "the pull of {of} from {from} by {worker} takes {own:.1} s of the link, and later ones that take \
                     {seconds:.1} s of it were read before it"
                ));
            }
        }
    }

    /// A pull is over, or its time is.
    fn ended(&mut self, worker: &WorkerId, request: RequestId) {
        let Some(pull) = self.pulls.remove(&(worker.clone(), request)) else {
            return;
        };
        let now = Instant::now();
        if let Some(by) = pull.by.filter(|by| *by < now) {
            let seconds = pull.since.elapsed().as_secs_f32();
            let due = (by - pull.since).as_secs_f32();
            let from = &pull.from;
            self.wrong.push(format!(
                "the pull of {request} from {from} by {worker} had no turn: {seconds:.1} s after its admission it goes \
                 on, and {due:.1} s would have been enough for all that came before it and its share of the link"
            ));
        }
    }
}

fn class(job: &DecodeJob) -> (Tier, Reverse<i32>) {
    let service = job.sequence.service;
    (service.tier, Reverse(service.priority))
}

fn read<M: Versioned>(payload: &[u8]) -> Option<Box<M>> {
    decode(payload).ok().map(Box::new)
}
