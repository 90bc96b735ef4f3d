//! The generations under way, as `GET /requests` shows them: where each stands, and numbers. Nothing of their text, and of an id only
//! its beginning: it finds the request in the logs, and reads no response that is kept.
//!
//! A token costs no more for being seen: it is counted where it was counted before. The rest is written when a generation moves on.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use baton_protocol::{RequestId, WorkerId};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::request::inbox::lock;
use crate::request::spent::ms;
use crate::service::Class;

/// Most that are shown; the oldest first. All are counted.
pub const SHOWN: usize = 256;

/// Characters of an id that are shown.
const ID_CHARS: usize = 8;

/// All that are under way, the oldest first.
#[derive(Default)]
pub struct Running(Mutex<Table>);

#[derive(Default)]
struct Table {
    /// How many ever began.
    count: u64,
    rows: BTreeMap<u64, Arc<Live>>,
}

/// One generation under way.
pub struct Live {
    request: RequestId,
    class: Class,
    arrived: Instant,
    prompt_tokens: usize,
    /// Tokens after the first.
    more: Arc<AtomicU32>,
    place: Mutex<Place>,
}

/// What changes when a generation moves on.
#[derive(Clone, Debug, Default)]
pub struct Place {
    /// Where it stands.
    pub stage: Stage,
    /// Who was last sent its prompt, and then its KV's handle.
    pub workers: [Option<WorkerId>; 2],
    /// Tokens of its prompt whose KV was there.
    pub cached_tokens: u32,
    /// When its first token came.
    pub first: Option<Instant>,
}

/// The phases of a life, as people are told of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// It waits for a context worker with room.
    #[default]
    Queued,
    /// A context worker has its prompt.
    Prefilling,
    /// Its KV waits for a decode worker with room.
    Staged,
    /// A decode worker was sent its handle.
    Pulling,
    /// Tokens come from there.
    Decoding,
}

/// What is to be known of a generation when it begins.
pub struct Begun {
    /// Its id.
    pub request: RequestId,
    /// Its class.
    pub class: Class,
    /// When its HTTP request came.
    pub arrived: Instant,
    /// Tokens of its prompt.
    pub prompt_tokens: usize,
    /// Counts its tokens after the first.
    pub more: Arc<AtomicU32>,
}

impl Running {
    /// Shows a generation until the value is dropped.
    pub fn begin(self: &Arc<Self>, begun: Begun) -> Shown {
        let Begun {
            request,
            class,
            arrived,
            prompt_tokens,
            more,
        } = begun;
        let live = Arc::new(Live {
            request,
            class,
            arrived,
            prompt_tokens,
            more,
            place: Mutex::default(),
        });
        let mut table = lock(&self.0);
        table.count += 1;
        let number = table.count;
        table.rows.insert(number, Arc::clone(&live));
        Shown {
            all: Arc::clone(self),
            number,
            live,
        }
    }

    /// The oldest [`SHOWN`] of them, and what all of them come to.
    pub fn rendered(&self, now: Instant) -> (Value, Totals) {
        let all: Vec<_> = lock(&self.0).rows.values().cloned().collect();
        let mut totals = Totals::default();
        let mut rows = Vec::new();
        for live in all {
            let place = live.place();
            totals.add(&live, &place, now);
            if rows.len() < SHOWN {
                rows.push(json!(Row::of(&live, &place, now)));
            }
        }
        (rows.into(), totals)
    }
}

/// What all generations under way come to.
#[derive(Debug, Default, PartialEq, Serialize)]
pub struct Totals {
    /// Those that a worker has.
    pub running: usize,
    /// Those that wait for one with room.
    pub waiting: usize,
    /// Of those that decode: each one's mean rate since its first token, added up.
    pub tokens_per_second: f64,
}

impl Totals {
    fn add(&mut self, live: &Live, place: &Place, now: Instant) {
        match place.stage {
            Stage::Queued | Stage::Staged => self.waiting += 1,
            Stage::Prefilling | Stage::Pulling | Stage::Decoding => self.running += 1,
        }
        let since = place
            .first
            .map(|first| now.saturating_duration_since(first));
        if let (Stage::Decoding, Some(since)) = (place.stage, since)
            && since > Duration::ZERO
        {
            self.tokens_per_second += f64::from(live.more()) / since.as_secs_f64();
        }
    }
}

