//! `baton api-server`: the OpenAI-compatible HTTP API in front of a cluster.

use std::path::PathBuf;
use std::time::Duration;

use baton_api_server::{
    ApiKeys, ApiServerConfig, Format, GenerationConfig, Origins, Overload, Promises, Reasoning,
    ServiceLevel, SpecialTokensInContent, TlsFiles,
};
use clap::{Args, ValueEnum};
use tokio::sync::oneshot;

use crate::Failure;
use crate::bus_args::BusArgs;
use crate::own_name::own_name;
use crate::shutdown::{END_WAIT, Shutdown};
use crate::systemd::{ServiceManager, inherited_listener};
use crate::trace_args::{self, OtlpArgs, SampleArgs};

#[derive(Args, Debug)]
pub struct ApiServerArgs {
    #[command(flatten)]
    bus: BusArgs,
    /// Name of the cluster to serve
    #[arg(long, default_value = "baton")]
    cluster: String,
    /// Name of this API server, its own in the cluster [default: host, process id and a random number]
    #[arg(long)]
    api_server_name: Option<String>,
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    api_server_host: String,
    /// Port to listen on; 0 takes a free one
    #[arg(long, default_value_t = 8000)]
    api_server_port: u16,
    /// Name that clients ask for [default: the model's own]; given several times the model has several, and answers have the first
    #[arg(long)]
    model_name: Vec<String>,
    /// Model directory, for its tokenizer, chat template and limits; weights are not read
    #[arg(long)]
    tokenizer: PathBuf,
    /// Time a request may take from its arrival to its last token, in seconds [default: 600]
    #[arg(long)]
    request_budget_s: Option<u64>,
    #[command(flatten)]
    promises: PromiseArgs,
    /// Mean time between tokens that is promised, in milliseconds [default: none]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    itl_ms: Option<u32>,
    #[command(flatten)]
    keys: ApiKeysArgs,
    #[command(flatten)]
    tls: TlsArgs,
    #[command(flatten)]
    content: ContentArgs,
    #[command(flatten)]
    answers: AnswerArgs,
    #[command(flatten)]
    otlp: OtlpArgs,
    #[command(flatten)]
    sample: SampleArgs,
    /// Most answers under way; more are told to come back (429) [default: 4096]
    #[arg(long)]
    in_flight_max: Option<usize>,
    /// Threads that serve HTTP [default: one for each four CPUs, 8 at most]
    #[arg(long)]
    http_threads: Option<usize>,
    /// Time for requests under way to finish at the end, in seconds [default: 10]
    #[arg(long)]
    drain_s: Option<u64>,
}

/// What requests are promised, and what becomes of those for which it cannot be kept.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct PromiseArgs {
    /// Time to the first token that is promised, in milliseconds: requests that would come later because of others before them are
    /// refused at once [default: none]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub ttft_ms: Option<u32>,
    /// What becomes of a request whose first token would come later than promised: it is refused with 503, or served as batch
    #[arg(long, value_enum, default_value_t)]
    pub overload: OverloadRule,
}

/// A value of `--overload`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum OverloadRule {
    /// Refused
    #[default]
    Refuse,
    /// Served as batch
    Batch,
}

impl OverloadRule {
    /// How it is written on a command line.
    pub fn label(self) -> &'static str {
        match self {
            Self::Refuse => "refuse",
            Self::Batch => "batch",
        }
    }
}

impl From<OverloadRule> for Overload {
    fn from(rule: OverloadRule) -> Self {
        match rule {
            OverloadRule::Refuse => Self::Refuse,
            OverloadRule::Batch => Self::Batch,
        }
    }
}

/// What messages may contain, and how the model writes what is no plain text.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct ContentArgs {
    /// What a text such as <|im_end|> in a message of a chat is: plain text, or, where all who write messages are trusted,
    /// allowed to be the control token
    #[arg(long, value_enum, default_value_t)]
    pub special_tokens_in_content: ContentRule,
    /// How the model writes tool calls: none, hermes, qwen-xml, llama-json, pythonic, mistral, mistral-args, deepseek-v3,
    /// deepseek-v31, kimi, harmony or json [default: as its chat template tells]
    #[arg(long)]
    pub tool_format: Option<Format>,
    /// How the model writes reasoning: none, think, think-opened, mistral, mistral-opened or harmony [default: as its chat
    /// template tells]
    #[arg(long)]
    pub reasoning_format: Option<Reasoning>,
}

