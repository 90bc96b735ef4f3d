//! The thread that sends spans to the collector: in batches, with a deadline for each, and without a second try.

use std::error::Error;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc as blocking};
use std::time::Duration;

use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::InstrumentationScope;
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1 as otlp;
use prost::Message;
use reqwest::header::CONTENT_TYPE;
use reqwest::{Client, Url, redirect};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout_at};

use crate::span::text_pair;
use crate::{Shared, TraceConfig};

/// Spans of one export.
const BATCH_MAX: usize = 512;

/// A span waits this long for others.
const INTERVAL: Duration = Duration::from_secs(1);

/// One export is over within this time.
const EXPORT_WAIT: Duration = Duration::from_secs(10);

/// What still waits at a process's end has this long to be sent.
const FLUSH_WAIT: Duration = Duration::from_secs(2);

/// An endpoint that does not answer is told of this often.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(60);

/// Bytes of an answer that are read.
const ANSWER_BYTES_MAX: usize = 64 << 10;

/// Ends the export when it is dropped, and sends what still waits, within two seconds. Hold it until nothing makes spans any more.
#[derive(Debug)]
#[must_use]
pub struct Exporter {
    /// Told to end; it says when it has ended.
    end: Option<oneshot::Sender<()>>,
    ended: blocking::Receiver<()>,
}

impl Exporter {
    pub(crate) fn start(
        config: TraceConfig,
        shared: Arc<Shared>,
        waiting: mpsc::Receiver<otlp::Span>,
    ) -> Result<Self, String> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| format!("the exporter of traces cannot start: {error}"))?;
        let client = Client::builder()
            .default_headers(config.headers.0)
            .redirect(redirect::Policy::none())
            .timeout(EXPORT_WAIT)
            .user_agent(concat!("baton/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| format!("the exporter of traces cannot start: {}", told(&error)))?;
        let sender = Sender {
            client,
            url: config.endpoint.url(),
            resource: Resource {
                attributes: vec![
                    text_pair("service.name", &config.service),
                    text_pair("service.namespace", &config.cluster),
                    text_pair("service.instance.id", &config.instance),
                    text_pair("service.version", env!("CARGO_PKG_VERSION")),
                ],
                ..Resource::default()
            },
            shared,
            complained: None,
            lost: 0,
        };
        let (end, told_to_end) = oneshot::channel();
        let (over, ended) = blocking::sync_channel(1);
        std::thread::Builder::new()
            .name("traces".to_owned())
            .spawn(move || {
                runtime.block_on(run(sender, waiting, told_to_end));
                // Whoever waits may have gone.
                let _ = over.try_send(());
            })
            .map_err(|error| format!("no thread for the export of traces: {error}"))?;
        Ok(Self {
            end: Some(end),
            ended,
        })
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        if let Some(end) = self.end.take() {
            let _ = end.send(());
            let _ = self.ended.recv_timeout(2 * FLUSH_WAIT);
        }
    }
}

async fn run(
    mut sender: Sender,
    mut waiting: mpsc::Receiver<otlp::Span>,
    mut end: oneshot::Receiver<()>,
) {
    let mut batch = Vec::new();
    let over;
    loop {
        let gathered = tokio::select! {
            biased;
            _ = &mut end => None,
            () = gather(&mut waiting, &mut batch) => Some(()),
        };
        if gathered.is_none() || batch.is_empty() {
            over = Instant::now() + FLUSH_WAIT;
            break;
        }
        let mut sending = std::pin::pin!(sender.send(&mut batch));
        let is_over = tokio::select! {
            biased;
            () = &mut sending => false,
            _ = &mut end => true,
        };
        if is_over {
            over = Instant::now() + FLUSH_WAIT;
            let _ = timeout_at(over, sending).await;
            break;
        }
    }
    waiting.close();
    let rest = async {
        loop {
            sender.send(&mut batch).await;
            if waiting.recv_many(&mut batch, BATCH_MAX).await == 0 {
                return;
            }
        }
    };
    if timeout_at(over, rest).await.is_err() {
        tracing::warn!("not all spans reached the collector before the end");
    }
}

