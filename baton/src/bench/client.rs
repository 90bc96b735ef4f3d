//! A small client for streamed answers: a kept connection, events told apart by bytes.

use reqwest::header::HeaderMap;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::http::{Body, Head, find};
use super::prompt::Request;
use crate::Failure;
use crate::api_client;
use crate::sse::SseReader;

const READ_BYTES: usize = 64 << 10;
const HEAD_BYTES_MAX: usize = 64 << 10;
/// A refusal says why in its body; that much of it is read.
const REFUSAL_BYTES_MAX: usize = 16 << 10;

/// Where requests go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    authority: String,
    headers: HeaderMap,
}

impl Target {
    /// From an address as people write it, over HTTP and without a path.
    ///
    /// # Errors
    /// If it is none.
    pub fn parse(url: &str) -> Result<Self, Failure> {
        let base = api_client::base(url)?;
        let Some(authority) = base.strip_prefix("http://") else {
            return Err(format!(
                "{url:?}: bench measures over plain HTTP; what TLS costs is the library's. Start an API server without --tls-cert to measure it"
            )
            .into());
        };
        if authority.contains(['/', '?', '#', '@']) {
            return Err(format!(
                "{url:?} is more than an address: bench goes to one such as http://localhost:8000"
            )
            .into());
        }
        let port = authority
            .rsplit_once(':')
            .is_some_and(|(_, port)| port.parse::<u16>().is_ok());
        Ok(Self {
            authority: match port {
                true => authority.to_owned(),
                false => format!("{authority}:80"),
            },
            headers: HeaderMap::new(),
        })
    }

    /// Where it is, with its scheme.
    pub fn base(&self) -> String {
        format!("http://{}", self.authority)
    }
}

impl Target {
    /// The same, with headers that every request carries.
    #[must_use]
    pub fn with_headers(mut self, headers: HeaderMap) -> Self {
        self.headers = headers;
        self
    }

    /// The headers as they go over the wire.
    fn lines(&self) -> String {
        let lines = self.headers.iter();
        lines
            .map(|(name, value)| format!("{name}: {}\r\n", value.to_str().unwrap_or_default()))
            .collect()
    }
}

/// An answer that ended as it should.
#[derive(Debug)]
pub struct Streamed {
    /// When each chunk with text arrived.
    pub chunks: Vec<Instant>,
    /// As the server's usage says.
    pub output_tokens: u64,
    /// As the server's usage says.
    pub prompt_tokens: u64,
    /// Prompt tokens that a prefix cache held.
    pub cached_tokens: u64,
}

/// One connection, made when it is needed and kept while the server keeps it.
pub struct Connection {
    target: Target,
    stream: Option<TcpStream>,
    buffer: Vec<u8>,
}

impl Connection {
    /// Not yet connected.
    pub fn new(target: Target) -> Self {
        Self {
            target,
            stream: None,
            buffer: Vec::with_capacity(READ_BYTES),
        }
    }

    /// Forgets the connection: something on it was left unread.
    pub fn close(&mut self) {
        self.stream = None;
    }

    /// Sends a request and reads its streamed answer to the end.
    ///
    /// # Errors
    /// A short sentence, the same for failures of the same kind.
    pub async fn stream(&mut self, request: &Request) -> Result<Streamed, String> {
        // On any way out but the last, the connection is in an unknown state and gone.
        let kept = self.stream.take();
        let reused = kept.is_some();
        let message = format!(
            "POST {} HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n{}\r\n{}",
            request.path,
            self.target.authority,
            request.body.len(),
            self.target.lines(),
            request.body
        );
        let mut stream = match kept {
            Some(stream) => stream,
            None => self.connect().await?,
        };
        let mut head = self.exchange(&mut stream, &message).await;
        if reused && matches!(head, Err(Exchange::Closed)) {
            // The server gave up the idle connection at this very moment; that is nobody's fault.
            stream = self.connect().await?;
            head = self.exchange(&mut stream, &message).await;
        }
        let head = head.map_err(|error| match error {
            Exchange::Closed => "connection closed before an answer".to_owned(),
            Exchange::Other(error) => error,
        })?;
        let keep = head.keep;
        let streamed = self.body(&mut stream, head).await?;
        self.stream = keep.then_some(stream);
        Ok(streamed)
    }

    async fn connect(&self) -> Result<TcpStream, String> {
        let stream = TcpStream::connect(&self.target.authority)
            .await
            .map_err(|error| format!("connect: {error}"))?;
        stream
            .set_nodelay(true)
            .map_err(|error| format!("TCP_NODELAY: {error}"))?;
        Ok(stream)
    }

