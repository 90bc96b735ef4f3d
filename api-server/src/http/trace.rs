//! A request's trace at the door: `traceparent` and `tracestate` are taken, and the answer says which trace it became.

use std::time::Instant;

use actix_web::body::BoxBody;
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::Method;
use actix_web::http::header::{HeaderMap, HeaderName, HeaderValue};
use actix_web::{HttpMessage, HttpRequest};

use super::name::Named;
use crate::request::trace::RequestTrace;
use crate::server::Server;

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// Where an answer says which trace its request is in: W3C Trace Context, level 2. A `traceparent` would be read as a request's.
const TRACERESPONSE: HeaderName = HeaderName::from_static("traceresponse");

/// Paths that generate, and what they do in OpenTelemetry's words.
const GENERATE: [(&str, &str); 4] = [
    ("/v1/chat/completions", "chat"),
    ("/v1/responses", "chat"),
    ("/v1/messages", "chat"),
    ("/v1/completions", "text_completion"),
];

/// Begins the trace of a request that is to generate, if it is recorded.
pub fn begin(server: &Server, request: &ServiceRequest, named: &Named) -> Option<RequestTrace> {
    if !server.tracer.is_on() || request.method() != Method::POST {
        return None;
    }
    let is_it = |(path, _): &&(&str, &str)| *path == request.path();
    let (path, operation) = GENERATE.iter().find(is_it)?;
    let context = context(request.headers());
    let context = (context.0, &*context.1);
    let name = format!("POST {path}");
    let mut span = server.tracer.request(context, name, Instant::now())?;
    span.set("http.request.method", "POST");
    span.set("http.route", *path);
    span.set("url.path", *path);
    span.set("gen_ai.operation.name", *operation);
    span.set("gen_ai.provider.name", "baton");
    span.set("gen_ai.response.model", server.model_names.first());
    span.set("baton.request", named.id.to_string());
    if *named.name != *named.id.to_string() {
        span.set("baton.request_name", &*named.name);
    }
    Some(RequestTrace::new(span))
}

/// The two headers. A `traceparent` that comes twice is none; a `tracestate` may come in parts.
fn context(headers: &HeaderMap) -> (Option<&str>, String) {
    let mut parents = headers.get_all(TRACEPARENT);
    let parent = match (parents.next(), parents.next()) {
        (Some(one), None) => one.to_str().ok(),
        _ => None,
    };
    let parts = headers.get_all(TRACESTATE);
    let parts: Vec<_> = parts.filter_map(|part| part.to_str().ok()).collect();
    (parent, parts.join(","))
}

/// The trace of a request that has one.
pub fn of(request: &HttpRequest) -> Option<RequestTrace> {
    request.extensions().get::<RequestTrace>().cloned()
}

/// Notes the answer's status, and names the trace in it.
pub fn tell(trace: &RequestTrace, response: &mut ServiceResponse<BoxBody>) {
    trace.status(response.status().as_u16());
    let name = trace.traceparent();
    if let Some(value) = name.and_then(|name| HeaderValue::from_str(&name).ok()) {
        response.headers_mut().insert(TRACERESPONSE, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_traceparent_comes_once_and_a_tracestate_in_parts() {
        let mut headers = HeaderMap::new();
        assert_eq!(context(&headers), (None, String::new()));
        headers.append(TRACEPARENT, HeaderValue::from_static("a"));
        headers.append(TRACESTATE, HeaderValue::from_static("x=1"));
        headers.append(TRACESTATE, HeaderValue::from_static("y=2"));
        assert_eq!(context(&headers), (Some("a"), "x=1,y=2".to_owned()));
        headers.append(TRACEPARENT, HeaderValue::from_static("a"));
        assert_eq!(context(&headers).0, None);
    }
}
