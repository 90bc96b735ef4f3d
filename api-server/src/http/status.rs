//! What can be asked about the server and the cluster.

use actix_web::http::{StatusCode, header};
use actix_web::{HttpResponse, web};
use baton_protocol::{
    ApiServerId, Capacity, Incarnation, KvGeometry, Load, ModelFingerprint, ModelInfo, PeerHealth,
    Role, StepCost, WorkerId,
};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::respond::{self, error_response};
use crate::error::{ApiError, Dialect, ErrorKind};
use crate::fleet::membership::Membership;
use crate::request::running::Totals;
use crate::server::Server;
use crate::text::template::strftime;

/// `GET /v1/models`.
pub async fn models(server: web::Data<Server>) -> HttpResponse {
    let names = server.model_names.iter();
    let data: Vec<Value> = names.map(|name| model_object(&server, name)).collect();
    // The last three are Anthropic's: there are no further pages.
    let body = json!({
        "object": "list",
        "data": data,
        "has_more": false,
        "first_id": server.model_names.iter().next(),
        "last_id": server.model_names.iter().next_back(),
    });
    respond::json(StatusCode::OK, body.to_string())
}

/// `GET /v1/models/{model}`.
pub async fn model(server: web::Data<Server>, name: web::Path<String>) -> HttpResponse {
    match server.model_names.serves(&name) {
        true => respond::json(StatusCode::OK, model_object(&server, &name).to_string()),
        false => error_response(Dialect::OpenAi, &unknown_model(&server, &name)),
    }
}

/// The error for a model that is not served here.
pub fn unknown_model(server: &Server, name: &str) -> ApiError {
    let short: String = name.chars().take(100).collect();
    let message = format!(
        "the model {short:?} does not exist here; this server has {}",
        server.model_names
    );
    let param = Some("model".to_owned());
    ApiError {
        param,
        ..ApiError::new(ErrorKind::UnknownModel, message)
    }
}

/// Whether a request may be served: it names the model, or no model, which means the one that there is.
///
/// # Errors
/// 404 if it names another.
pub fn check_model(server: &Server, name: Option<&str>) -> Result<(), ApiError> {
    match name {
        Some(name) if !name.is_empty() && !server.model_names.serves(name) => {
            Err(unknown_model(server, name))
        }
        _ => Ok(()),
    }
}

/// Longest sequence that can be served.
pub fn longest_sequence(server: &Server) -> u32 {
    let longest = server
        .members()
        .longest_sequence(&server.model.fingerprint, Instant::now());
    // While no pair of workers serves, what the model could do.
    let held = longest.map_or(u32::MAX, |(held, _)| held);
    held.min(server.model.tokens_max)
}

/// `GET /version`.
pub async fn version() -> HttpResponse {
    let body = json!({"version": env!("CARGO_PKG_VERSION")});
    respond::json(StatusCode::OK, body.to_string())
}

