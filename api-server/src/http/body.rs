//! Request bodies, read up to a bound.

use actix_web::http::header;
use actix_web::{HttpRequest, web};
use futures::StreamExt;
use tokio::time::timeout;

use crate::config::Limits;
use crate::error::{ApiError, ErrorKind};

/// The body, if it is within the bound. One that announces too much is not read at all.
///
/// # Errors
/// 413 over the bound; 400 if it breaks off; 408 if it stops coming.
pub async fn read(
    request: &HttpRequest,
    mut payload: web::Payload,
    limits: &Limits,
) -> Result<Vec<u8>, ApiError> {
    let (bytes_max, stall) = (limits.body_bytes_max, limits.body_stall);
    let too_large = || {
        ApiError::new(
            ErrorKind::BodyTooLarge,
            format!("the request body is over the bound of {bytes_max} bytes"),
        )
    };
    let announced = request.headers().get(header::CONTENT_LENGTH);
    let announced: Option<usize> = announced.and_then(|value| value.to_str().ok()?.parse().ok());
    if announced.is_some_and(|bytes| bytes > bytes_max) {
        return Err(too_large());
    }
    let stalled = |_| {
        ApiError::new(
            ErrorKind::BodyStalled,
            format!(
                "nothing came of the request body for {} s: send all of it, or correct content-length",
                stall.as_secs_f32()
            ),
        )
    };
    // Memory is taken for what came, not for what was announced.
    let mut body = Vec::with_capacity(announced.unwrap_or(0).clamp(1 << 10, 64 << 10));
    while let Some(chunk) = timeout(stall, payload.next()).await.map_err(stalled)? {
        let chunk = chunk.map_err(|error| {
            ApiError::new(
                ErrorKind::InvalidRequest,
                format!("the request body broke off: {error}"),
            )
        })?;
        if body.len() + chunk.len() > bytes_max {
            return Err(too_large());
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}