/// A value of `--special-tokens-in-content`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ContentRule {
    /// Text
    #[default]
    Plain,
    /// The control token
    Allow,
}

impl ContentRule {
    /// How it is written on a command line.
    pub fn label(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Allow => "allow",
        }
    }
}

impl From<ContentRule> for SpecialTokensInContent {
    fn from(rule: ContentRule) -> Self {
        match rule {
            ContentRule::Plain => Self::Plain,
            ContentRule::Allow => Self::Allow,
        }
    }
}

/// What answers are like where requests say nothing, and which pages may read them.
#[derive(Args, Clone, Debug, Default)]
pub struct AnswerArgs {
    /// Where temperature, top_p, top_k, min_p and repetition_penalty come from if a request does not name them: the model's
    /// generation_config.json, or nowhere, which leaves OpenAI's (temperature 1)
    #[arg(long, value_enum, default_value_t)]
    pub generation_config: DefaultsFrom,
    /// Most tokens of an answer if a chat or a response does not name `max_tokens` or the like [default: as many as the model has
    /// room for]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    pub default_max_tokens: Option<u32>,
    /// Origin of web pages that may ask from a browser, as https://host:port, or * for all; may be given several times
    /// [default: none]
    #[arg(long, value_name = "ORIGIN")]
    pub cors_origin: Vec<String>,
    /// Memory for responses that are kept (/v1/responses), in MiB; 0 keeps none [default: 256]
    #[arg(long)]
    pub response_store_mib: Option<usize>,
}

/// A value of `--generation-config`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum DefaultsFrom {
    /// The model
    #[default]
    Model,
    /// Nowhere
    None,
}

impl DefaultsFrom {
    /// How it is written on a command line.
    pub fn label(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::None => "none",
        }
    }
}

impl From<DefaultsFrom> for GenerationConfig {
    fn from(from: DefaultsFrom) -> Self {
        match from {
            DefaultsFrom::Model => Self::Model,
            DefaultsFrom::None => Self::None,
        }
    }
}

/// Who may ask.
#[derive(Args, Clone, Debug, Default)]
pub struct ApiKeysArgs {
    /// File of the API keys that clients must have, one a line: KEY or NAME KEY; BATON_API_KEYS holds keys themselves,
    /// divided by commas. Without either everybody is served
    #[arg(long, env = "BATON_API_KEYS_FILE")]
    pub api_keys_file: Option<PathBuf>,
    /// Most answers under way for one API key; more are told to come back (429)
    #[arg(long)]
    pub api_key_in_flight_max: Option<usize>,
}

impl ApiKeysArgs {
    fn keys(&self) -> Result<ApiKeys, Failure> {
        let given = std::env::var("BATON_API_KEYS")
            .ok()
            .filter(|keys| !keys.is_empty());
        let keys = match (&self.api_keys_file, given) {
            (Some(_), Some(_)) => {
                return Err(
                    "both --api-keys-file and BATON_API_KEYS are given: which of them holds?"
                        .into(),
                );
            }
            (Some(file), None) => ApiKeys::read(file)?,
            (None, Some(keys)) => ApiKeys::parse(&keys.replace(',', "\n"))
                .map_err(|error| format!("BATON_API_KEYS: {error}"))?,
            (None, None) if self.api_key_in_flight_max.is_some() => {
                return Err("--api-key-in-flight-max needs API keys: --api-keys-file".into());
            }
            (None, None) => ApiKeys::default(),
        };
        Ok(keys.with_in_flight_max(self.api_key_in_flight_max))
    }
}

/// HTTPS.
#[derive(Args, Clone, Debug, Default)]
pub struct TlsArgs {
    /// Certificate for HTTPS and those between it and its authority (PEM); read again when it changes [default: plain HTTP]
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// Its key (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Certificates (PEM) that clients' must come from; without one a client gets no more than /health, /live, /ping and /metrics
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_client_ca: Option<PathBuf>,
}

