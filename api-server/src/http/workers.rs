//! What can be asked of a worker by way of the API server: to leave.

use std::time::Duration;

use actix_web::http::StatusCode;
use actix_web::{HttpResponse, web};
use baton_protocol::deadlines::CONTROL_TIMEOUT_MS;
use serde_json::json;
use tokio::time::Instant;

use super::authorize::Caller;
use super::respond::{self, error_response};
use crate::error::{ApiError, Dialect, ErrorKind};
use crate::request::lifecycle::{NoReply, Target};
use crate::server::Server;

/// `POST /workers/{name}/drain`: the worker finishes what it has and leaves, as with SIGTERM. Only with an API key: without keys,
/// whoever reaches the port could empty the cluster.
pub async fn drain(
    server: web::Data<Server>,
    name: web::Path<String>,
    request: actix_web::HttpRequest,
) -> HttpResponse {
    let Some(key) = Caller::of(&request).0 else {
        let message = "draining a worker wants an API key, and this API server was started without: give it --api-keys-file, or send the worker SIGTERM";
        return error_response(
            Dialect::OpenAi,
            &ApiError::new(ErrorKind::Forbidden, message),
        );
    };
    match asked(&server, &name).await {
        Ok(target) => {
            tracing::info!(worker = %target.worker, key = key.name, "asked to leave");
            let body = json!({"worker": target.worker, "state": "draining"});
            respond::json(StatusCode::ACCEPTED, body.to_string())
        }
        Err(error) => error_response(Dialect::OpenAi, &error),
    }
}

/// The worker of this name, which has said that it drains.
async fn asked(server: &Server, name: &str) -> Result<Target, ApiError> {
    if let Some(fault) = server.bus.fault(Instant::now()) {
        return Err(ApiError::new(ErrorKind::Bus, fault.to_string()));
    }
    let target = server
        .members()
        .workers()
        .find(|member| member.beat.worker.as_str() == name)
        .map(|member| Target {
            worker: member.beat.worker.clone(),
            incarnation: member.beat.incarnation,
        });
    let target = target.ok_or_else(|| {
        let short: String = name.chars().take(100).collect();
        let message = format!("there is no worker {short:?}: /cluster names those that there are");
        ApiError::new(ErrorKind::UnknownPath, message)
    })?;
    let wait = Duration::from_millis(CONTROL_TIMEOUT_MS);
    let failed = |kind, why: &str| {
        let message = format!("{} {why}: send it SIGTERM", target.worker);
        Err(ApiError::new(kind, message))
    };
    match server.bus.drain(&target, wait).await {
        Ok(reply) if reply.draining => Ok(target),
        Ok(_) => failed(
            ErrorKind::NoWorker,
            "was started again just now: ask once more, or",
        ),
        Err(NoReply::NoResponders) => failed(
            ErrorKind::NoWorker,
            "does not listen any more; should it run",
        ),
        Err(NoReply::TimedOut) => failed(
            ErrorKind::Deadline,
            "did not answer in 3 s: it hangs, or is of a release that cannot be asked to drain",
        ),
        Err(error) => failed(
            ErrorKind::Internal,
            &format!("could not be asked ({error:?})"),
        ),
    }
}
