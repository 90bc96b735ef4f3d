//! A client of the API server that shows what goes over the wire.

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use futures::stream::BoxStream;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::metrics::Metrics;
use crate::wait::{PATIENCE, within};

/// No answer of the tests takes longer, so none that does is anything but a hang.
const ANSWER_DEADLINE: Duration = Duration::from_secs(480);

/// A client of one API server.
#[derive(Clone, Debug)]
pub struct Api {
    base: String,
    http: reqwest::Client,
}

/// An answer, whole.
#[derive(Clone, Debug)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// The `Retry-After` header.
    pub retry_after: Option<String>,
    /// The body; a JSON string if it is not JSON.
    pub body: Value,
}

impl Answer {
    /// The body of a success.
    ///
    /// # Panics
    /// If it is none.
    pub fn ok(self) -> Value {
        assert_eq!(self.status, 200, "{}", self.body);
        self.body
    }
}

impl Api {
    /// A client of the API server at this port.
    pub fn new(port: u16) -> Self {
        let http = reqwest::Client::builder()
            .no_proxy()
            .build()
            .expect("a client without TLS");
        Self {
            base: format!("http://127.0.0.1:{port}"),
            http,
        }
    }

    /// Where it is.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// POST of JSON.
    ///
    /// # Panics
    /// If no answer comes.
    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send(
            reqwest::Method::POST,
            path,
            Some(body.to_string().into_bytes()),
        )
        .await
        .unwrap_or_else(|e| panic!("POST {path}: {e}"))
    }

    /// The same in the background.
    pub fn ask(&self, path: &str, body: &Value) -> JoinHandle<Answer> {
        let (api, path, body) = (self.clone(), path.to_owned(), body.clone());
        tokio::spawn(async move { api.post(&path, &body).await })
    }

    /// `/v1/completions`, whose answer is a success.
    pub async fn complete(&self, body: &Value) -> Value {
        self.post("/v1/completions", body).await.ok()
    }

    /// As [`Self::complete`], by a client that comes back when it is told that the decode workers are full: how long they will be
    /// depends on the machine.
    ///
    /// # Panics
    /// If they are for longer than [`PATIENCE`].
    pub async fn complete_when_there_is_room(&self, body: &Value) -> Value {
        let until = Instant::now() + PATIENCE;
        loop {
            let answer = self.post("/v1/completions", body).await;
            let is_busy = answer.status == 503 && answer.body["error"]["code"] == "busy";
            if !is_busy || Instant::now() >= until {
                return answer.ok();
            }
            let after = answer.retry_after.and_then(|after| after.parse().ok());
            tokio::time::sleep(Duration::from_secs(after.unwrap_or(1))).await;
        }
    }

    /// `/v1/chat/completions`, whose answer is a success.
    pub async fn chat(&self, body: &Value) -> Value {
        self.post("/v1/chat/completions", body).await.ok()
    }

    /// GET.
    ///
    /// # Errors
    /// If no answer comes.
    pub async fn look(&self, path: &str) -> Result<Answer, String> {
        self.send(reqwest::Method::GET, path, None).await
    }

    /// Any request with any body.
    ///
    /// # Errors
    /// If no answer comes.
    pub async fn send(
        &self,
        method: reqwest::Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> Result<Answer, String> {
        let mut request = self.http.request(method, format!("{}{path}", self.base));
        if let Some(body) = body {
            request = request
                .header("content-type", "application/json")
                .body(body);
        }
        within(path, ANSWER_DEADLINE, async {
            let response = request.send().await.map_err(|e| format!("{e:?}"))?;
            let status = response.status().as_u16();
            let retry_after = response
                .headers()
                .get("retry-after")
                .and_then(|value| value.to_str().ok())
                .map(str::to_owned);
            let text = response.text().await.map_err(|e| format!("{e:?}"))?;
            let body = serde_json::from_str(&text).unwrap_or(Value::String(text));
            Ok(Answer {
                status,
                retry_after,
                body,
            })
        })
        .await
    }

    /// Sends a request with `stream: true` and reads its events one by one. Dropping the value is what a client does
    /// that leaves.
    ///
    /// # Panics
    /// If no answer comes, or an error.
    pub async fn stream(&self, path: &str, body: &Value) -> Events {
        match self.try_stream(path, body).await {
            Ok(events) => events,
            Err(error) => panic!("POST {path}: {error}"),
        }
    }

    /// The same for a server that may not be there.
    ///
    /// # Errors
    /// If no answer comes, or an error.
    pub async fn try_stream(&self, path: &str, body: &Value) -> Result<Events, String> {
        let mut body = body.clone();
        body["stream"] = json!(true);
        let request = self
            .http
            .post(format!("{}{path}", self.base))
            .header("content-type", "application/json")
            .body(body.to_string());
        let response = within(path, ANSWER_DEADLINE, request.send())
            .await
            .map_err(|e| format!("{e:?}"))?;
        let status = response.status().as_u16();
        if status != 200 {
            let text = response.text().await.unwrap_or_default();
            return Err(format!("{status} {text}"));
        }
        Ok(Events {
            chunks: response.bytes_stream().boxed(),
            buffer: BytesMut::new(),
            done: false,
        })
    }

    /// `/metrics`.
    ///
    /// # Panics
    /// If it is not there.
    pub async fn metrics(&self) -> Metrics {
        let answer = self.look("/metrics").await.expect("/metrics");
        Metrics::parse(answer.ok().as_str().expect("/metrics is text"))
    }
}

/// The events of a streamed answer.
pub struct Events {
    chunks: BoxStream<'static, Result<Bytes, reqwest::Error>>,
    buffer: BytesMut,
    done: bool,
}

impl Events {
    /// The next event's JSON; `None` after `[DONE]`. Comments are skipped.
    ///
    /// # Panics
    /// If the stream breaks, ends without `[DONE]`, or carries anything else.
    pub async fn next(&mut self) -> Option<Value> {
        if self.done {
            return None;
        }
        loop {
            let event = self.event().await.expect("the stream ended without [DONE]");
            let data: Vec<&str> = event
                .lines()
                .filter(|line| !line.starts_with(':') && *line != "event: error")
                .map(|line| {
                    line.strip_prefix("data:")
                        .unwrap_or_else(|| panic!("neither data nor a comment: {line}"))
                        .trim_start()
                })
                .collect();
            match data.join("\n").as_str() {
                "" => {}
                "[DONE]" => {
                    self.done = true;
                    assert_eq!(self.event().await, None, "something follows [DONE]");
                    return None;
                }
                text => {
                    let value: Value = serde_json::from_str(text)
                        .unwrap_or_else(|e| panic!("no JSON: {e}: {text}"));
                    return Some(value);
                }
            }
        }
    }

    /// All events that are left.
    pub async fn rest(&mut self) -> Vec<Value> {
        let mut all = Vec::new();
        while let Some(event) = self.next().await {
            all.push(event);
        }
        all
    }

    /// Text up to the next empty line; `None` at the end of the body.
    async fn event(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|pair| pair == b"\n\n") {
                let event = self.buffer.split_to(end + 2);
                return Some(
                    String::from_utf8(event[..end].to_vec()).expect("events are UTF-8 each"),
                );
            }
            let chunk = within("the next event", ANSWER_DEADLINE, self.chunks.next()).await;
            match chunk {
                Some(Ok(chunk)) => self.buffer.extend_from_slice(&chunk),
                Some(Err(e)) => panic!("the stream broke: {e:?}"),
                None => {
                    assert!(self.buffer.is_empty(), "half an event: {:?}", self.buffer);
                    return None;
                }
            }
        }
    }
}
