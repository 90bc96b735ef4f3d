//! Before anything else of a request is looked at: may its sender ask?

use std::sync::Arc;

use actix_web::body::BoxBody;
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::header::{self, HeaderName, HeaderValue};
use actix_web::middleware::Next;
use actix_web::{HttpMessage, HttpRequest, web};

use super::https::is_certified;
use super::page;
use super::paths;
use super::respond::refuse;
use crate::error::{ApiError, Dialect, ErrorKind};
use crate::keys::{Key, OPEN_PATHS};
use crate::server::Server;

/// Where Anthropic's clients put their key.
const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// Who sent a request: a key, or anybody where there are none.
pub struct Caller(pub Option<Arc<Key>>);

impl Caller {
    /// As [`authorize`] has found.
    pub fn of(request: &HttpRequest) -> Self {
        Self(request.extensions().get::<Arc<Key>>().cloned())
    }
}

/// Lets through what needs no key or certificate, or has what it needs. Around every path, so that a new one is closed until it is said to be open.
pub async fn authorize(
    server: web::Data<Server>,
    request: ServiceRequest,
    next: Next<BoxBody>,
) -> Result<ServiceResponse<BoxBody>, actix_web::Error> {
    let is_open = [&OPEN_PATHS[..], &page::PATHS, &paths::OPEN]
        .iter()
        .any(|paths| paths.contains(&request.path()));
    if server.wants_certificates && !OPEN_PATHS.contains(&request.path()) && !is_certified(&request)
    {
        let message =
            "this server wants a client certificate that comes from its certificate authority";
        let error = ApiError::new(ErrorKind::Unauthorized, message);
        let dialect = Dialect::of(request.path());
        return Ok(request.into_response(refuse(&server, dialect, &error)));
    }
    if server.keys.is_empty() || is_open {
        return next.call(request).await;
    }
    let given = |name| request.headers().get(name).map(HeaderValue::as_bytes);
    let (bearer, plain) = (given(header::AUTHORIZATION), given(X_API_KEY));
    match server.keys.check(bearer, plain) {
        Ok(key) => {
            tracing::debug!(key = key.name, path = request.path(), "request");
            request.extensions_mut().insert(key);
            next.call(request).await
        }
        Err(error) => {
            let dialect = Dialect::of(request.path());
            Ok(request.into_response(refuse(&server, dialect, &error)))
        }
    }
}
