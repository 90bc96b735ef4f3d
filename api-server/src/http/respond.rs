//! Errors and JSON as HTTP responses.

use actix_web::HttpResponse;
use actix_web::http::{StatusCode, header};

use crate::error::{ApiError, Dialect};
use crate::server::Server;

/// The error of a response in Anthropic's form, whose body is to name the request: what is around all paths knows its name.
pub struct Unnamed(pub ApiError);

/// An error as a response in this dialect: status, `Retry-After` and body from the one table.
pub fn error_response(dialect: Dialect, error: &ApiError) -> HttpResponse {
    let status =
        StatusCode::from_u16(error.kind.row().status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = HttpResponse::build(status);
    response.insert_header((header::CONTENT_TYPE, "application/json"));
    if status == StatusCode::UNAUTHORIZED {
        response.insert_header((header::WWW_AUTHENTICATE, "Bearer"));
    }
    if let Some(ms) = error.retry_after_ms {
        // The header counts whole seconds.
        response.insert_header((header::RETRY_AFTER, ms.div_ceil(1_000).max(1).to_string()));
    }
    let mut response = response.body(error.body_in(dialect));
    if dialect == Dialect::Anthropic {
        response.extensions_mut().insert(Unnamed(error.clone()));
    }
    response
}

/// As [`error_response`], counted and logged.
pub fn refuse(server: &Server, dialect: Dialect, error: &ApiError) -> HttpResponse {
    let label = error.kind.row().label;
    tracing::debug!(reason = label, %error, "request refused");
    server
        .metrics
        .errors_total
        .with_label_values(&[label])
        .inc();
    error_response(dialect, error)
}

/// A JSON document.
pub fn json(status: StatusCode, body: impl Into<Vec<u8>>) -> HttpResponse {
    HttpResponse::build(status)
        .insert_header((header::CONTENT_TYPE, "application/json"))
        .body(body.into())
}
