//! What is told of the prefix index: reports of what entered and left it, and pages of all that is in it for who missed one
//! (`baton_protocol::PrefixReport`).

use std::collections::BTreeMap;
use std::time::Duration;

use baton_engine::{BlockPool, PrefixChanges};
use baton_protocol::PackedLinks;
use baton_protocol::limits::PREFIX_CHANGES_MAX;
use tokio::time::Instant;

/// Reports come no faster than this.
const REPORT_INTERVAL: Duration = Duration::from_millis(50);

/// Changes that come within this time of the first are told together: those of one step.
const REPORT_WAIT: Duration = Duration::from_millis(5);

/// Links that may wait to be told. Beyond it they are given up, and everybody asks for all.
const WAITING_MAX: usize = 8 * PREFIX_CHANGES_MAX;

/// Pages that are given in one [`PAGES_TIME`]: an API server takes one after the other, and the largest arena has 16.
const PAGES_MAX: usize = 64;

const PAGES_TIME: Duration = Duration::from_secs(1);

/// What a report tells.
#[derive(Debug, PartialEq)]
pub(crate) struct Report {
    pub(crate) since: u64,
    pub(crate) version: u64,
    pub(crate) added: PackedLinks,
    pub(crate) removed: PackedLinks,
}

/// What listeners know that missed nothing, and what they are to be told next.
#[derive(Default)]
pub(crate) struct PrefixesTold {
    version: u64,
    /// Links that are in the index now, or not.
    waiting: BTreeMap<u64, bool>,
    last: Option<Instant>,
    due: Option<Instant>,
    pages_since: Option<Instant>,
    pages: usize,
}

impl PrefixesTold {
    /// Number of the last report.
    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    /// Something entered the index or left it.
    pub(crate) fn changed(&mut self, now: Instant) {
        let soonest = self.last.map(|last| last + REPORT_INTERVAL);
        let due = (now + REPORT_WAIT).max(soonest.unwrap_or(now));
        self.due.get_or_insert(due);
    }

    /// When the next report is due.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// The report that is due now, if there is something to tell. It counts as told from now on: should it be lost, its number
    /// shows that.
    pub(crate) fn report(&mut self, now: Instant, pool: &BlockPool) -> Option<Report> {
        self.due.take_if(|due| *due <= now)?;
        self.last = Some(now);
        let PrefixChanges { changes, lost } = pool.take_prefix_changes();
        self.waiting.extend(changes);
        if lost || self.waiting.len() > WAITING_MAX {
            // A number that no report has: who listens sees that something was not told, and what waits is in the pages.
            self.waiting.clear();
            self.version += 1;
        } else if self.waiting.is_empty() {
            return None;
        }
        let (mut added, mut removed) = (Vec::new(), Vec::new());
        for _ in 0..PREFIX_CHANGES_MAX {
            match self.waiting.pop_first() {
                Some((link, true)) => added.push(link),
                Some((link, false)) => removed.push(link),
                None => break,
            }
        }
        if !self.waiting.is_empty() {
            self.changed(now);
        }
        let since = self.version;
        self.version += 1;
        Some(Report {
            since,
            version: self.version,
            added: PackedLinks(added),
            removed: PackedLinks(removed),
        })
    }

