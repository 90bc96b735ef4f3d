//! The one binary of Baton: a subcommand per role, and the tools around them.
//!
//! Each subcommand is one file. Here are only the table of them, the logging they share and the rule by which an
//! error ends the process: one sentence on standard error, exit status 1.
#![deny(unsafe_code)]
#![warn(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::disallowed_methods
)]

mod allocator;
mod api_client;
mod api_key;
mod api_server;
mod bench;
mod bus_args;
mod chat;
mod deployment;
mod descriptors;
mod drain;
mod habits;
mod libraries;
mod logging;
mod model_prep;
mod model_source;
mod own_name;
mod plan;
mod render;
mod screen;
mod self_check;
mod served;
mod shell;
mod shutdown;
mod sse;
mod status;
mod systemd;
mod table;
mod tether;
mod top;
mod trace_args;
mod tuning;
mod up;
mod worker;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::logging::LogFormat;

/// Serves large language models with prefill and decode on separate workers.
#[derive(Parser, Debug)]
#[command(
    name = "baton",
    version,
    propagate_version = true,
    after_help = "Begin with: baton self-check; baton up MODEL; and in another terminal baton chat",
    max_term_width = 100
)]
struct Cli {
    /// How log lines are written (what is logged: RUST_LOG, default `info`)
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text, env = "BATON_LOG_FORMAT")]
    log_format: LogFormat,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Start a whole cluster on this machine: NATS, an API server, context and decode workers
    Up(Box<up::UpArgs>),
    /// Write a deployment as a Slurm script, for Kubernetes or for Compose
    Render(render::RenderArgs),
    /// Serve the OpenAI-compatible HTTP API
    ApiServer(api_server::ApiServerArgs),
    /// Run a worker that computes prompts and stages their KV
    ContextWorker(worker::WorkerArgs),
    /// Run a worker that pulls KV and generates
    DecodeWorker(worker::WorkerArgs),
    /// Run a worker of any role
    Worker(worker::RoleWorkerArgs),
    /// Make a model directory from a Hugging Face name, a directory or a GGUF file
    ModelPrep(model_prep::ModelPrepArgs),
    /// Show the workers of a running cluster
    Status(status::StatusArgs),
    /// Show the requests under way at an API server
    Top(top::TopArgs),
    /// Ask a worker to finish what it has and leave
    Drain(drain::DrainArgs),
    /// Talk to a running cluster
    Chat(chat::ChatArgs),
    /// Load a running cluster and measure it
    Bench(bench::BenchArgs),
    /// Predict which mix of workers keeps a service level, from what a worker measured of itself
    Plan(Box<plan::PlanArgs>),
    /// Show which of the libraries that are loaded at run time this machine has
    Libraries(libraries::LibrariesArgs),
    /// Look at this machine: what it has to serve with, and what that means
    SelfCheck(self_check::SelfCheckArgs),
    /// Print completions for a shell
    Completions(shell::CompletionsArgs),
    /// Write manual pages
    Man(shell::ManArgs),
    /// Say what to type instead
    #[command(hide = true)]
    Serve(habits::ServeArgs),
    /// Become PROGRAM, but die with the process that started this one
    #[command(hide = true)]
    Tether(tether::TetherArgs),
}

/// What a subcommand ends with when it fails: a sentence for the person who ran it.
type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> ExitCode {
    let cli = Cli::try_parse().unwrap_or_else(|error| habits::with_tip(error).exit());
    // Until the end of this function: what still waits is written then.
    let _session = logging::start(cli.log_format);
    descriptors::allow_all();
    let outcome = match cli.command {
        Command::Up(args) => up::run(*args, cli.log_format),
        Command::Render(args) => render::run(args),
        Command::ApiServer(args) => api_server::run(args),
        Command::ContextWorker(args) => worker::run(args, baton_protocol::Role::Context),
        Command::DecodeWorker(args) => worker::run(args, baton_protocol::Role::Decode),
        Command::Worker(args) => worker::run_role(args),
        Command::ModelPrep(args) => model_prep::run(args),
        Command::Status(args) => status::run(args),
        Command::Top(args) => top::run(args),
        Command::Drain(args) => drain::run(args),
        Command::Chat(args) => chat::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Plan(args) => plan::run(*args),
        Command::Libraries(args) => libraries::run(args),
        Command::SelfCheck(args) => self_check::run(args),
        Command::Completions(args) => shell::completions(args, Cli::command()),
        Command::Man(args) => shell::man(args, Cli::command()),
        Command::Serve(args) => habits::serve(args),
        Command::Tether(args) => tether::run(args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            baton_logs::line(&format!("baton: {failure}"));
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
