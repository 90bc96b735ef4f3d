//! Places among the requests in flight. A request takes one before its body is read, and the others that it needs once it
//! is known how many choices it asks for: nothing is done for a request that has no place.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::bound::Bound;
use crate::error::{ApiError, ErrorKind};
use crate::keys::Key;

/// The places of one request, given back when the last of those who hold it drops it: the handler or the body of its answer, and
/// a thread that is still at its text.
#[derive(Debug)]
pub struct Place {
    server: Arc<Bound>,
    key: Option<Arc<Key>>,
    choices: AtomicUsize,
}

impl Place {
    /// A place for one choice.
    ///
    /// # Errors
    /// 429 if the server or the key has its bound.
    pub fn take(server: &Arc<Bound>, key: Option<Arc<Key>>) -> Result<Arc<Self>, ApiError> {
        let place = Self {
            server: Arc::clone(server),
            key,
            choices: AtomicUsize::new(0),
        };
        place.grow(1)?;
        Ok(Arc::new(place))
    }

    /// Places for so many more choices.
    ///
    /// # Errors
    /// 429 if these are over the bound of the server or of the key; none of them is taken then.
    pub fn grow(&self, choices: usize) -> Result<(), ApiError> {
        let refused = |message| Err(ApiError::new(ErrorKind::TooManyRequests, message));
        if !self.server.take(choices) {
            let most = self.server.most();
            return refused(format!(
                "this server has its bound of {most} requests in flight"
            ));
        }
        if let Some(key) = &self.key
            && !key.in_flight.take(choices)
        {
            self.server.give(choices);
            let own = self.choices.load(Ordering::Acquire);
            let others = key.in_flight.taken().saturating_sub(own);
            let (most, wanted) = (key.in_flight.most(), own + choices);
            return refused(format!(
                "this API key has {others} generations under way, {wanted} more would pass its bound of {most}"
            ));
        }
        self.choices.fetch_add(choices, Ordering::AcqRel);
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let choices = *self.choices.get_mut();
        self.server.give(choices);
        if let Some(key) = &self.key {
            key.in_flight.give(choices);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::ApiKeys;

    #[test]
    fn a_keys_bound_counts_choices_until_they_end() {
        let text = "anna sk-anna-0123456789\nbert sk-bert-0123456789\n";
        let keys = ApiKeys::parse(text).unwrap().with_in_flight_max(Some(3));
        let key = |name: &str| {
            let header = format!("Bearer sk-{name}-0123456789");
            Some(keys.check(Some(header.as_bytes()), None).unwrap())
        };
        let server = Arc::new(Bound::new(7));
        let two = Place::take(&server, key("anna")).unwrap();
        two.grow(1).unwrap();
        let one = Place::take(&server, key("anna")).unwrap();
        let error = one.grow(1).unwrap_err();
        assert_eq!(error.kind, ErrorKind::TooManyRequests);
        assert!(
            error
                .message
                .contains("has 2 generations under way, 2 more")
        );
        assert!(Place::take(&server, key("anna")).is_err());
        let other = Place::take(&server, key("bert")).unwrap();
        other.grow(2).unwrap();
        assert_eq!(server.taken(), 6, "what was refused was given back");
        let nobody = Place::take(&server, None).unwrap();
        let error = nobody.grow(1).unwrap_err();
        assert!(error.message.contains("bound of 7 requests"), "{error}");
        drop((two, one, other, nobody));
        assert_eq!(server.taken(), 0);
        Place::take(&server, key("anna")).unwrap().grow(2).unwrap();
    }
}
