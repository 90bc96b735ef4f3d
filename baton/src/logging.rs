//! Logs go to standard error, so that standard output stays for what a subcommand is asked for.

use clap::ValueEnum;

/// How log lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

impl LogFormat {
    /// The name of the format as the command line takes it.
    pub fn label(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Json => "json",
        }
    }
}

/// What is logged where nothing is said. Two libraries tell of each connection and thread, one of each request that is no HTTP
/// (they are counted), and Baton tells what matters.
const DEFAULT: &str = "info,async_nats=warn,actix_server=warn,actix_http=off";

/// Starts logging for this process, until its end. `RUST_LOG` chooses what is logged.
pub fn start(format: LogFormat) -> baton_logs::Session {
    baton_logs::start(format == LogFormat::Json, DEFAULT)
}
