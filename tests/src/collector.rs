//! A collector of traces: takes OTLP over HTTP as a real one does, and keeps what came.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use prost::Message;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// A span as it came.
#[derive(Clone, Debug)]
pub struct CollectedSpan {
    /// `service.name` of its process.
    pub service: String,
    /// `service.instance.id` of its process.
    pub instance: String,
    /// What it is.
    pub name: String,
    /// Its trace, in hexadecimal digits.
    pub trace: String,
    /// Itself.
    pub id: String,
    /// What caused it; empty if nothing did.
    pub parent: String,
    /// `tracestate`.
    pub state: String,
    /// From when to when, in nanoseconds since 1970.
    pub times: (u64, u64),
    /// What is said of it.
    pub attributes: BTreeMap<String, Value>,
    /// Names of what happened in it.
    pub events: Vec<String>,
    /// Why it failed, if it did.
    pub error: Option<String>,
}

/// A running collector; it ends when the value is dropped.
pub struct Collector {
    port: u16,
    spans: Arc<Mutex<Vec<CollectedSpan>>>,
    task: JoinHandle<()>,
}

impl Collector {
    /// Starts one on a free port of this host.
    ///
    /// # Panics
    /// If there is none.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let spans = Arc::<Mutex<Vec<_>>>::default();
        let kept = Arc::clone(&spans);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, Arc::clone(&kept)));
            }
        });
        Self { port, spans, task }
    }

    /// What processes are told to send to it.
    pub fn args(&self) -> Vec<String> {
        let url = format!("http://127.0.0.1:{}", self.port);
        vec!["--otlp-endpoint".to_owned(), url]
    }

    /// What has come so far.
    pub fn spans(&self) -> Vec<CollectedSpan> {
        lock(&self.spans).clone()
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn lock(spans: &Mutex<Vec<CollectedSpan>>) -> MutexGuard<'_, Vec<CollectedSpan>> {
    spans.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One connection: request after request, until its other end closes it.
async fn serve(stream: TcpStream, spans: Arc<Mutex<Vec<CollectedSpan>>>) {
    let mut stream = BufReader::new(stream);
    while let Some((head, body)) = request(&mut stream).await {
        let is_export = head.starts_with("POST /v1/traces HTTP/1.1\r\n")
            && head.contains("content-type: application/x-protobuf\r\n");
        assert!(is_export, "no export of traces: {head}");
        let request = ExportTraceServiceRequest::decode(&*body).expect("OTLP");
        lock(&spans).extend(collected(request));
        let answer = ExportTraceServiceResponse::default().encode_to_vec();
        let head = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\ncontent-length: {}\r\n\r\n",
            answer.len()
        );
        let answer = [head.as_bytes(), &answer].concat();
        if stream.get_mut().write_all(&answer).await.is_err() {
            return;
        }
    }
}

async fn request(stream: &mut BufReader<TcpStream>) -> Option<(String, Vec<u8>)> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if stream.read_line(&mut head).await.ok()? == 0 {
            return None;
        }
    }
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: ")?.parse().ok())?;
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.ok()?;
    Some((head, body))
}

fn collected(request: ExportTraceServiceRequest) -> Vec<CollectedSpan> {
    let mut all = Vec::new();
    for of_process in request.resource_spans {
        let process = attributes(of_process.resource.unwrap_or_default().attributes);
        let text = |name: &str| process[name].as_str().unwrap_or_default().to_owned();
        let spans = of_process
            .scope_spans
            .into_iter()
            .flat_map(|scope| scope.spans);
        all.extend(spans.map(|span| {
            CollectedSpan {
                service: text("service.name"),
                instance: text("service.instance.id"),
                name: span.name,
                trace: hex(&span.trace_id),
                id: hex(&span.span_id),
                parent: hex(&span.parent_span_id),
                state: span.trace_state,
                times: (span.start_time_unix_nano, span.end_time_unix_nano),
                attributes: attributes(span.attributes),
                events: span.events.into_iter().map(|event| event.name).collect(),
                error: span
                    .status
                    .filter(|status| status.code() == StatusCode::Error)
                    .map(|status| status.message),
            }
        }));
    }
    all
}

fn attributes(pairs: Vec<KeyValue>) -> BTreeMap<String, Value> {
    let pairs = pairs.into_iter();
    pairs
        .map(|pair| (pair.key, value(pair.value.unwrap_or_default())))
        .collect()
}

fn value(value: AnyValue) -> Value {
    match value.value {
        Some(Any::StringValue(text)) => json!(text),
        Some(Any::BoolValue(flag)) => json!(flag),
        Some(Any::IntValue(number)) => json!(number),
        Some(Any::DoubleValue(number)) => json!(number),
        Some(Any::ArrayValue(list)) => list.values.into_iter().map(self::value).collect(),
        _ => Value::Null,
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
