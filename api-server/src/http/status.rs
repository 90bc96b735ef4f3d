//! What can be asked about the server and the cluster.

use actix_web::http::{StatusCode, header};
use actix_web::{HttpRequest, HttpResponse, web};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::respond::{self, error_response};
use crate::error::{ApiError, ErrorKind};
use crate::membership::Member;
use crate::server::Server;

/// `GET /v1/models`.
pub async fn models(server: web::Data<Server>) -> HttpResponse {
    let body = json!({"object": "list", "data": [model_object(&server)]});
    respond::json(StatusCode::OK, body.to_string())
}

/// `GET /v1/models/{model}`.
pub async fn model(server: web::Data<Server>, name: web::Path<String>) -> HttpResponse {
    if *name == server.model_name {
        respond::json(StatusCode::OK, model_object(&server).to_string())
    } else {
        error_response(&unknown_model(&server, &name))
    }
}

/// The error for a model that is not served here.
pub fn unknown_model(server: &Server, name: &str) -> ApiError {
    let short: String = name.chars().take(100).collect();
    let message = format!(
        "the model {short:?} does not exist here; this server has {:?}",
        server.model_name
    );
    let param = Some("model".to_owned());
    ApiError {
        param,
        ..ApiError::new(ErrorKind::UnknownModel, message)
    }
}

fn model_object(server: &Server) -> Value {
    let longest = server
        .members()
        .longest_sequence(&server.model.fingerprint, Instant::now());
    // While no pair of workers serves, what the model could do.
    let held = longest.map_or(u32::MAX, |(held, _)| held);
    json!({
        "id": server.model_name,
        "object": "model",
        "created": server.started_unix,
        "owned_by": "baton",
        "max_model_len": held.min(server.model.tokens_max),
    })
}

/// `GET /health`: 200 if a request could be served now, else 503 with the reasons. What is broken and gone round does
/// not turn it red: it is named under `degraded`.
pub async fn health(server: web::Data<Server>) -> HttpResponse {
    let faults = server.faults();
    let degraded = server.degraded();
    let (status, word) = match (faults.is_empty(), degraded.is_empty()) {
        (true, true) => (StatusCode::OK, "ok"),
        (true, false) => (StatusCode::OK, "degraded"),
        (false, _) => (StatusCode::SERVICE_UNAVAILABLE, "unavailable"),
    };
    // Requests whose body is still coming, and generations whose client has left and that are just being ended.
    let in_flight = server.in_flight.taken().max(server.registry.len());
    let body =
        json!({"status": word, "reasons": faults, "degraded": degraded, "in_flight": in_flight});
    respond::json(status, body.to_string())
}

/// `GET /live`: the process answers.
pub async fn live() -> HttpResponse {
    respond::json(StatusCode::OK, json!({"status": "live"}).to_string())
}

/// `GET /metrics`.
pub async fn metrics(server: web::Data<Server>) -> HttpResponse {
    match server.metrics.render(&server.members(), Instant::now()) {
        Ok(text) => HttpResponse::Ok()
            .insert_header((header::CONTENT_TYPE, "text/plain; version=0.0.4"))
            .body(text),
        Err(error) => error_response(&ApiError::new(
            ErrorKind::Internal,
            format!("metrics: {error}"),
        )),
    }
}

/// `GET /cluster`: everything known of workers and API servers.
pub async fn cluster(server: web::Data<Server>) -> HttpResponse {
    let now = Instant::now();
    let faults = server.faults();
    let degraded = server.degraded();
    let members = server.members();
    let body = json!({
        "cluster": server.cluster,
        "api_server": server.name,
        "model": {"name": server.model_name, "fingerprint": server.model.fingerprint,
                  "tokens_max": server.model.tokens_max},
        "healthy": faults.is_empty(),
        "reasons": faults,
        "degraded": degraded,
        "workers": members.workers().map(|member| worker_object(member, now)).collect::<Vec<_>>(),
        "api_servers": members.api_servers()
            .map(|beat| json!({"api_server": beat.api_server, "in_flight": beat.in_flight}))
            .collect::<Vec<_>>(),
    });
    respond::json(StatusCode::OK, body.to_string())
}

fn worker_object(member: &Member, now: Instant) -> Value {
    let beat = &member.beat;
    json!({
        "worker": beat.worker,
        "incarnation": beat.incarnation,
        "role": beat.role,
        "state": member.state(now),
        "reason": beat.reason,
        "silent_ms": member.silent(now).as_millis() as u64,
        "device": beat.device,
        "weights": beat.weights,
        "transport": beat.transport,
        "model": beat.model,
        "kv": beat.kv,
        "load": beat.load,
        "capacity": beat.capacity,
        "peers": beat.peers,
    })
}

/// Any other path.
pub async fn unknown_path(request: HttpRequest) -> HttpResponse {
    let path: String = request.path().chars().take(200).collect();
    error_response(&ApiError::new(
        ErrorKind::UnknownPath,
        format!("there is nothing at {path}"),
    ))
}
