//! What every request passes first and every answer last, whatever its path: its name, whether a page of others may have sent it,
//! gzip, and the end of its connection.

use std::sync::atomic::Ordering;

use actix_web::body::{BodySize, BoxBody, MessageBody};
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::header::{self, HeaderMap, HeaderName, HeaderValue};
use actix_web::http::{ConnectionType, Method, StatusCode, Version};
use actix_web::middleware::Next;
use actix_web::{HttpMessage, HttpResponse, web};
use tracing::Instrument;

use super::gzip;
use super::name::{Named, REQUEST_ID};
use super::respond::{Unnamed, refuse};
use super::trace;
use crate::error::Dialect;
use crate::server::Server;

/// By what name Anthropic's clients look for the request's.
const ANTHROPIC_ID: HeaderName = HeaderName::from_static("request-id");

/// Around everything else.
pub async fn front(
    server: web::Data<Server>,
    request: ServiceRequest,
    next: Next<BoxBody>,
) -> Result<ServiceResponse<BoxBody>, actix_web::Error> {
    let named = match Named::new(request.headers()) {
        Ok(named) => named,
        Err(error) => {
            let dialect = Dialect::of(request.path());
            return Ok(request.into_response(refuse(&server, dialect, &error)));
        }
    };
    request.extensions_mut().insert(named.clone());
    let trace = trace::begin(&server, &request, &named);
    if let Some(trace) = &trace {
        request.extensions_mut().insert(trace.clone());
    }
    let knows_chunks = request.version() >= Version::HTTP_11;
    let takes_gzip =
        request.method() != Method::HEAD && knows_chunks && gzip::is_taken(request.headers());
    let origin = request.headers().get(header::ORIGIN);
    let origin =
        origin.filter(|origin| origin.to_str().is_ok_and(|text| server.origins.allow(text)));
    let origin = origin.cloned();
    let asked = preflight(&request);
    let is_anthropic = Dialect::of(request.path()) == Dialect::Anthropic;
    let mut response = match (&origin, asked) {
        (Some(_), Some(headers)) => request.into_response(permission(headers)),
        _ => {
            let span = tracing::debug_span!("http", name = %named.name);
            next.call(request).instrument(span).await?
        }
    };
    let unnamed = response.response_mut().extensions_mut().remove::<Unnamed>();
    if let Some(Unnamed(error)) = unnamed {
        let body = error.anthropic_body(Some(&named.name));
        response = response.map_body(|_, _| BoxBody::new(body));
    }
    if let Some(name) = named.header() {
        if is_anthropic {
            response.headers_mut().insert(ANTHROPIC_ID, name.clone());
        }
        response.headers_mut().insert(REQUEST_ID, name);
    }
    if let Some(trace) = trace {
        trace::tell(&trace, &mut response);
    }
    if let Some(origin) = origin {
        allow(origin, response.headers_mut());
    }
    if takes_gzip && gzip::is_worth_it(&response) {
        gzip::announce(response.headers_mut());
        response = response.map_body(|_, body| gzip::Gzipped::new(body).boxed());
    }
    end_connection(&server, knows_chunks, &mut response);
    Ok(response)
}

/// A server that leaves closes each connection after its answer: a client's next request goes elsewhere, and is not cut off. One of
/// HTTP/1.0 knows no chunks: an answer whose length is not known ends with its connection.
fn end_connection(server: &Server, knows_chunks: bool, response: &mut ServiceResponse<BoxBody>) {
    let is_stream = response.response().body().size() == BodySize::Stream;
    let head = response.response_mut().head_mut();
    if is_stream && !knows_chunks {
        head.no_chunking(true);
        head.set_connection_type(ConnectionType::Close);
    }
    if server.leaving.load(Ordering::Relaxed) {
        head.set_connection_type(ConnectionType::Close);
    }
}

/// A browser's question whether a page may ask, and the headers that it wants to send.
fn preflight(request: &ServiceRequest) -> Option<Option<HeaderValue>> {
    let headers = request.headers();
    let asks = request.method() == Method::OPTIONS
        && headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    asks.then(|| headers.get(header::ACCESS_CONTROL_REQUEST_HEADERS).cloned())
}

/// Yes, with these headers. The question comes without a key; what follows it needs one.
fn permission(headers: Option<HeaderValue>) -> HttpResponse {
    let mut response = HttpResponse::build(StatusCode::NO_CONTENT);
    response.insert_header((
        header::ACCESS_CONTROL_ALLOW_METHODS,
        "GET, HEAD, POST, DELETE",
    ));
    response.insert_header((header::ACCESS_CONTROL_MAX_AGE, "600"));
    if let Some(headers) = headers {
        response.insert_header((header::ACCESS_CONTROL_ALLOW_HEADERS, headers));
    }
    response.finish()
}

/// The page may read the answer.
fn allow(origin: HeaderValue, headers: &mut HeaderMap) {
    const SHOWN: HeaderValue = HeaderValue::from_static("x-request-id, retry-after");
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, SHOWN);
    vary(headers, header::ORIGIN);
}

/// The answer depends on this header of the request.
pub fn vary(headers: &mut HeaderMap, on: HeaderName) {
    headers.append(header::VARY, HeaderValue::from(on));
}
