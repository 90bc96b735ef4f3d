//! What no run may contain, whoever catches it and goes on: panics, and errors that call themselves defects.
//!
//! A worker whose engine panics says that its executor broke, and a pull whose task panics is tried again: the cluster heals, as
//! it must, and a run would not tell that from what was planned.

use std::cell::RefCell;
use std::fmt::{Debug, Write};
use std::sync::Once;

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::{DefaultGuard, Subscriber, set_default};
use tracing::{Event, Level, Metadata};

thread_local! {
    /// What was heard on this thread while somebody listens.
    static HEARD: RefCell<Option<Vec<String>>> = const { RefCell::new(None) };
}

/// Listens on its thread until it is dropped.
pub struct Defects {
    _subscriber: DefaultGuard,
}

impl Defects {
    /// Listens from now on.
    pub fn listen() -> Self {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let told = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                hear(|| panic.to_string());
                told(panic);
            }));
        });
        HEARD.set(Some(Vec::new()));
        Self {
            _subscriber: set_default(Errors),
        }
    }

    /// What was heard until now.
    pub fn take(&self) -> Vec<String> {
        HEARD
            .with_borrow_mut(|heard| heard.as_mut().map(std::mem::take))
            .unwrap_or_default()
    }
}

impl Drop for Defects {
    fn drop(&mut self) {
        HEARD.set(None);
    }
}

fn hear(sentence: impl FnOnce() -> String) {
    HEARD.with_borrow_mut(|heard| {
        if let Some(heard) = heard {
            heard.push(sentence());
        }
    });
}

/// Hears errors, and of those only defects: the rest may be what was planned.
struct Errors;

impl Subscriber for Errors {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() == Level::ERROR
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::ERROR)
    }

    fn event(&self, event: &Event<'_>) {
        let mut sentence = Sentence(String::new());
        event.record(&mut sentence);
        if sentence.0.contains("a defect") {
            hear(|| sentence.0);
        }
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// An event's fields in a row.
struct Sentence(String);

impl Visit for Sentence {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        // Writing to a string does not fail.
        let _ = write!(self.0, "{field}: {value:?} ");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn panics_that_somebody_caught_and_defects_are_heard() {
        let defects = Defects::listen();
        let panicked = tokio::spawn(async { panic!("freed twice") }).await;
        assert!(panicked.is_err());
        tracing::error!(blocks = 3, "they do not add up: a defect");
        tracing::error!("the executor broke, as planned");
        let heard = defects.take();
        assert_eq!(heard.len(), 2, "{heard:?}");
        assert!(heard[0].contains("freed twice") && heard[1].contains("add up"));
        assert_eq!(defects.take(), Vec::<String>::new());
    }
}