impl TlsArgs {
    fn files(&self) -> Option<TlsFiles> {
        let (certificate, key) = self.tls_cert.clone().zip(self.tls_key.clone())?;
        Some(TlsFiles {
            certificate,
            key,
            client_ca: self.tls_client_ca.clone(),
        })
    }
}

impl ApiServerArgs {
    /// Whether an API server would take these values, before it looks at files.
    ///
    /// # Errors
    /// What it would refuse.
    pub fn check_values(&self) -> Result<(), Failure> {
        origins(&self.answers).map(|_| ())
    }

    /// Whether the files that it names can be used here, but for the model directory.
    ///
    /// # Errors
    /// The first that cannot, and why.
    pub fn check_files(&self) -> Result<(), Failure> {
        self.keys.keys()?;
        if let Some(files) = self.tls.files() {
            files.check()?;
        }
        Ok(self.bus.clone().config().check()?)
    }
}

fn origins(answers: &AnswerArgs) -> Result<Origins, Failure> {
    let origins = answers.cors_origin.iter().map(String::as_str);
    Ok(Origins::parse(origins).map_err(|error| format!("--cors-origin: {error}"))?)
}

/// Serves until a signal comes and requests under way have finished.
pub fn run(args: ApiServerArgs) -> Result<(), Failure> {
    let manager = ServiceManager::from_env();
    let (otlp, sample) = (args.otlp.clone(), args.sample);
    let mut config = config(args)?;
    let named = (config.name.as_str(), config.cluster.name());
    let (tracer, exporter) = trace_args::start(&otlp, sample, "baton-api-server", named)?;
    config.tracer = tracer;
    config.listener = inherited_listener()?;
    let (ready, is_ready) = oneshot::channel();
    config.on_ready = Some(ready);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    let outcome = runtime.block_on(async {
        let mut shutdown = Shutdown::catch()?;
        tokio::spawn(manager.clone().show_life());
        let tells = manager.clone();
        tokio::spawn(async move {
            if let Ok(address) = is_ready.await {
                tells.ready(&format!("serving at {address}"));
            }
        });
        let stop = async move {
            let signal = shutdown.requested().await;
            manager.stopping();
            tracing::info!("{signal}: finishing what is under way");
        };
        let ended = baton_api_server::run(config, stop).await;
        baton_watchdog::end_within(END_WAIT);
        Ok(ended?)
    });
    // A thread that still loads a tokenizer is not waited for.
    runtime.shutdown_background();
    drop(exporter);
    outcome
}

fn config(args: ApiServerArgs) -> Result<ApiServerConfig, Failure> {
    let name_is_shared = args.api_server_name.is_some();
    let name = match args.api_server_name {
        Some(name) => name,
        None => own_name("api")?,
    };
    let mut config = ApiServerConfig::new(name, args.cluster, args.tokenizer)?;
    config.name_is_shared = name_is_shared;
    config.bus = args.bus.config();
    config.model_names = args.model_name;
    config.default_max_tokens = args.answers.default_max_tokens;
    config.api_keys = args.keys.keys()?;
    config.tls = args.tls.files();
    config.tool_format = args.content.tool_format;
    config.reasoning_format = args.content.reasoning_format;
    config.special_tokens_in_content = args.content.special_tokens_in_content.into();
    config.generation_config = args.answers.generation_config.into();
    if let Some(mib) = args.answers.response_store_mib {
        config.limits.responses_bytes_max = mib << 20;
    }
    config.origins = origins(&args.answers)?;
    config.promises = Promises {
        level: ServiceLevel {
            ttft_ms: args.promises.ttft_ms,
            itl_ms: args.itl_ms,
        },
        overload: args.promises.overload.into(),
    };
    config.host = args.api_server_host;
    config.port = args.api_server_port;
    if let Some(seconds) = args.request_budget_s {
        config.request_budget = Duration::from_secs(seconds);
    }
    let limits = &mut config.limits;
    limits.in_flight_max = args.in_flight_max.unwrap_or(limits.in_flight_max);
    limits.http_threads = args.http_threads.unwrap_or(limits.http_threads).max(1);
    if let Some(seconds) = args.drain_s {
        limits.drain = Duration::from_secs(seconds);
    }
    Ok(config)
}