/// A model as OpenAI, vLLM (`root` to `max_model_len`) and Anthropic (`type` to `created_at`) describe one, and what it takes here.
fn model_object(server: &Server, name: &str) -> Value {
    json!({
        "id": name,
        "object": "model",
        "created": server.started_unix,
        "owned_by": "baton",
        "root": server.model_names.first(),
        "parent": null,
        "max_model_len": longest_sequence(server),
        "type": "model",
        "display_name": name,
        "created_at": strftime("%Y-%m-%dT%H:%M:%SZ", server.started_unix as i64),
        "default_max_tokens": server.default_max_tokens,
        "tools": server.model.tools_taken().label(),
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
    let text = aside(move || {
        let text = server.metrics.render(
            &server.members(),
            server.responses.size(),
            &server.tracer,
            Instant::now(),
        );
        text.map_err(|error| error.to_string())
    });
    match text.await {
        Ok(text) => HttpResponse::Ok()
            .insert_header((header::CONTENT_TYPE, "text/plain; version=0.0.4"))
            .body(text),
        Err(error) => unrendered("metrics", &error),
    }
}

/// `GET /cluster`: everything known of workers and API servers.
pub async fn cluster(server: web::Data<Server>) -> HttpResponse {
    let text = aside(move || {
        let (faults, degraded) = (server.faults(), server.degraded());
        let (members, now) = (server.members(), Instant::now());
        let page = ClusterPage {
            cluster: &server.cluster,
            api_server: &server.name,
            model: ModelRow {
                name: server.model_names.first(),
                fingerprint: &server.model.fingerprint,
                tokens_max: server.model.tokens_max,
            },
            promised: PromisedRow {
                ttft_ms: server.promises.level.ttft_ms,
                itl_ms: server.promises.level.itl_ms,
            },
            healthy: faults.is_empty(),
            reasons: faults,
            degraded,
            workers: worker_rows(&members, now).collect(),
            api_servers: members
                .api_servers()
                .map(|beat| ApiServerRow {
                    api_server: &beat.api_server,
                    in_flight: beat.in_flight,
                })
                .collect(),
        };
        serde_json::to_string(&page).map_err(|error| error.to_string())
    });
    match text.await {
        Ok(text) => respond::json(StatusCode::OK, text),
        Err(error) => unrendered("cluster", &error),
    }
}

/// `GET /requests`: the generations under way, and where the time of the last ones went.
pub async fn requests(server: web::Data<Server>) -> HttpResponse {
    let text = aside(move || {
        let now = Instant::now();
        let (running, totals) = server.running.rendered(now);
        let (requests, ttft_p50_ms) = server.last_spent.rendered(now);
        let totals = RequestTotals {
            totals,
            ttft_p50_ms,
        };
        Ok(json!({"totals": totals, "running": running, "requests": requests}).to_string())
    });
    match text.await {
        Ok(text) => respond::json(StatusCode::OK, text),
        Err(error) => unrendered("requests", &error),
    }
}

/// Renders what is long in a large cluster on another thread: an HTTP thread has streams to serve.
async fn aside(
    render: impl FnOnce() -> Result<String, String> + Send + 'static,
) -> Result<String, String> {
    let rendered = web::block(render).await;
    rendered.unwrap_or_else(|error| Err(error.to_string()))
}

fn unrendered(what: &str, error: &str) -> HttpResponse {
    error_response(
        Dialect::OpenAi,
        &ApiError::new(ErrorKind::Internal, format!("{what}: {error}")),
    )
}

#[derive(Serialize)]
struct RequestTotals {
    #[serde(flatten)]
    totals: Totals,
    /// Of the last generations that had a token.
    ttft_p50_ms: Option<f64>,
}

#[derive(Serialize)]
struct ClusterPage<'a> {
    cluster: &'a str,
    api_server: &'a ApiServerId,
    model: ModelRow<'a>,
    promised: PromisedRow,
    healthy: bool,
    reasons: Vec<String>,
    degraded: Vec<String>,
    workers: Vec<WorkerRow<'a>>,
    api_servers: Vec<ApiServerRow<'a>>,
}

#[derive(Serialize)]
struct ModelRow<'a> {
    name: &'a str,
    fingerprint: &'a ModelFingerprint,
    tokens_max: u32,
}

/// The service level that requests are promised; null where nothing is.
#[derive(Serialize)]
struct PromisedRow {
    ttft_ms: Option<u32>,
    itl_ms: Option<u32>,
}

#[derive(Serialize)]
struct ApiServerRow<'a> {
    api_server: &'a ApiServerId,
    in_flight: u32,
}

/// A worker as `/cluster` shows it.
#[derive(Serialize)]
pub struct WorkerRow<'a> {
    worker: &'a WorkerId,
    incarnation: Incarnation,
    role: Role,
    state: &'static str,
    reason: Option<&'a str>,
    silent_ms: u64,
    device: &'a str,
    ranks: Option<u32>,
    weights: &'a str,
    transport: &'a str,
    model: &'a ModelInfo,
    kv: &'a KvGeometry,
    load: Load,
    capacity: Capacity,
    step_tokens: Option<u32>,
    itl_ms: Option<u32>,
    cost: Option<&'a StepCost>,
    cost_error: Option<f32>,
    peers: &'a [PeerHealth],
}

/// All workers by name, as `/cluster` shows them.
pub fn worker_rows(members: &Membership, now: Instant) -> impl Iterator<Item = WorkerRow<'_>> {
    members.workers().map(move |member| WorkerRow {
        worker: &member.beat.worker,
        incarnation: member.beat.incarnation,
        role: member.beat.role,
        state: member.state(now),
        reason: member.beat.reason.as_deref(),
        silent_ms: member.silent(now).as_millis() as u64,
        device: &member.beat.device,
        ranks: member.beat.ranks,
        weights: &member.beat.weights,
        transport: &member.beat.transport,
        model: &member.beat.model,
        kv: &member.beat.kv,
        load: member.beat.load,
        capacity: member.beat.capacity,
        step_tokens: member.beat.step_tokens,
        itl_ms: member.beat.itl_ms,
        cost: member.beat.cost.as_ref(),
        cost_error: member.beat.cost_error,
        peers: &member.peers,
    })
}
