//! Request bodies, read up to a bound each, and up to one all together.

use std::sync::Arc;

use actix_web::http::header;
use actix_web::{HttpRequest, web};
use futures::StreamExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use crate::error::{ApiError, ErrorKind};
use crate::server::Server;

/// Bytes of each body that need no part of the room that all have together: what fills that with large bodies does not keep
/// small ones out. As many requests as may be in flight have so little each.
const FREE_BYTES: usize = 16 << 10;

/// A body, and its part of the room that all have together.
pub struct Body {
    /// What came.
    pub bytes: Vec<u8>,
    /// To be kept until what came of it is tokens: its texts are as large.
    pub room: Room,
}

/// A part of the room that all bodies have together, until it is dropped.
pub struct Room {
    all: Arc<Semaphore>,
    all_bytes: usize,
    bytes: usize,
    permit: Option<OwnedSemaphorePermit>,
}

impl Room {
    fn of(server: &Server) -> Self {
        Self {
            all: Arc::clone(&server.body_room),
            all_bytes: server.limits.bodies_bytes_max,
            bytes: 0,
            permit: None,
        }
    }

    /// Takes so many bytes more.
    fn grow(&mut self, bytes: usize) -> Result<(), ApiError> {
        let kibibytes = |bytes: usize| bytes.saturating_sub(FREE_BYTES).div_ceil(1 << 10) as u32;
        let taken = kibibytes(self.bytes + bytes) - kibibytes(self.bytes);
        let more = Arc::clone(&self.all).try_acquire_many_owned(taken);
        let more = more.map_err(|_| {
            let message = format!(
                "the request bodies under way have this server's bound of {} bytes; try again",
                self.all_bytes
            );
            ApiError::new(ErrorKind::TooManyRequests, message)
        })?;
        match &mut self.permit {
            Some(permit) => permit.merge(more),
            None => self.permit = Some(more),
        }
        self.bytes += bytes;
        Ok(())
    }
}

/// The body, if it is within the bound. One that announces too much is not read at all.
///
/// # Errors
/// 413 over the bound; 400 if it breaks off; 408 if it stops coming, or is not there when the request's time is over; 429 if all
/// bodies that are being read have their bound.
pub async fn read(
    request: &HttpRequest,
    mut payload: web::Payload,
    server: &Server,
    deadline: Instant,
) -> Result<Body, ApiError> {
    let limits = &server.limits;
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
        let message = match deadline <= Instant::now() {
            true => "the request's time ran out while its body was still coming".to_owned(),
            false => format!(
                "nothing came of the request body for {} s: send all of it, or correct content-length",
                stall.as_secs_f32()
            ),
        };
        ApiError::new(ErrorKind::BodyStalled, message)
    };
    let until = || deadline.min(Instant::now() + stall);
    // Memory is taken for what came, not for what was announced.
    let mut body = Vec::with_capacity(announced.unwrap_or(0).clamp(1 << 10, 64 << 10));
    let mut room = Room::of(server);
    while let Some(chunk) = timeout_at(until(), payload.next()).await.map_err(stalled)? {
        let chunk = chunk.map_err(|error| {
            ApiError::new(
                ErrorKind::InvalidRequest,
                format!("the request body broke off: {error}"),
            )
        })?;
        if body.len() + chunk.len() > bytes_max {
            return Err(too_large());
        }
        room.grow(chunk.len())?;
        body.extend_from_slice(&chunk);
    }
    Ok(Body { bytes: body, room })
}
