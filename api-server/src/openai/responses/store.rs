//! Responses that are kept: for `previous_response_id`, and to be read again.
//!
//! They lie in memory, in this API server alone, up to a bound of bytes and for a day. A response keeps all items of its
//! conversation, which it shares with those before it; each counts them as its own, so that the bound holds whoever goes first.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// How long a response is kept.
const AGE_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// What one more response takes beside its texts: entries of two maps.
const ENTRY_BYTES: usize = 256;

/// Items of one turn, as JSON texts: what was asked, and what was answered.
#[derive(Debug, PartialEq, Eq)]
pub struct Segment {
    /// An array.
    pub input: String,
    /// An array.
    pub output: String,
}

/// A response that is kept.
#[derive(Clone, Debug)]
pub struct Kept {
    /// The object, as JSON.
    pub response: Arc<str>,
    /// The turns of its conversation, the last of them its own.
    pub turns: Vec<Arc<Segment>>,
}

impl Kept {
    fn bytes(&self) -> usize {
        let turns = self.turns.iter();
        let turns: usize = turns
            .map(|turn| size_of::<Arc<Segment>>() + turn.input.len() + turn.output.len())
            .sum();
        ENTRY_BYTES + self.response.len() + turns
    }
}

/// The store.
#[derive(Debug)]
pub struct ResponseStore {
    bytes_max: usize,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    entries: HashMap<Arc<str>, Entry>,
    /// When each was used last, the first the longest ago.
    used: BTreeMap<u64, Arc<str>>,
    uses: u64,
    bytes: usize,
}

#[derive(Debug)]
struct Entry {
    /// The name of the key that made it, where there are keys.
    owner: Option<Arc<str>>,
    kept: Kept,
    made: Instant,
    used: u64,
}

impl ResponseStore {
    /// With room for so many bytes; 0 keeps nothing.
    pub fn new(bytes_max: usize) -> Self {
        Self {
            bytes_max,
            inner: Mutex::default(),
        }
    }

    /// Whether anything is kept.
    pub fn is_on(&self) -> bool {
        self.bytes_max > 0
    }

    /// How many are kept, and their bytes.
    pub fn size(&self) -> (usize, usize) {
        let inner = self.inner();
        (inner.entries.len(), inner.bytes)
    }

    /// Keeps a response, and lets those go that were not used for longest. One that is too large by itself is not kept.
    pub fn put(&self, id: &str, owner: Option<Arc<str>>, kept: Kept) {
        let bytes = kept.bytes();
        if bytes > self.bytes_max {
            return;
        }
        let now = Instant::now();
        let mut inner = self.inner();
        inner.remove(id);
        while inner.bytes + bytes > self.bytes_max || inner.oldest_is_over(now) {
            let Some((_, oldest)) = inner.used.pop_first() else {
                break;
            };
            inner.remove(&oldest);
        }
        let id: Arc<str> = id.into();
        inner.uses += 1;
        let used = inner.uses;
        inner.used.insert(used, Arc::clone(&id));
        inner.bytes += bytes;
        let made = now;
        inner.entries.insert(
            id,
            Entry {
                owner,
                kept,
                made,
                used,
            },
        );
    }

    /// One that this owner may see.
    pub fn get(&self, id: &str, owner: Option<&str>) -> Option<Kept> {
        let mut inner = self.inner();
        inner.look(id, owner)?;
        inner.uses += 1;
        let uses = inner.uses;
        let entry = inner.entries.get_mut(id)?;
        let before = std::mem::replace(&mut entry.used, uses);
        let kept = entry.kept.clone();
        if let Some(id) = inner.used.remove(&before) {
            inner.used.insert(uses, id);
        }
        Some(kept)
    }

