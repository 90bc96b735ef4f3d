//! What a request is called: `X-Request-Id`, the client's or one of our own, in every answer and in every log line.

use std::sync::Arc;

use actix_web::http::header::{HeaderMap, HeaderName, HeaderValue};
use actix_web::{HttpMessage, HttpRequest};
use baton_protocol::RequestId;

use crate::error::{ApiError, ErrorKind};

/// The header.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Longest name that is taken.
const CHARS_MAX: usize = 128;

/// A request's name and id.
#[derive(Clone, Debug)]
pub struct Named {
    /// What the client calls it; the id where it does not.
    pub name: Arc<str>,
    /// Its id on the bus and in its answer; further choices have ids of their own.
    pub id: RequestId,
}

impl Named {
    /// Of a request with these headers. A name that is too long or not of letters, digits and `-._~:/+=@` is not taken: it would
    /// stand in logs and headers.
    ///
    /// # Errors
    /// If there are no random numbers.
    pub fn new(headers: &HeaderMap) -> Result<Self, ApiError> {
        let id = random_id()?;
        let given = headers.get(&REQUEST_ID).and_then(|name| name.to_str().ok());
        let name = match given.filter(|name| is_fine(name)) {
            Some(name) => name.into(),
            None => id.to_string().into(),
        };
        Ok(Self { name, id })
    }

    /// The name that the request was given when it came.
    ///
    /// # Errors
    /// As [`Self::new`], for one that was given none.
    pub fn of(request: &HttpRequest) -> Result<Self, ApiError> {
        let named = request.extensions().get::<Self>().cloned();
        named.map_or_else(|| Self::new(request.headers()), Ok)
    }

    /// As a header.
    pub fn header(&self) -> Option<HeaderValue> {
        HeaderValue::from_str(&self.name).ok()
    }

    /// A span for log lines, where the ids that stand in them anyhow do not tell the name.
    pub fn span(&self, id: RequestId) -> tracing::Span {
        match *self.name == *id.to_string() {
            true => tracing::Span::none(),
            false => tracing::info_span!("request", name = %self.name),
        }
    }
}

fn is_fine(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~:/+=@".contains(&b);
    (1..=CHARS_MAX).contains(&name.len()) && name.bytes().all(plain)
}

/// An id for a request or for one of its choices.
///
/// # Errors
/// If there are no random numbers.
pub fn random_id() -> Result<RequestId, ApiError> {
    let mut bytes = [0; 16];
    fill(&mut bytes)?;
    Ok(RequestId(u128::from_le_bytes(bytes)))
}

/// Fills these bytes with random numbers.
///
/// # Errors
/// If there are none.
pub fn fill(bytes: &mut [u8]) -> Result<(), ApiError> {
    getrandom::fill(bytes)
        .map_err(|error| ApiError::new(ErrorKind::Internal, format!("no random numbers: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_if_they_can_stand_in_a_log() {
        let name = |given: &[u8]| {
            let mut headers = HeaderMap::new();
            headers.insert(REQUEST_ID, HeaderValue::from_bytes(given).unwrap());
            Named::new(&headers).unwrap()
        };
        assert_eq!(&*name(b"trace-7:a/b").name, "trace-7:a/b");
        let long = [b'x'; CHARS_MAX + 1];
        for wrong in [&b""[..], b"a b", b"a\tb", b"{\"a\":1}", b"\xff", &long] {
            let named = name(wrong);
            assert_eq!(*named.name, *named.id.to_string(), "{wrong:?}");
        }
        let (one, other) = (name(b""), name(b""));
        assert_ne!(one.name, other.name);
    }
}
