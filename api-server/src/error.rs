//! Everything a client can be told went wrong, and the one table that says how.

use std::fmt;

/// Kind of an error. [`ErrorKind::row`] holds status, code, retryability and metric label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The request is not what the API takes.
    InvalidRequest,
    /// Prompt and output do not fit the model.
    ContextLength,
    /// The HTTP body is over the bound.
    BodyTooLarge,
    /// The HTTP body is not JSON, or in a coding that is not known.
    MediaType,
    /// The HTTP body stopped coming.
    BodyStalled,
    /// The prompt does not fit one message on the bus.
    JobTooLarge,
    /// What is asked for makes a message that the bus does not carry.
    AnswerTooLarge,
    /// No API key, or an unknown one.
    Unauthorized,
    /// Nobody may, as this API server was started.
    Forbidden,
    /// No such model.
    UnknownModel,
    /// No such response is kept.
    UnknownResponse,
    /// No such path.
    UnknownPath,
    /// The path takes another method.
    Method,
    /// This API server has its bound of requests in flight.
    TooManyRequests,
    /// Every worker refused for want of room.
    Busy,
    /// No worker is there to do it.
    NoWorker,
    /// The bus is not connected.
    Bus,
    /// This API server is asked to end, and has no more time for the request.
    Leaving,
    /// The request's time ran out.
    Deadline,
    /// Workers failed, and so did the retries.
    Worker,
    /// The model gave no finite logit, so there is no next token.
    NoToken,
    /// A defect of this server.
    Internal,
    /// The client left; nobody reads the answer.
    ClientLeft,
}

/// Whose form errors have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// OpenAI's.
    OpenAi,
    /// Anthropic's.
    Anthropic,
}

impl Dialect {
    /// That of a path.
    pub fn of(path: &str) -> Self {
        match path == "/v1/messages" || path.starts_with("/v1/messages/") {
            true => Self::Anthropic,
            false => Self::OpenAi,
        }
    }
}

/// One row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// HTTP status.
    pub status: u16,
    /// OpenAI's `type`.
    pub kind: &'static str,
    /// OpenAI's `code`.
    pub code: Option<&'static str>,
    /// Whether the same request may succeed later.
    pub retryable: bool,
    /// Metric label.
    pub label: &'static str,
}

impl ErrorKind {
    /// All kinds, for metrics and tests.
    pub const ALL: [Self; 23] = [
        Self::InvalidRequest,
        Self::ContextLength,
        Self::BodyTooLarge,
        Self::MediaType,
        Self::BodyStalled,
        Self::JobTooLarge,
        Self::AnswerTooLarge,
        Self::Unauthorized,
        Self::Forbidden,
        Self::UnknownModel,
        Self::UnknownResponse,
        Self::UnknownPath,
        Self::Method,
        Self::TooManyRequests,
        Self::Busy,
        Self::NoWorker,
        Self::Bus,
        Self::Leaving,
        Self::Deadline,
        Self::Worker,
        Self::NoToken,
        Self::Internal,
        Self::ClientLeft,
    ];

    /// The table.
    pub const fn row(self) -> Row {
        const BAD: &str = "invalid_request_error";
        const OVERLOAD: &str = "overloaded_error";
        const SERVER: &str = "server_error";
        let (status, kind, code, retryable, label) = match self {
            Self::InvalidRequest => (400, BAD, None, false, "invalid_request"),
            Self::ContextLength => (
                400,
                BAD,
                Some("context_length_exceeded"),
                false,
                "context_length",
            ),
            Self::BodyTooLarge => (413, BAD, Some("body_too_large"), false, "body_too_large"),
            Self::MediaType => (
                415,
                BAD,
                Some("unsupported_media_type"),
                false,
                "media_type",
            ),
            Self::BodyStalled => (408, BAD, Some("body_stalled"), false, "body_stalled"),
            Self::JobTooLarge => (413, BAD, Some("prompt_too_large"), false, "job_too_large"),
            Self::AnswerTooLarge => (
                400,
                BAD,
                Some("answer_too_large"),
                false,
                "answer_too_large",
            ),
            Self::Unauthorized => (401, BAD, Some("invalid_api_key"), false, "unauthorized"),
            Self::Forbidden => (403, BAD, Some("forbidden"), false, "forbidden"),
            Self::UnknownModel => (404, BAD, Some("model_not_found"), false, "unknown_model"),
            Self::UnknownResponse => (
                404,
                BAD,
                Some("response_not_found"),
                false,
                "unknown_response",
            ),
            Self::UnknownPath => (404, BAD, Some("not_found"), false, "unknown_path"),
            Self::Method => (405, BAD, Some("method_not_allowed"), false, "method"),
            Self::TooManyRequests => (
                429,
                OVERLOAD,
                Some("too_many_requests"),
                true,
                "too_many_requests",
            ),
            Self::Busy => (503, OVERLOAD, Some("busy"), true, "busy"),
            Self::NoWorker => (503, SERVER, Some("no_worker"), true, "no_worker"),
            Self::Bus => (503, SERVER, Some("bus_unavailable"), true, "bus"),
            Self::Leaving => (503, SERVER, Some("leaving"), true, "leaving"),
            Self::Deadline => (504, SERVER, Some("deadline_exceeded"), true, "deadline"),
            Self::Worker => (502, SERVER, Some("worker_failed"), true, "worker"),
            Self::NoToken => (500, SERVER, Some("no_token"), false, "no_token"),
            Self::Internal => (500, SERVER, Some("internal_error"), false, "internal"),
            Self::ClientLeft => (499, SERVER, Some("client_left"), false, "client_left"),
        };
        Row {
            status,
            kind,
            code,
            retryable,
            label,
        }
    }
}