    /// Lets one go that this owner may see. True if there was one.
    pub fn delete(&self, id: &str, owner: Option<&str>) -> bool {
        let mut inner = self.inner();
        inner.look(id, owner).is_some() && inner.remove(id)
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Says whether it is there for this owner. One that is too old goes.
    fn look(&mut self, id: &str, owner: Option<&str>) -> Option<()> {
        let entry = self.entries.get(id)?;
        if entry.made.elapsed() > AGE_MAX {
            self.remove(id);
            return None;
        }
        (entry.owner.as_deref() == owner).then_some(())
    }

    fn oldest_is_over(&self, now: Instant) -> bool {
        let oldest = self.used.first_key_value();
        let entry = oldest.and_then(|(_, id)| self.entries.get(id));
        entry.is_some_and(|entry| now.saturating_duration_since(entry.made) > AGE_MAX)
    }

    fn remove(&mut self, id: &str) -> bool {
        let Some(entry) = self.entries.remove(id) else {
            return false;
        };
        self.used.remove(&entry.used);
        self.bytes -= entry.kept.bytes();
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn kept(response: &str, turns: Vec<Arc<Segment>>) -> Kept {
        Kept {
            response: response.into(),
            turns,
        }
    }

    #[test]
    fn a_response_is_its_owners() {
        let store = ResponseStore::new(1 << 20);
        store.put("a", Some("anna".into()), kept("1", Vec::new()));
        store.put("b", None, kept("2", Vec::new()));
        assert!(store.get("a", None).is_none() && store.get("a", Some("bert")).is_none());
        assert!(!store.delete("a", Some("bert")));
        assert_eq!(&*store.get("a", Some("anna")).unwrap().response, "1");
        assert!(store.get("b", Some("anna")).is_none());
        assert!(store.delete("a", Some("anna")) && !store.delete("a", Some("anna")));
        assert_eq!(store.size().0, 1);
        let off = ResponseStore::new(0);
        off.put("a", None, kept("1", Vec::new()));
        assert!(!off.is_on() && off.get("a", None).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_response_is_kept_for_a_day() {
        let store = ResponseStore::new(1 << 20);
        store.put("a", None, kept("1", Vec::new()));
        tokio::time::advance(AGE_MAX).await;
        assert!(store.get("a", None).is_some());
        tokio::time::advance(Duration::from_secs(1)).await;
        store.put("b", None, kept("2", Vec::new()));
        assert_eq!(store.size().0, 1, "the old one went when the new one came");
        assert!(store.get("a", None).is_none());
    }

    proptest! {
        /// Against a list that is kept in order of use: the same are there, and the bound is never passed.
        #[test]
        fn the_ones_used_last_are_kept(
            steps in prop::collection::vec((0..4_u8, 0..12_u8, 0..400_usize), 1..80),
        ) {
            const BYTES_MAX: usize = 3_000;
            let store = ResponseStore::new(BYTES_MAX);
            // From the one used longest ago.
            let mut model: Vec<(String, usize)> = Vec::new();
            for (what, id, bytes) in steps {
                let id = id.to_string();
                let at = model.iter().position(|(one, _)| *one == id);
                match what {
                    0 | 1 => {
                        let turn = Arc::new(Segment { input: "x".repeat(bytes), output: String::new() });
                        let kept = kept("r", vec![turn]);
                        let bytes = kept.bytes();
                        store.put(&id, None, kept);
                        if let Some(at) = at {
                            model.remove(at);
                        }
                        while model.iter().map(|(_, bytes)| bytes).sum::<usize>() + bytes > BYTES_MAX {
                            model.remove(0);
                        }
                        model.push((id, bytes));
                    }
                    2 => {
                        prop_assert_eq!(store.get(&id, None).is_some(), at.is_some());
                        if let Some(at) = at {
                            let one = model.remove(at);
                            model.push(one);
                        }
                    }
                    _ => {
                        prop_assert_eq!(store.delete(&id, None), at.is_some());
                        if let Some(at) = at {
                            model.remove(at);
                        }
                    }
                }
                let bytes = model.iter().map(|(_, bytes)| bytes).sum::<usize>();
                prop_assert!(bytes <= BYTES_MAX);
                prop_assert_eq!(store.size(), (model.len(), bytes));
                prop_assert_eq!(store.inner().used.len(), model.len());
            }
        }
    }
}
