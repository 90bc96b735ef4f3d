//! One HTTP/2 connection: streams to the application, and its answers back.
//!
//! Whatever runs for a stream is dropped when its client resets it, and for all of them when the connection ends: as on HTTP/1.1, a
//! request lives as long as somebody waits for its answer. An answer goes no faster than its client reads, and not at all after a stall.

use std::net::SocketAddr;
use std::rc::Rc;
use std::task::Poll;
use std::time::{Duration, SystemTime};

use actix_http::{BoxedPayloadStream, Payload, Request};
use actix_service::Service;
use actix_web::HttpResponse;
use actix_web::body::{BodySize, BoxBody, MessageBody};
use actix_web::dev::ServiceResponse;
use actix_web::error::PayloadError;
use actix_web::http::header::{self as old, HttpDate};
use actix_web::http::{Method as OldMethod, Version};
use bytes::Bytes;
use futures::future::poll_fn;
use futures::stream;
use h2::server::{Builder, SendResponse};
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, header};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use super::{HEAD_WAIT, KEEP_ALIVE};

/// Requests of one connection at a time; a client keeps more back.
const STREAMS_MAX: u32 = 256;

/// All headers of a request together, as on HTTP/1.1. Larger ones are answered 431.
const HEAD_BYTES_MAX: u32 = 128 << 10;

/// What a client may send of one body, and of all on its connection, before the application has taken it.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 2 << 20;

/// Bytes that an answer gives to the connection at once.
const CHUNK: usize = 16 << 10;

/// A connection that was told to end, and has nothing under way, is closed after this: its client may be gone.
const CLOSE_WAIT: Duration = Duration::from_secs(2);

/// What a connection has besides the application.
pub struct Settings {
    /// Who is there.
    pub client: Option<SocketAddr>,
    /// A client that takes nothing of an answer for this long is given up.
    pub stall: Duration,
    /// Marks a request.
    pub mark: fn(&Request),
    /// Whether requests are marked.
    pub is_marked: bool,
    /// Turns true when the connection is to end after what is under way.
    pub leaving: watch::Receiver<bool>,
}

/// Serves until the client goes, or has asked for nothing for long, or the server leaves.
pub async fn serve<T, S>(stream: T, app: Rc<S>, settings: Settings)
where
    T: AsyncRead + AsyncWrite + Unpin,
    S: Service<Request, Response = ServiceResponse<BoxBody>, Error = actix_web::Error> + 'static,
{
    let mut builder = Builder::new();
    builder
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(HEAD_BYTES_MAX)
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW);
    let Ok(Ok(mut connection)) = timeout(HEAD_WAIT, builder.handshake::<_, Bytes>(stream)).await
    else {
        return;
    };
    // Dropped with this, and with them what they do.
    let mut streams = JoinSet::new();
    let mut idle_until = Instant::now() + KEEP_ALIVE;
    let mut ends = false;
    let mut leaving = settings.leaving.clone();
    loop {
        let is_idle = streams.is_empty();
        tokio::select! {
            biased;
            Some(_) = streams.join_next(), if !is_idle => {
                idle_until = Instant::now() + if ends { CLOSE_WAIT } else { KEEP_ALIVE };
            }
            _ = leaving.wait_for(|leaving| *leaving), if !ends => {
                ends = true;
                idle_until = Instant::now() + CLOSE_WAIT;
                connection.graceful_shutdown();
            }
            accepted = connection.accept() => match accepted {
                Some(Ok((request, respond))) => {
                    let request = translated(request, &settings);
                    streams.spawn_local(answer(request, respond, Rc::clone(&app), settings.stall));
                }
                Some(Err(error)) => {
                    tracing::debug!(client = ?settings.client, %error, "an HTTP/2 connection ended");
                    return;
                }
                None => return,
            },
            () = sleep_until(idle_until), if is_idle => {
                if ends {
                    return;
                }
                ends = true;
                idle_until = Instant::now() + CLOSE_WAIT;
                connection.graceful_shutdown();
            }
        }
    }
}

/// A request as the application takes it, which knows the types of an older release; `None` if it has something that these do not.
fn translated(request: http::Request<RecvStream>, settings: &Settings) -> Option<(Request, bool)> {
    let (head, body) = request.into_parts();
    let payload = Payload::Stream {
        payload: incoming(body),
    };
    let mut request = Request::with_payload(payload);
    let is_head = head.method == Method::HEAD;
    let to = request.head_mut();
    to.method = OldMethod::from_bytes(head.method.as_str().as_bytes()).ok()?;
    to.uri = head.uri.to_string().parse().ok()?;
    to.version = Version::HTTP_2;
    to.peer_addr = settings.client;
    for (name, value) in &head.headers {
        let name = old::HeaderName::from_bytes(name.as_str().as_bytes()).ok()?;
        let value = old::HeaderValue::from_bytes(value.as_bytes()).ok()?;
        to.headers.append(name, value);
    }
    if settings.is_marked {
        (settings.mark)(&request);
    }
    Some((request, is_head))
}

