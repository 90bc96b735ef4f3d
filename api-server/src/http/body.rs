//! Request bodies, read up to a bound each, and up to one all together.

use std::sync::Arc;

use actix_web::http::header;
use actix_web::{HttpRequest, web};
use futures::StreamExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use super::gzip::Incoming;
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

/// What came of a body, up to its bounds.
struct Came {
    bytes: Vec<u8>,
    bytes_max: usize,
    room: Room,
    /// Why no more was taken.
    fault: Option<ApiError>,
}

impl std::io::Write for Came {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let taken = match self.bytes.len() + bytes.len() > self.bytes_max {
            true => Err(too_large(self.bytes_max)),
            false => self.room.grow(bytes.len()),
        };
        if let Err(error) = taken {
            self.fault = Some(error);
            return Err(std::io::Error::other("over a bound"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn too_large(bytes_max: usize) -> ApiError {
    let message = format!("the request body is over the bound of {bytes_max} bytes");
    ApiError::new(ErrorKind::BodyTooLarge, message)
}

/// Refuses what a page of others can make a browser send without asking: forms, plain text, and what has no type.
fn check_type(request: &HttpRequest) -> Result<(), ApiError> {
    let given = request.headers().get(header::CONTENT_TYPE);
    let given = given.map(|kind| String::from_utf8_lossy(kind.as_bytes()));
    let kind = given.as_deref().unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    let kind = kind.to_ascii_lowercase();
    if kind == "application/json" || kind.starts_with("application/") && kind.ends_with("+json") {
        return Ok(());
    }
    let got: String = match kind.is_empty() {
        true => "none".to_owned(),
        false => kind.chars().take(100).collect(),
    };
    let message = format!(
        "the body must be JSON and say so: send the header 'Content-Type: application/json' (got {got}; with curl: -H \
         'Content-Type: application/json')"
    );
    Err(ApiError::new(ErrorKind::MediaType, message))
}

/// The body, if it is within the bound. One that announces too much is not read at all.
///
/// # Errors
/// 415 if it is not JSON, or in a coding but gzip; 413 over the bound, compressed or not; 400 if it breaks off; 408 if it stops
/// coming, or is not there when the request's time is over; 429 if all bodies that are being read have their bound.
pub async fn read(
    request: &HttpRequest,
    mut payload: web::Payload,
    server: &Server,
    deadline: Instant,
) -> Result<Body, ApiError> {
    let limits = &server.limits;
    let (bytes_max, stall) = (limits.body_bytes_max, limits.body_stall);
    check_type(request)?;
    let announced = request.headers().get(header::CONTENT_LENGTH);
    let announced: Option<usize> = announced.and_then(|value| value.to_str().ok()?.parse().ok());
    if announced.is_some_and(|bytes| bytes > bytes_max) {
        return Err(too_large(bytes_max));
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
    let came = Came {
        // Memory is taken for what came, not for what was announced.
        bytes: Vec::with_capacity(announced.unwrap_or(0).clamp(1 << 10, 64 << 10)),
        bytes_max,
        room: Room::of(server),
        fault: None,
    };
    let mut incoming = Incoming::new(request.headers(), came)?;
    while let Some(chunk) = timeout_at(until(), payload.next()).await.map_err(stalled)? {
        let chunk = chunk.map_err(|error| broken(&error))?;
        let mut pieces = chunk.chunks(INFLATED_AT_ONCE).peekable();
        while let Some(piece) = pieces.next() {
            let written = incoming.write(piece);
            written.map_err(|error| fault(&mut incoming, &error))?;
            if pieces.peek().is_some() && matches!(incoming, Incoming::Gzip(_)) {
                tokio::task::yield_now().await;
            }
        }
    }
    let finished = incoming.finish();
    finished.map_err(|error| fault(&mut incoming, &error))?;
    let came = incoming.taken_by();
    Ok(Body {
        bytes: std::mem::take(&mut came.bytes),
        room: std::mem::replace(&mut came.room, Room::of(server)),
    })
}

/// Compressed bytes that are inflated before others have their turn: to a thousand times as many, at worst.
const INFLATED_AT_ONCE: usize = 4 << 10;

fn broken(error: &dyn std::fmt::Display) -> ApiError {
    let message = format!("the request body broke off: {error}");
    ApiError::new(ErrorKind::InvalidRequest, message)
}

/// Why a body was not taken.
fn fault(incoming: &mut Incoming<Came>, error: &std::io::Error) -> ApiError {
    incoming.taken_by().fault.take().unwrap_or_else(|| {
        let message =
            format!("the request body is not the gzip that its content-encoding says: {error}");
        ApiError::new(ErrorKind::InvalidRequest, message)
    })
}
