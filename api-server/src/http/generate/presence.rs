//! Whether the client of a request is still there: one guard for all that is done for it.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::time::Instant;

use super::outbox::Outbox;
use crate::admission::Place;
use crate::http::name::Named;
use crate::request::inbox::{Event, Inbox};
use crate::request::trace::RequestTrace;
use crate::service::ServiceLevel;
use crate::text::texts::Until;

/// The client of one request, from its admission to the last byte of its answer. Owned by the handler, then by the answer's body,
/// and by nobody else: the HTTP library drops whichever there is when the connection ends. Whatever is done for the request in any
/// phase is entered here before it begins, and hears of the drop: work on its text, every choice, and the stream, so that no choice
/// waits for a reader that is gone. After the end of the answer nobody hears it.
pub struct Presence {
    named: Named,
    place: Arc<Place>,
    level: ServiceLevel,
    trace: Option<RequestTrace>,
    left: Arc<AtomicBool>,
    inboxes: Vec<Arc<Inbox>>,
    outbox: Option<Rc<Outbox>>,
}

impl Presence {
    /// A client whose request has this name and these places.
    pub fn new(named: Named, place: Arc<Place>) -> Self {
        Self {
            named,
            place,
            level: ServiceLevel::default(),
            trace: None,
            left: Arc::default(),
            inboxes: Vec::new(),
            outbox: None,
        }
    }

    /// With what the request was promised.
    #[must_use]
    pub fn promised(mut self, level: ServiceLevel) -> Self {
        self.level = level;
        self
    }

    /// With the request's trace, where that is recorded.
    #[must_use]
    pub fn traced(mut self, trace: Option<RequestTrace>) -> Self {
        self.trace = trace;
        self
    }

    /// The request's trace.
    pub fn trace(&self) -> Option<RequestTrace> {
        self.trace.clone()
    }

    /// What the request was promised.
    pub fn level(&self) -> ServiceLevel {
        self.level
    }

    /// The request's name.
    pub fn named(&self) -> Named {
        self.named.clone()
    }

    /// The request's places.
    pub fn place(&self) -> Arc<Place> {
        Arc::clone(&self.place)
    }

    /// For work that is to end when the client leaves.
    pub fn until(&self, deadline: Instant) -> Until {
        Until::new(deadline, Arc::clone(&self.left))
    }

    /// The stream of the answer is closed when the client leaves.
    pub fn reads(&mut self, outbox: &Rc<Outbox>) {
        self.outbox = Some(Rc::clone(outbox));
    }

    /// A choice is told when the client leaves.
    pub fn waits_for(&mut self, inbox: &Arc<Inbox>) {
        self.inboxes.push(Arc::clone(inbox));
    }

    /// Choices that were begun.
    pub fn choices(&self) -> usize {
        self.inboxes.len()
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.left.store(true, Ordering::Relaxed);
        // First the stream: a choice that waits for room in it looks at its events only then.
        if let Some(outbox) = &self.outbox {
            outbox.close();
        }
        for inbox in &self.inboxes {
            inbox.push(Event::ClientLeft);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bound::Bound;
    use crate::openai::{ApiKind, Shape, Shown};
    use crate::output::Tally;

    #[tokio::test]
    async fn whoever_leaves_is_heard_everywhere() {
        let bound = Arc::new(Bound::new(1));
        let mut client = Presence::new(
            Named::new(&Default::default()).unwrap(),
            Place::take(&bound, None).unwrap(),
        );
        let until = client.until(Instant::now() + std::time::Duration::from_secs(600));
        let shape = Shape::new(ApiKind::Chat, "1", "m", "f", Shown::default());
        let outbox = Outbox::new(2, Tally::new(1, 1, 2), Box::new(shape));
        let inboxes = [Arc::new(Inbox::default()), Arc::new(Inbox::default())];
        client.reads(&outbox);
        inboxes.iter().for_each(|inbox| client.waits_for(inbox));
        outbox.write(|_, out| out.resize(1 << 20, 0));
        assert!(!outbox.has_room(0) && until.check().is_ok());
        drop(client);
        assert!(until.check().is_err());
        outbox.room().await;
        for inbox in &inboxes {
            let mut events = Default::default();
            inbox.take(&mut events).await;
            assert!(matches!(events.pop_front(), Some(Event::ClientLeft)));
        }
        assert_eq!(bound.taken(), 0);
    }
}