    /// Sends and reads to the end of the head; what follows it stays in the buffer.
    async fn exchange(&mut self, stream: &mut TcpStream, message: &str) -> Result<Head, Exchange> {
        stream
            .write_all(message.as_bytes())
            .await
            .map_err(|_| Exchange::Closed)?;
        self.buffer.clear();
        loop {
            match stream.read_buf(&mut self.buffer).await {
                Ok(0) | Err(_) if self.buffer.is_empty() => return Err(Exchange::Closed),
                Ok(0) => {
                    return Err(Exchange::Other(
                        "connection closed within the head".to_owned(),
                    ));
                }
                Err(error) => return Err(Exchange::Other(format!("read: {error}"))),
                Ok(_) => {}
            }
            if let Some(end) = find(&self.buffer, b"\r\n\r\n") {
                let head = Head::parse(&self.buffer[..end]).map_err(Exchange::Other)?;
                self.buffer.drain(..end + 4);
                return Ok(head);
            }
            if self.buffer.len() > HEAD_BYTES_MAX {
                return Err(Exchange::Other("a head without end".to_owned()));
            }
        }
    }

    async fn body(&mut self, stream: &mut TcpStream, head: Head) -> Result<Streamed, String> {
        let mut body = Body::new(head.length);
        let mut refusal = Vec::new();
        let mut reader = SseReader::default();
        let mut answer = Answer::default();
        loop {
            let now = Instant::now();
            body.push(&self.buffer, |part| match head.status {
                200 => reader.push(part, |data| answer.take(data, now)),
                _ if refusal.len() < REFUSAL_BYTES_MAX => refusal.extend_from_slice(part),
                _ => {}
            })?;
            self.buffer.clear();
            if body.ended() {
                break;
            }
            match stream.read_buf(&mut self.buffer).await {
                Ok(0) => return Err("connection closed within the answer".to_owned()),
                Err(error) => return Err(format!("read: {error}")),
                Ok(_) => {}
            }
        }
        match head.status {
            200 => answer.streamed(),
            status => Err(format!("HTTP {status}: {}", refusal_message(&refusal))),
        }
    }
}

enum Exchange {
    /// Before the first byte of an answer.
    Closed,
    Other(String),
}

fn refusal_message(body: &[u8]) -> String {
    match api_client::sentence(&String::from_utf8_lossy(body)) {
        nothing if nothing.is_empty() => "without an explanation".to_owned(),
        sentence => sentence,
    }
}

/// What came of an answer so far.
#[derive(Default)]
struct Answer {
    chunks: Vec<Instant>,
    usage: Option<serde_json::Value>,
    done: bool,
    error: Option<String>,
}

impl Answer {
    /// Most events are chunks of text and are only told from others; the rest is parsed.
    fn take(&mut self, data: &[u8], now: Instant) {
        if has_text(data) {
            self.chunks.push(now);
        } else if data == b"[DONE]" {
            self.done = true;
        } else if find(data, b"\"usage\":{").is_some() {
            let event: serde_json::Value = serde_json::from_slice(data).unwrap_or_default();
            self.usage = Some(event["usage"].clone());
        } else if data.starts_with(b"{\"error\"") {
            self.error = Some(refusal_message(data));
        }
    }

    fn streamed(self) -> Result<Streamed, String> {
        if let Some(error) = self.error {
            return Err(format!("error in the stream: {error}"));
        }
        if !self.done {
            return Err("a stream without [DONE]".to_owned());
        }
        let usage = self.usage.ok_or("a stream without usage")?;
        let output_tokens = usage["completion_tokens"]
            .as_u64()
            .ok_or("usage without completion_tokens")?;
        if (self.chunks.len() as u64) > output_tokens {
            return Err("more chunks than tokens".to_owned());
        }
        Ok(Streamed {
            chunks: self.chunks,
            output_tokens,
            prompt_tokens: usage["prompt_tokens"].as_u64().unwrap_or(0),
            cached_tokens: usage["prompt_tokens_details"]["cached_tokens"]
                .as_u64()
                .unwrap_or(0),
        })
    }
}

