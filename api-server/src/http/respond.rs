//! Errors and JSON as HTTP responses.

use actix_web::HttpResponse;
use actix_web::http::{StatusCode, header};

use crate::error::ApiError;

/// An error as a response: status, `Retry-After` and body from the one table.
pub fn error_response(error: &ApiError) -> HttpResponse {
    let status =
        StatusCode::from_u16(error.kind.row().status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = HttpResponse::build(status);
    response.insert_header((header::CONTENT_TYPE, "application/json"));
    if let Some(ms) = error.retry_after_ms {
        // The header counts whole seconds.
        response.insert_header((header::RETRY_AFTER, ms.div_ceil(1_000).max(1).to_string()));
    }
    response.body(error.body())
}

/// A JSON document.
pub fn json(status: StatusCode, body: impl Into<Vec<u8>>) -> HttpResponse {
    HttpResponse::build(status)
        .insert_header((header::CONTENT_TYPE, "application/json"))
        .body(body.into())
}