/// Waits for a span, and for those that come soon after it.
async fn gather(waiting: &mut mpsc::Receiver<otlp::Span>, batch: &mut Vec<otlp::Span>) {
    waiting.recv_many(batch, BATCH_MAX).await;
    let until = Instant::now() + INTERVAL;
    while !batch.is_empty() && batch.len() < BATCH_MAX {
        let room = BATCH_MAX - batch.len();
        match timeout_at(until, waiting.recv_many(batch, room)).await {
            Ok(1..) => {}
            Ok(0) | Err(_) => return,
        }
    }
}

struct Sender {
    client: Client,
    url: Url,
    resource: Resource,
    shared: Arc<Shared>,
    /// When it was last said that spans do not arrive.
    complained: Option<Instant>,
    /// Spans that were lost since then.
    lost: usize,
}

impl Sender {
    /// Sends these spans. Those that do not arrive are counted.
    async fn send(&mut self, batch: &mut Vec<otlp::Span>) {
        if batch.is_empty() {
            return;
        }
        self.shared.clock.look();
        let spans = std::mem::take(batch);
        let count = spans.len();
        let request = ExportTraceServiceRequest {
            resource_spans: vec![otlp::ResourceSpans {
                resource: Some(self.resource.clone()),
                scope_spans: vec![otlp::ScopeSpans {
                    scope: Some(InstrumentationScope {
                        name: "baton".to_owned(),
                        version: env!("CARGO_PKG_VERSION").to_owned(),
                        ..InstrumentationScope::default()
                    }),
                    spans,
                    ..otlp::ScopeSpans::default()
                }],
                ..otlp::ResourceSpans::default()
            }],
        };
        match self.export(request.encode_to_vec()).await {
            Ok(()) => {
                if self.complained.take().is_some() {
                    tracing::info!(endpoint = %self.url, lost = self.lost, "spans are exported again");
                    self.lost = 0;
                }
            }
            Err((lost, why)) => self.lost(lost.unwrap_or(count).min(count), &why),
        }
    }

    /// One export. An error has how many spans were lost, all of them where it does not say, and why.
    async fn export(&self, body: Vec<u8>) -> Result<(), (Option<usize>, String)> {
        let request = self
            .client
            .post(self.url.clone())
            .header(CONTENT_TYPE, "application/x-protobuf")
            .body(body);
        let all = |error: reqwest::Error| (None, told(&error.without_url()));
        let mut answer = request.send().await.map_err(all)?;
        if !answer.status().is_success() {
            return Err((None, format!("it answered {}", answer.status())));
        }
        let mut bytes = Vec::new();
        while let Some(more) = answer.chunk().await.map_err(all)? {
            if bytes.len() + more.len() > ANSWER_BYTES_MAX {
                return Ok(());
            }
            bytes.extend_from_slice(&more);
        }
        // What is no such answer is none: some say nothing, or speak JSON.
        let answer = ExportTraceServiceResponse::decode(&*bytes).unwrap_or_default();
        match answer.partial_success {
            Some(part) if part.rejected_spans > 0 => {
                let lost = usize::try_from(part.rejected_spans).unwrap_or(usize::MAX);
                Err((Some(lost), part.error_message))
            }
            _ => Ok(()),
        }
    }

    fn lost(&mut self, count: usize, why: &str) {
        let dropped = &self.shared.dropped.export;
        dropped.fetch_add(count as u64, Ordering::Relaxed);
        self.lost += count;
        let is_due = |at: Instant| at.elapsed() >= COMPLAINT_INTERVAL;
        if self.complained.is_none_or(is_due) {
            tracing::warn!(
                endpoint = %self.url, lost = self.lost, why,
                "spans are not exported: does the collector run there, and take OTLP over HTTP (port 4318)?"
            );
            self.complained = Some(Instant::now());
            self.lost = 0;
        }
    }
}

/// An error with what caused it.
fn told(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests;
