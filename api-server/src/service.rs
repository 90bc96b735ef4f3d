//! What requests are promised: the deployment's service level, what a request may change of it, and its class.

use std::time::Duration;

use actix_web::http::header::HeaderMap;
use baton_protocol::{Service, Tier};

use crate::error::ApiError;

/// Header by which a request asks for another time to its first token, in milliseconds.
pub const TTFT_HEADER: &str = "x-baton-ttft-ms";
/// Header by which a request asks for another mean time between its tokens, in milliseconds.
pub const ITL_HEADER: &str = "x-baton-itl-ms";

/// A header may ask for at most this many times less, or more, than the deployment promises.
const FACTOR_MAX: u32 = 10;

/// Longest time that anybody may ask for, in milliseconds.
const MS_MAX: u32 = 3_600_000;

/// What a deployment promises, and what becomes of requests for which that cannot be kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Promises {
    /// To requests that ask for nothing else.
    pub level: ServiceLevel,
    /// What becomes of those that come when it cannot be kept.
    pub overload: Overload,
}

/// Times that are promised; none where nothing is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServiceLevel {
    /// From a request's arrival to its first token, in milliseconds.
    pub ttft_ms: Option<u32>,
    /// Between tokens, in the mean of a request, in milliseconds.
    pub itl_ms: Option<u32>,
}

/// What becomes of an interactive request whose first token would come too late.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Overload {
    /// It is refused at once, with 503 and when to come again.
    #[default]
    Refuse,
    /// It is served as batch, unless it asks for `service_tier: default`.
    Batch,
}

impl ServiceLevel {
    /// Whether anything is promised.
    pub fn is_some(self) -> bool {
        self != Self::default()
    }

    /// What a request with these headers is promised.
    ///
    /// # Errors
    /// 400 that names the header, for a value that is no number or out of bounds.
    pub fn of(self, headers: &HeaderMap) -> Result<Self, ApiError> {
        Ok(Self {
            ttft_ms: asked(headers, TTFT_HEADER, self.ttft_ms)?,
            itl_ms: asked(headers, ITL_HEADER, self.itl_ms)?,
        })
    }

    /// The promised time to the first token.
    pub fn ttft(self) -> Option<Duration> {
        self.ttft_ms.map(|ms| Duration::from_millis(ms.into()))
    }

    /// The promised mean time between tokens.
    pub fn itl(self) -> Option<Duration> {
        self.itl_ms.map(|ms| Duration::from_millis(ms.into()))
    }
}

fn asked(headers: &HeaderMap, name: &str, promised: Option<u32>) -> Result<Option<u32>, ApiError> {
    let Some(value) = headers.get(name) else {
        return Ok(promised);
    };
    let (least, most) = match promised {
        Some(ms) => (
            ms.div_ceil(FACTOR_MAX),
            ms.saturating_mul(FACTOR_MAX).min(MS_MAX),
        ),
        None => (1, MS_MAX),
    };
    let number = value
        .to_str()
        .ok()
        .and_then(|text| text.trim().parse().ok());
    match number.filter(|ms| (least..=most).contains(ms)) {
        Some(ms) => Ok(Some(ms)),
        None => Err(ApiError::param(
            name,
            format!("the header {name} must be a whole number of milliseconds, {least} to {most}"),
        )),
    }
}

/// How a request wants to be served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Class {
    /// Interactive before batch.
    pub tier: Tier,
    /// Within a tier, higher first.
    pub priority: i32,
    /// It would rather be refused than served as batch.
    pub never_batch: bool,
}

impl Class {
    /// As workers are told of it.
    pub fn service(self, level: ServiceLevel) -> Service {
        Service {
            tier: self.tier,
            priority: self.priority,
            // Nobody reads along.
            itl_ms: level.itl_ms.filter(|_| self.tier == Tier::Interactive),
        }
    }
}

#[cfg(test)]
mod tests {
    use actix_web::http::header::{HeaderName, HeaderValue};

    use super::*;

    fn headers(all: &[(&'static str, &'static str)]) -> HeaderMap {
        let header = |(name, value): &(&'static str, &'static str)| {
            (
                HeaderName::from_static(name),
                HeaderValue::from_static(value),
            )
        };
        all.iter().map(header).collect()
    }

    #[test]
    fn headers_change_a_promise_within_bounds() {
        let level = ServiceLevel {
            ttft_ms: Some(200),
            itl_ms: None,
        };
        assert_eq!(level.of(&headers(&[])).unwrap(), level);
        let asked = level
            .of(&headers(&[(TTFT_HEADER, "2000"), (ITL_HEADER, "7")]))
            .unwrap();
        assert_eq!((asked.ttft_ms, asked.itl_ms), (Some(2000), Some(7)));
        for wrong in ["2001", "19", "0", "-1", "1.5", "soon", ""] {
            let error = level.of(&headers(&[(TTFT_HEADER, wrong)])).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(TTFT_HEADER), "{wrong}");
            assert!(error.message.contains("20 to 2000"), "{}", error.message);
        }
        assert!(level.of(&headers(&[(ITL_HEADER, "0")])).is_err());
    }

    #[test]
    fn batch_is_promised_no_time_between_tokens() {
        let level = ServiceLevel {
            ttft_ms: None,
            itl_ms: Some(10),
        };
        assert_eq!(Class::default().service(level).itl_ms, Some(10));
        let batch = Class {
            tier: Tier::Batch,
            ..Class::default()
        };
        assert_eq!(batch.service(level).itl_ms, None);
    }
}
