//! What an attack is aimed at, and how hostile clients send.

use std::sync::OnceLock;
use std::time::Duration;

use bytes::Bytes;
use reqwest::Client;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

pub const COMPLETIONS: &str = "/v1/completions";
pub const CHAT: &str = "/v1/chat/completions";

/// Where a cluster can be reached.
#[derive(Clone, Debug)]
pub struct Target {
    /// The API server: `http://HOST:PORT`.
    pub base: String,
    /// nats-server.
    pub bus: String,
    /// Name of the model.
    pub model: String,
}

/// What came of one hostile request.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// An answer: status and body, a JSON string if it is no JSON.
    Answered(u16, Value),
    /// The connection ended before an answer: a server need not read all of a body that it refuses.
    Cut(String),
    /// Nothing came in time.
    Hung,
}

impl Outcome {
    /// What is wrong with it as the answer to a request that is to be refused: anything but an error of OpenAI's shape
    /// that is not the server's fault, or a cut.
    pub fn is_no_refusal(&self) -> Option<String> {
        match self {
            Self::Cut(_) => None,
            Self::Hung => Some("no answer".to_owned()),
            Self::Answered(400..500 | 503, body) if body["error"]["message"].is_string() => None,
            Self::Answered(status, body) => Some(format!("{status} {}", shown(body))),
        }
    }
}

/// The beginning of a body, for people.
pub fn shown(body: &Value) -> String {
    body.to_string().chars().take(300).collect()
}

/// Making a client takes longer than most of what it is made for. It keeps no connection: each request has one of its own.
fn http() -> &'static Client {
    static CLIENT: OnceLock<Client> = OnceLock::new();
    let make = || {
        Client::builder()
            .no_proxy()
            .pool_max_idle_per_host(0)
            .build()
    };
    CLIENT.get_or_init(|| make().expect("a client without TLS"))
}

impl Target {
    /// A request body for this model.
    pub fn body(&self, more: &Value) -> Value {
        let mut body = more.clone();
        body["model"] = json!(self.model);
        body
    }

    /// POST on a connection of its own.
    pub async fn post(&self, path: &str, body: impl Into<Bytes>, patience: Duration) -> Outcome {
        let asked = async {
            let request = http()
                .post(format!("{}{path}", self.base))
                .header("content-type", "application/json")
                .body(body.into());
            let response = request.send().await?;
            let status = response.status().as_u16();
            Ok::<_, reqwest::Error>((status, response.bytes().await?))
        };
        match timeout(patience, asked).await {
            Err(_) => Outcome::Hung,
            Ok(Err(error)) => Outcome::Cut(format!("{error:?}")),
            Ok(Ok((status, body))) => {
                let text = || Value::String(String::from_utf8_lossy(&body).into_owned());
                Outcome::Answered(
                    status,
                    serde_json::from_slice(&body).unwrap_or_else(|_| text()),
                )
            }
        }
    }

    /// Sends a request of which `body` is the beginning and `length` the length it tells, and leaves after this time.
    pub async fn leave(&self, path: &str, body: &[u8], length: usize, after: Duration) {
        let address = self.base.trim_start_matches("http://");
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        );
        // A server may be too busy to take it, or refuse it at once: then this client leaves all the same.
        let sent = async {
            let mut stream = TcpStream::connect(address).await?;
            stream.write_all(head.as_bytes()).await?;
            stream.write_all(body).await?;
            tokio::time::sleep(after).await;
            Ok::<_, std::io::Error>(())
        };
        let _ = timeout(after + Duration::from_secs(5), sent).await;
    }

    /// Sends these bytes, whatever they are, and reads until the server closes the connection or has said something.
    pub async fn say(&self, bytes: &[u8], patience: Duration) {
        let address = self.base.trim_start_matches("http://");
        let said = async {
            let mut stream = TcpStream::connect(address).await?;
            stream.write_all(bytes).await?;
            stream.read(&mut [0; 1024]).await
        };
        let _ = timeout(patience, said).await;
    }

    /// GET of JSON or text.
    pub async fn look(&self, path: &str) -> Result<(u16, String), String> {
        let asked = async {
            let response = http().get(format!("{}{path}", self.base)).send().await?;
            let status = response.status().as_u16();
            Ok::<_, reqwest::Error>((status, response.text().await?))
        };
        match timeout(Duration::from_secs(10), asked).await {
            Err(_) => Err(format!("{path}: no answer")),
            Ok(answer) => answer.map_err(|error| format!("{path}: {error:?}")),
        }
    }
}