/// A body as it comes; what was taken may be sent again.
fn incoming(mut body: RecvStream) -> BoxedPayloadStream {
    let fault = |error| PayloadError::Io(std::io::Error::other(error));
    Box::pin(stream::poll_fn(move |context| {
        let taken = std::task::ready!(body.poll_data(context));
        Poll::Ready(taken.map(|part: Result<Bytes, h2::Error>| {
            let part = part.map_err(fault)?;
            body.flow_control()
                .release_capacity(part.len())
                .map_err(fault)?;
            Ok(part)
        }))
    }))
}

/// Has the application answer, and sends what it says, until the client gives the stream up.
async fn answer<S>(
    request: Option<(Request, bool)>,
    mut respond: SendResponse<Bytes>,
    app: Rc<S>,
    stall: Duration,
) where
    S: Service<Request, Response = ServiceResponse<BoxBody>, Error = actix_web::Error> + 'static,
{
    let Some((request, is_head)) = request else {
        respond.send_reset(Reason::PROTOCOL_ERROR);
        return;
    };
    let response = tokio::select! {
        biased;
        _ = poll_fn(|context| respond.poll_reset(context)) => return,
        response = app.call(request) => response,
    };
    let response: HttpResponse<BoxBody> = match response {
        Ok(response) => response.into_parts().1,
        Err(error) => error.error_response(),
    };
    let (head, body) = response.into_parts();
    let size = body.size();
    let ends = is_head || size.is_eof();
    let Ok(mut out) = respond.send_response(answer_head(&head, size), ends) else {
        return;
    };
    if !ends {
        send_body(body, &mut out, stall).await;
    }
}

/// Without what HTTP/2 says in other ways (RFC 9113, section 8.2.2).
fn answer_head(head: &HttpResponse<()>, size: BodySize) -> Response<()> {
    let mut headers = HeaderMap::with_capacity(head.headers().len() + 2);
    for (name, value) in head.headers() {
        let hop = [
            "connection",
            "transfer-encoding",
            "upgrade",
            "keep-alive",
            "proxy-connection",
        ];
        if hop.contains(&name.as_str()) {
            continue;
        }
        let name = HeaderName::from_bytes(name.as_str().as_bytes());
        let value = HeaderValue::from_bytes(value.as_bytes());
        if let (Ok(name), Ok(value)) = (name, value) {
            headers.append(name, value);
        }
    }
    if let BodySize::Sized(bytes) = size {
        headers.insert(header::CONTENT_LENGTH, bytes.into());
    }
    if !headers.contains_key(header::DATE)
        && let Ok(date) = HeaderValue::try_from(HttpDate::from(SystemTime::now()).to_string())
    {
        headers.insert(header::DATE, date);
    }
    let mut response = Response::new(());
    let status = StatusCode::from_u16(head.status().as_u16());
    *response.status_mut() = status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    *response.headers_mut() = headers;
    response
}

async fn send_body(mut body: BoxBody, out: &mut SendStream<Bytes>, stall: Duration) {
    loop {
        let part = tokio::select! {
            biased;
            _ = poll_fn(|context| out.poll_reset(context)) => return,
            part = poll_fn(|context| std::pin::Pin::new(&mut body).poll_next(context)) => part,
        };
        match part {
            None => break,
            Some(Ok(part)) => {
                if !send_part(part, out, stall).await {
                    return;
                }
            }
            Some(Err(error)) => {
                tracing::debug!(%error, "an answer broke off");
                out.send_reset(Reason::INTERNAL_ERROR);
                return;
            }
        }
    }
    // Whoever has gone meanwhile does not want to know.
    let _ = out.send_data(Bytes::new(), true);
}

/// Whether the client took it.
async fn send_part(mut part: Bytes, out: &mut SendStream<Bytes>, stall: Duration) -> bool {
    while !part.is_empty() {
        out.reserve_capacity(part.len().min(CHUNK));
        // What is there already is told to nobody who waits for more.
        let room = match out.capacity() {
            0 => match timeout(stall, poll_fn(|context| out.poll_capacity(context))).await {
                Ok(Some(Ok(room))) => room,
                Ok(None | Some(Err(_))) => return false,
                Err(_) => {
                    out.send_reset(Reason::CANCEL);
                    return false;
                }
            },
            room => room,
        };
        let taken = part.split_to(room.min(part.len()));
        if out.send_data(taken, false).is_err() {
            return false;
        }
    }
    true
}