    /// Whether a page may be given now: not too many were just now.
    pub(crate) fn gives_page(&mut self, now: Instant) -> bool {
        let is_over = |since: Instant| now.duration_since(since) >= PAGES_TIME;
        if self.pages_since.is_none_or(is_over) {
            (self.pages_since, self.pages) = (Some(now), 0);
        }
        self.pages += 1;
        self.pages <= PAGES_MAX
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use baton_engine::{Engine, EngineConfig, FakeConfig, FakeExecutor, NewSequence};
    use baton_protocol::{CacheSalt, Generation, SequenceSpec, Service, prefix_chain};

    use super::*;

    const SALT: CacheSalt = CacheSalt(3);

    /// Over blocks of one token.
    fn engine(blocks: u32) -> (Engine, BlockPool) {
        let mut fake = FakeConfig {
            blocks,
            tokens_max: blocks,
            step_tokens_max: blocks as usize,
            vocab: 2 * blocks,
            ..FakeConfig::default()
        };
        fake.kv.block_tokens = 1;
        let config = EngineConfig {
            step_tokens_max: blocks as usize,
            sequences_max: 1,
            queue_max: 1,
            prefix_cache: true,
        };
        let engine = Engine::new(Box::new(FakeExecutor::new(fake)), config);
        let pool = engine.pool();
        pool.on_prefix_change(|| {});
        (engine, pool)
    }

    /// Runs a prompt, whose blocks are in the index then.
    fn run(engine: &mut Engine, tokens: &[u32]) {
        let spec = SequenceSpec {
            tokens: tokens.to_vec().into(),
            prompt_tokens: tokens.len() as u32,
            generation: Generation {
                max_tokens: 1,
                ..Generation::default()
            },
            cache_salt: SALT,
            service: Service::default(),
        };
        let new = NewSequence {
            key: 1,
            spec,
            prompt_logprobs: None,
            constraint: None,
            stream: false,
        };
        engine.submit(new).unwrap();
        while engine.has_work() {
            drop(engine.step().unwrap());
        }
    }

    #[test]
    fn reports_are_numbered_coalesced_and_seldom() {
        let ((mut engine, pool), mut told) = (engine(8), PrefixesTold::default());
        let mut now = Instant::now();
        assert_eq!(told.report(now, &pool), None);
        run(&mut engine, &[1, 2, 3]);
        told.changed(now);
        assert_eq!(
            told.report(now, &pool),
            None,
            "others of this step may follow"
        );
        now = told.due().unwrap();
        let report = told.report(now, &pool).unwrap();
        assert_eq!((report.since, report.version), (0, 1));
        let chain = prefix_chain(SALT, 1, &[1, 2, 3]);
        assert_eq!(
            BTreeSet::from_iter(report.added.0),
            chain.iter().copied().collect()
        );
        assert_eq!(told.due(), None);

        // All of it leaves, and two of three come back.
        drop(pool.reserve(8));
        told.changed(now);
        run(&mut engine, &[1, 2]);
        told.changed(now);
        assert_eq!(told.due(), Some(now + REPORT_INTERVAL));
        now += REPORT_INTERVAL;
        let report = told.report(now, &pool).unwrap();
        assert_eq!((report.since, report.version), (1, 2));
        assert_eq!(
            BTreeSet::from_iter(report.added.0),
            chain[..2].iter().copied().collect()
        );
        assert_eq!(report.removed.0, chain[2..]);
        assert_eq!(told.version(), 2);
    }

    #[test]
    fn many_changes_are_several_reports_and_too_many_a_gap() {
        let count = PREFIX_CHANGES_MAX as u32 + 5;
        let ((mut engine, pool), mut told) = (engine(2 * count), PrefixesTold::default());
        let mut now = Instant::now();
        let tokens: Vec<u32> = (0..count).collect();
        run(&mut engine, &tokens);
        told.changed(now);
        let mut added = BTreeSet::new();
        for version in 1..=2 {
            now = told.due().unwrap();
            let report = told.report(now, &pool).unwrap();
            assert_eq!((report.since, report.version), (version - 1, version));
            assert!(report.added.0.len() <= PREFIX_CHANGES_MAX);
            added.extend(report.added.0);
        }
        assert_eq!(told.due(), None);
        assert_eq!(added, prefix_chain(SALT, 1, &tokens).into_iter().collect());

        told.waiting = (0..=WAITING_MAX as u64).map(|link| (link, true)).collect();
        told.changed(now);
        now = told.due().unwrap();
        let report = told.report(now, &pool).unwrap();
        assert_eq!((report.since, report.version), (3, 4), "nobody has had 3");
        assert!(report.added.0.is_empty());
    }

    #[test]
    fn who_asks_for_pages_without_end_gets_some_now_and_then() {
        let (mut told, now) = (PrefixesTold::default(), Instant::now());
        let given = (0..1_000).filter(|_| told.gives_page(now)).count();
        assert_eq!(given, PAGES_MAX);
        assert!(told.gives_page(now + PAGES_TIME));
    }
}
