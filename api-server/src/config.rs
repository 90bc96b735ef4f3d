//! What an API server is told at start.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::time::Duration;

use baton_bus::BusConfig;
use baton_chat_formats::{Format, Reasoning};
use baton_protocol::deadlines::REQUEST_BUDGET_MS;
use baton_protocol::subjects::Cluster;
use baton_protocol::{ApiServerId, ProtocolError};
use baton_traces::Tracer;
use tokio::sync::oneshot;

use crate::cors::Origins;
use crate::keys::ApiKeys;
use crate::service::Promises;
use crate::tls::TlsFiles;

/// A socket that listened before this process did.
pub struct Inherited {
    /// It listens.
    pub socket: TcpListener,
    /// Another process keeps it: at the end it is left as it is, and connections that come meanwhile wait for the next server.
    pub is_kept: bool,
}

/// Settings of one API server.
pub struct ApiServerConfig {
    /// Its name on the bus; one of its own in the cluster.
    pub name: ApiServerId,
    /// Another process may have that name, or have had it a moment ago: this one listens before it serves.
    pub name_is_shared: bool,
    /// The cluster it serves.
    pub cluster: Cluster,
    /// How to reach the NATS server.
    pub bus: BusConfig,
    /// Names under which clients ask for the model; with none it is the manifest's. Answers have the first.
    pub model_names: Vec<String>,
    /// Most tokens of an answer where a request does not say: chats and responses. `None`: as many as the model has room for.
    pub default_max_tokens: Option<u32>,
    /// A prepared model directory: manifest, tokenizer, chat template and generation defaults.
    pub tokenizer: PathBuf,
    /// How the model writes tool calls; `None` takes what the model directory tells.
    pub tool_format: Option<Format>,
    /// How the model writes reasoning; `None` takes what the model directory tells.
    pub reasoning_format: Option<Reasoning>,
    /// What becomes of texts of control tokens in messages.
    pub special_tokens_in_content: SpecialTokensInContent,
    /// Where defaults of sampling come from.
    pub generation_config: GenerationConfig,
    /// Address to listen on.
    pub host: String,
    /// Port to listen on; 0 picks a free one.
    pub port: u16,
    /// A socket that listens already, instead of host and port.
    pub listener: Option<Inherited>,
    /// Certificates, for HTTPS; `None` serves HTTP.
    pub tls: Option<TlsFiles>,
    /// Time a request may take from its arrival to its last token.
    pub request_budget: Duration,
    /// What requests are promised.
    pub promises: Promises,
    /// Who makes spans of requests; nobody where nothing is said.
    pub tracer: Tracer,
    /// Bounds on what clients may ask for.
    pub limits: Limits,
    /// Keys that clients must have; with none everybody is served.
    pub api_keys: ApiKeys,
    /// Whose pages may ask from a browser.
    pub origins: Origins,
    /// Told the bound address once requests are served.
    pub on_ready: Option<oneshot::Sender<SocketAddr>>,
}

impl ApiServerConfig {
    /// A configuration with defaults: cluster `baton`, local NATS, 127.0.0.1:8000.
    ///
    /// # Errors
    /// [`ProtocolError::Name`] for a name that cannot be a subject token.
    pub fn new(
        name: impl Into<String>,
        cluster: impl Into<String>,
        tokenizer: impl Into<PathBuf>,
    ) -> Result<Self, ProtocolError> {
        Ok(Self {
            name: ApiServerId::new(name)?,
            name_is_shared: false,
            cluster: Cluster::new(cluster)?,
            bus: BusConfig::default(),
            model_names: Vec::new(),
            default_max_tokens: None,
            tokenizer: tokenizer.into(),
            tool_format: None,
            reasoning_format: None,
            special_tokens_in_content: SpecialTokensInContent::default(),
            generation_config: GenerationConfig::default(),
            host: "127.0.0.1".to_owned(),
            port: 8000,
            listener: None,
            tls: None,
            request_budget: Duration::from_millis(u64::from(REQUEST_BUDGET_MS)),
            promises: Promises::default(),
            tracer: Tracer::off(),
            limits: Limits::default(),
            api_keys: ApiKeys::default(),
            origins: Origins::default(),
            on_ready: None,
        })
    }
}

/// What becomes of a text such as `<|im_end|>` in a message of a chat.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SpecialTokensInContent {
    /// It is text: the model reads it in ordinary tokens, and it ends or begins no turn.
    #[default]
    Plain,
    /// It becomes the control token, as in Transformers: whoever writes messages may write turns.
    Allow,
}

/// Where temperature, nucleus and the like come from if a request says nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GenerationConfig {
    /// The model's `generation_config.json`; OpenAI's where it says nothing.
    #[default]
    Model,
    /// OpenAI's: temperature 1, and no truncation.
    None,
}

/// Bounds on what clients may ask for.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Largest request body.
    pub body_bytes_max: usize,
    /// All request bodies that are being read or made into tokens, without the first 16 KiB of each; more are answered 429.
    pub bodies_bytes_max: usize,
    /// Generations (choices) in flight; more are answered 429.
    pub in_flight_max: usize,
    /// Most choices of one request: `n`, times the number of prompts.
    pub choices_max: usize,
    /// Most stop strings of one request.
    pub stops_max: usize,
    /// HTTP threads. One carries tens of thousands of tokens a second.
    pub http_threads: usize,
    /// Threads that parse, render and tokenise large requests.
    pub text_threads: usize,
    /// Largest answer that is not a stream, as estimated before it is begun.
    pub answer_bytes_max: usize,
    /// What answers that are not streams may hold together while they are generated and sent; more are answered 429.
    pub answers_bytes_max: usize,
    /// What responses that are kept may hold; 0 keeps none.
    pub responses_bytes_max: usize,
    /// A client that leaves its stream full for this long is given up.
    pub reader_stall: Duration,
    /// A connection that takes not one byte for this long is closed, whatever it was to carry.
    pub connection_stall: Duration,
    /// A request body of which nothing comes for this long is given up.
    pub body_stall: Duration,
    /// Time that requests in flight get to finish at shutdown.
    pub drain: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            body_bytes_max: 16 << 20,
            bodies_bytes_max: 256 << 20,
            in_flight_max: 4096,
            choices_max: 128,
            stops_max: 16,
            http_threads: (cores / 4).clamp(1, 8),
            text_threads: (cores / 4).clamp(1, 4),
            // One choice of 131,072 tokens with 20 alternatives each, or 128 choices of as many tokens without.
            answer_bytes_max: 256 << 20,
            answers_bytes_max: 512 << 20,
            responses_bytes_max: 256 << 20,
            // A page in the background or a proxy may pause for seconds; whoever lets 64 KiB and all
            // buffers on the way lie for half a minute has gone.
            reader_stall: Duration::from_secs(30),
            // Later than the above, so that whoever reads again finds the reason in the stream.
            connection_stall: Duration::from_secs(60),
            body_stall: Duration::from_secs(15),
            drain: Duration::from_secs(10),
        }
    }
}