/// Whether an event brings text: `"content":"x` of chat or `"text":"x` of completions. A quote within text is escaped,
/// so neither can appear inside another string.
fn has_text(data: &[u8]) -> bool {
    [&b"\"content\":\""[..], b"\"text\":\""].iter().any(|key| {
        find(data, key).is_some_and(|at| data.get(at + key.len()).is_some_and(|&next| next != b'"'))
    })
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    fn chunked(events: &[&str]) -> String {
        let mut text = String::from("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n");
        for event in events {
            let event = format!("data: {event}\n\n");
            text += &format!("{:x}\r\n{event}\r\n", event.len());
        }
        text + "0\r\n\r\n"
    }

    const GOOD: [&str; 5] = [
        r#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#,
        r#"{"choices":[{"delta":{"content":"a"}}]}"#,
        r#"{"choices":[{"delta":{"content":"\"b"}}],"usage":null}"#,
        r#"{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":3}}}"#,
        "[DONE]",
    ];

    /// A server that gives one answer to each request, in pieces of `piece` bytes; after `per_connection` answers it
    /// closes. Returns how to reach it.
    async fn server(answers: Vec<String>, piece: usize, per_connection: usize) -> Target {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = Target::parse(&format!("http://{}", listener.local_addr().unwrap())).unwrap();
        tokio::spawn(async move {
            let mut answers = answers.into_iter();
            while let Ok((mut stream, _)) = listener.accept().await {
                for _ in 0..per_connection {
                    let mut request = Vec::new();
                    while find(&request, b"}END").is_none() {
                        if stream.read_buf(&mut request).await.unwrap_or(0) == 0 {
                            break;
                        }
                    }
                    let Some(answer) = answers.next() else { return };
                    for bytes in answer.as_bytes().chunks(piece) {
                        let _ = stream.write_all(bytes).await;
                        tokio::task::yield_now().await;
                    }
                }
            }
        });
        target
    }

    fn request() -> Request {
        Request {
            path: "/v1/chat/completions",
            body: "{}END".to_owned(),
        }
    }

    #[tokio::test]
    async fn answers_are_read_in_any_pieces_over_one_connection() {
        for piece in [1, 7, 1 << 20] {
            let target = server(vec![chunked(&GOOD); 3], piece, 3).await;
            let mut connection = Connection::new(target);
            for _ in 0..3 {
                let streamed = connection.stream(&request()).await.unwrap();
                assert_eq!(streamed.chunks.len(), 2);
                assert_eq!(
                    (
                        streamed.output_tokens,
                        streamed.prompt_tokens,
                        streamed.cached_tokens
                    ),
                    (2, 7, 3)
                );
            }
        }
    }

    #[tokio::test]
    async fn a_connection_that_the_server_closed_between_answers_is_made_again() {
        let target = server(vec![chunked(&GOOD); 3], 1 << 20, 1).await;
        let mut connection = Connection::new(target);
        for _ in 0..3 {
            connection.stream(&request()).await.unwrap();
        }
    }

    #[tokio::test]
    async fn faults_are_told_apart() {
        let refusal = r#"{"error":{"message":"busy"}}"#;
        let refused = format!(
            "HTTP/1.1 503 No\r\ncontent-length: {}\r\n\r\n{refusal}",
            refusal.len()
        );
        let cases = [
            (refused, "HTTP 503: busy"),
            (chunked(&GOOD[..4]), "a stream without [DONE]"),
            (chunked(&[GOOD[1], GOOD[4]]), "a stream without usage"),
            (chunked(&[GOOD[1], refusal]), "error in the stream: busy"),
            (
                chunked(&[GOOD[1], GOOD[1], GOOD[1], GOOD[3], GOOD[4]]),
                "more chunks than tokens",
            ),
            (
                chunked(&GOOD).replace("0\r\n\r\n", ""),
                "connection closed within the answer",
            ),
            (
                "nonsense\r\n\r\n".to_owned(),
                "an answer that is not HTTP/1.1",
            ),
        ];
        for (answer, fault) in cases {
            let target = server(vec![answer], 1 << 20, 1).await;
            let error = Connection::new(target)
                .stream(&request())
                .await
                .unwrap_err();
            assert_eq!(error, fault);
        }
    }

    #[test]
    fn addresses_are_checked() {
        for (written, meant) in [
            ("http://h:1/", "h:1"),
            ("http://h", "h:80"),
            ("localhost:8000", "localhost:8000"),
            ("10.0.0.7:80/v1", "10.0.0.7:80"),
            ("[::1]:8000", "[::1]:8000"),
        ] {
            assert_eq!(Target::parse(written).unwrap().authority, meant);
        }
        for wrong in ["ftp://h", "https://h", "http://", "http://h/x", ""] {
            assert!(Target::parse(wrong).is_err(), "{wrong}");
        }
    }
}