impl Live {
    fn more(&self) -> u32 {
        self.more.load(Ordering::Relaxed)
    }

    fn place(&self) -> Place {
        lock(&self.place).clone()
    }
}

/// Keeps a generation among those that are shown.
pub struct Shown {
    all: Arc<Running>,
    number: u64,
    live: Arc<Live>,
}

impl Shown {
    /// It moves on.
    pub fn note(&self, change: impl FnOnce(&mut Place)) {
        change(&mut lock(&self.live.place));
    }

    /// Where it stands.
    pub fn place(&self) -> Place {
        self.live.place()
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        lock(&self.all.0).rows.remove(&self.number);
    }
}

#[derive(Serialize)]
struct Row<'a> {
    id: String,
    age_ms: f64,
    phase: Stage,
    tier: &'a str,
    priority: i32,
    prompt_tokens: usize,
    cached_tokens: u32,
    output_tokens: u32,
    /// From its arrival to its first token.
    ttft_ms: Option<f64>,
    context_worker: Option<&'a WorkerId>,
    decode_worker: Option<&'a WorkerId>,
}

impl<'a> Row<'a> {
    fn of(live: &'a Live, place: &'a Place, now: Instant) -> Self {
        let [context_worker, decode_worker] = place.workers.each_ref().map(Option::as_ref);
        let since_arrival = |at: Instant| ms(at.saturating_duration_since(live.arrived));
        Self {
            id: live.request.to_string().chars().take(ID_CHARS).collect(),
            age_ms: since_arrival(now),
            phase: place.stage,
            tier: live.class.tier.label(),
            priority: live.class.priority,
            prompt_tokens: live.prompt_tokens,
            cached_tokens: place.cached_tokens,
            output_tokens: u32::from(place.first.is_some()) + live.more(),
            ttft_ms: place.first.map(since_arrival),
            context_worker,
            decode_worker,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begin(all: &Arc<Running>, request: u128, arrived: Instant) -> Shown {
        all.begin(Begun {
            request: RequestId(request),
            class: Class::default(),
            arrived,
            prompt_tokens: 7,
            more: Arc::default(),
        })
    }

    #[test]
    fn those_under_way_are_shown_the_oldest_first_and_bounded_and_all_are_counted() {
        let (all, now) = (Arc::new(Running::default()), Instant::now());
        let mut shown: Vec<_> = (0..SHOWN as u128 + 3)
            .map(|number| begin(&all, number << 96, now))
            .collect();
        shown[0].note(|place| place.stage = Stage::Prefilling);
        let (rows, totals) = all.rendered(now);
        let rows = rows.as_array().unwrap();
        assert_eq!(rows.len(), SHOWN);
        assert_eq!((totals.running, totals.waiting), (1, SHOWN + 2));
        // The beginning of its id and no more.
        assert_eq!([&rows[0]["id"], &rows[1]["id"]], ["00000000", "00000001"]);
        shown.remove(0);
        let (rows, totals) = all.rendered(now);
        assert_eq!(rows[0]["id"], "00000001");
        assert_eq!((totals.running, totals.waiting), (0, SHOWN + 2));
        drop(shown);
        assert_eq!(all.rendered(now), (json!([]), Totals::default()));
    }

    #[test]
    fn tokens_are_told_with_the_rate_since_the_first() {
        let (all, arrived) = (Arc::new(Running::default()), Instant::now());
        let more = Arc::new(AtomicU32::new(30));
        let shown = all.begin(Begun {
            request: RequestId(1),
            class: Class::default(),
            arrived,
            prompt_tokens: 7,
            more,
        });
        let first = arrived + Duration::from_millis(500);
        shown.note(|place| {
            *place = Place {
                stage: Stage::Decoding,
                workers: [Some(WorkerId::new("c").unwrap()), None],
                cached_tokens: 4,
                first: Some(first),
            };
        });
        let (rows, totals) = all.rendered(first + Duration::from_secs(2));
        assert_eq!(totals.tokens_per_second, 15.0);
        let told = json!([{
            "id": "00000000", "age_ms": 2500.0, "phase": "decoding", "tier": "interactive", "priority": 0, "prompt_tokens": 7,
            "cached_tokens": 4, "output_tokens": 31, "ttft_ms": 500.0, "context_worker": "c", "decode_worker": null,
        }]);
        assert_eq!(rows, told);
    }
}
