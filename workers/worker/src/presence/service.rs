//! Answers to the NATS service API, so that `nats micro ls`, `info` and `stats` show the worker; its one
//! endpoint is `describe`, which peers ask too.

use std::collections::HashMap;

use async_nats::Client;
use async_nats::service::{Request, Service, ServiceExt};
use baton_protocol::subjects::Cluster;
use baton_protocol::{WorkerDescriptor, encode};
use baton_traces::Tracer;
use bytes::Bytes;
use futures::StreamExt;
use serde_json::{Map, Value};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::beat::SharedLoad;
use crate::WorkerError;

/// What `nats micro stats` shows beside its own counts: the load of the last beat, log lines that were not written, and spans that reached
/// no collector.
fn stats(load: &SharedLoad, tracer: &Tracer) -> Value {
    let mut stats = serde_json::to_value(load.load()).unwrap_or_default();
    stats["log_lines_dropped"] = counts(baton_logs::dropped());
    if tracer.is_on() {
        stats["trace_spans_dropped"] = counts(tracer.dropped());
    }
    stats
}

fn counts<const N: usize>(counts: [(&str, u64); N]) -> Value {
    let counts = counts.into_iter();
    let counts = counts.map(|(reason, count)| (reason.to_owned(), Value::from(count)));
    counts.collect::<Map<_, _>>().into()
}

/// Peers that may wait for a description while the bus is slow.
const QUESTIONS_MAX: usize = 1_024;

/// The running service.
pub(crate) struct MicroService {
    service: Service,
    tasks: [JoinHandle<()>; 2],
}

impl MicroService {
    /// Registers `baton-<role>` and answers `describe.<worker>` with the descriptor.
    pub(crate) async fn start(
        client: &Client,
        cluster: &Cluster,
        descriptor: &WorkerDescriptor,
        load: SharedLoad,
        tracer: Tracer,
    ) -> Result<Self, WorkerError> {
        let failed = |detail: String| WorkerError::System {
            what: "registering the NATS service",
            detail,
        };
        let answer = Bytes::from(encode(descriptor).map_err(|error| failed(error.to_string()))?);
        let role = descriptor.role.label();
        let metadata = HashMap::from([
            ("worker".to_owned(), descriptor.worker.to_string()),
            ("cluster".to_owned(), cluster.name().to_owned()),
            ("role".to_owned(), role.to_owned()),
            ("model".to_owned(), descriptor.model.name.clone()),
            ("incarnation".to_owned(), descriptor.incarnation.to_string()),
        ]);
        let service = client
            .service_builder()
            .description(format!(
                "Baton {role} worker {} of {}",
                descriptor.worker, descriptor.model.name
            ))
            .metadata(metadata)
            .stats_handler(move |_, _| stats(&load, &tracer))
            .start(format!("baton-{role}"), env!("CARGO_PKG_VERSION"))
            .await
            .map_err(|error| failed(error.to_string()))?;
        let mut endpoint = service
            .endpoint_builder()
            .name("describe")
            .add(cluster.describe(&descriptor.worker))
            .await
            .map_err(|error| failed(error.to_string()))?;
        let (asked, mut questions) = mpsc::channel::<Request>(QUESTIONS_MAX);
        let listen = tokio::spawn(async move {
            while let Some(mut request) = endpoint.next().await {
                // Whoever asks says nothing with it, and asks again if there is no room now.
                request.message.payload = Bytes::new();
                let _ = asked.try_send(request);
            }
        });
        let describe = tokio::spawn(async move {
            while let Some(request) = questions.recv().await {
                if let Err(error) = request.respond(Ok(answer.clone())).await {
                    tracing::debug!(%error, "a description was not sent");
                }
            }
        });
        Ok(Self {
            service,
            tasks: [listen, describe],
        })
    }

    pub(crate) async fn stop(self) {
        if let Err(error) = self.service.stop().await {
            tracing::debug!(%error, "stopping the NATS service");
        }
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}