/// Longest message that a client is told.
const MESSAGE_CHARS_MAX: usize = 1_000;

/// An error on its way to a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// Kind.
    pub kind: ErrorKind,
    /// What is wrong and what to do, as a sentence.
    pub message: String,
    /// The request's parameter at fault.
    pub param: Option<String>,
    /// When it may be worth asking again.
    pub retry_after_ms: Option<u32>,
}

impl ApiError {
    /// An error of this kind.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        let retry_after_ms = kind.row().retryable.then_some(1_000);
        let mut message = message.into();
        // It may quote the client, a template or a worker.
        if let Some((end, _)) = message.char_indices().nth(MESSAGE_CHARS_MAX) {
            message.truncate(end);
            message.push('…');
        }
        Self {
            kind,
            message,
            param: None,
            retry_after_ms,
        }
    }

    /// A parameter with a wrong value.
    pub fn param(param: impl Into<String>, message: impl Into<String>) -> Self {
        let param = Some(param.into());
        Self {
            param,
            ..Self::new(ErrorKind::InvalidRequest, message)
        }
    }

    /// The same with another time to wait.
    #[must_use]
    pub fn retry_after(mut self, ms: u32) -> Self {
        self.retry_after_ms = Some(ms);
        self
    }

    /// The body in this dialect.
    pub fn body_in(&self, dialect: Dialect) -> String {
        match dialect {
            Dialect::OpenAi => self.body(),
            Dialect::Anthropic => self.anthropic_body(None),
        }
    }

    /// Anthropic's error body, with the request's name, if it is known.
    pub fn anthropic_body(&self, request: Option<&str>) -> String {
        let message = match self.kind {
            // By these words agents know that they have to make their chat shorter.
            ErrorKind::ContextLength => format!("prompt is too long: {}", self.message),
            _ => self.message.clone(),
        };
        let error = serde_json::json!({"type": self.anthropic(), "message": message});
        let mut body = serde_json::json!({"type": "error", "error": error});
        if let Some(request) = request {
            body["request_id"] = request.into();
        }
        body.to_string()
    }

    /// Anthropic's `type`.
    fn anthropic(&self) -> &'static str {
        match self.kind.row().status {
            401 => "authentication_error",
            404 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            400..=499 => "invalid_request_error",
            503 => "overloaded_error",
            504 => "timeout_error",
            _ => "api_error",
        }
    }

    /// OpenAI's error body.
    pub fn body(&self) -> String {
        let row = self.kind.row();
        serde_json::json!({"error": {
            "message": self.message,
            "type": row.kind,
            "param": self.param,
            "code": row.code,
        }})
        .to_string()
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ApiError {}

/// Why the API server could not start or had to stop.
#[derive(Debug)]
pub enum ApiServerError {
    /// The model directory cannot be used.
    Model(String),
    /// The bus cannot be reached.
    Bus(String),
    /// The address cannot be listened on.
    Listen(String),
    /// The operating system gives no random numbers.
    System(String),
    /// The HTTP server failed.
    Http(String),
}

impl fmt::Display for ApiServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Model(text)
            | Self::Bus(text)
            | Self::Listen(text)
            | Self::System(text)
            | Self::Http(text) => f.write_str(text),
        }
    }
}

impl std::error::Error for ApiServerError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_unique_and_only_overload_and_failures_are_retryable() {
        let mut labels: Vec<_> = ErrorKind::ALL.iter().map(|kind| kind.row().label).collect();
        labels.sort_unstable();
        labels.dedup();
        assert_eq!(labels.len(), ErrorKind::ALL.len());
        for kind in ErrorKind::ALL {
            let row = kind.row();
            assert_eq!(
                row.retryable,
                row.status == 429 || row.status > 501,
                "{kind:?}"
            );
        }
    }

    #[test]
    fn a_message_that_quotes_a_whole_body_is_cut() {
        let error = ApiError::param("response_format", "é".repeat(1 << 20));
        assert_eq!(error.message.chars().count(), MESSAGE_CHARS_MAX + 1);
        assert!(error.message.ends_with("é…"));
        let fits = "é".repeat(MESSAGE_CHARS_MAX);
        assert_eq!(ApiError::param("n", fits.as_str()).message, fits);
    }

    #[test]
    fn the_body_has_openais_shape() {
        let body = ApiError::param("n", "n must be at least 1").body();
        let value: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(value["error"]["param"], "n");
        assert_eq!(value["error"]["type"], "invalid_request_error");
        assert!(value["error"]["code"].is_null());
    }
}
