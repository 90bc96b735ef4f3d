//! KV that was handed over, and how long it waited for a decode worker with room.

use baton_protocol::Nonce;
use tokio::time::Instant;

/// The handle that a generation has, and since when it waits.
#[derive(Default)]
pub(super) struct Handed(Option<(Nonce, Option<Instant>)>);

impl Handed {
    /// The generation has this handle now, and a decode worker has taken it or not. Since when it waited, once, when it is taken.
    pub(super) fn note(&mut self, handle: Option<Nonce>, is_taken: bool) -> Option<Instant> {
        let Some(handle) = handle else {
            self.0 = None;
            return None;
        };
        let (_, since) = match &mut self.0 {
            Some(same) if same.0 == handle => same,
            other => other.insert((handle, Some(Instant::now()))),
        };
        since.take_if(|_| is_taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn each_handles_wait_is_told_once() {
        let mut handed = Handed::default();
        let begun = Instant::now();
        assert_eq!(handed.note(None, false), None);
        assert_eq!(handed.note(Some(Nonce(1)), false), None);
        tokio::time::advance(std::time::Duration::from_millis(5)).await;
        assert_eq!(handed.note(Some(Nonce(1)), true), Some(begun));
        assert_eq!(handed.note(Some(Nonce(1)), true), None);
        // Another decode worker has to be found for it: that is no wait for the first.
        assert_eq!(handed.note(Some(Nonce(1)), false), None);
        let again = Instant::now();
        assert_eq!(handed.note(Some(Nonce(2)), true), Some(again));
        assert_eq!(handed.note(None, true), None);
        assert_eq!(handed.note(Some(Nonce(2)), true), Some(again));
    }
}
