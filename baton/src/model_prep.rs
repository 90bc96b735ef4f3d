//! `baton model-prep`: from a model's source to a directory that workers can serve.

use std::io::Write;
use std::path::PathBuf;

use baton_model_prep::{Outcome, Precision, PrepareOptions, PrepareReport, prepare};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use crate::Failure;

#[derive(Args, Debug)]
pub struct ModelPrepArgs {
    /// A friendly name, a Hugging Face name (owner/model), a directory from there, or a GGUF file
    #[arg(long)]
    model: String,
    /// Directory to make
    #[arg(long)]
    out: PathBuf,
    /// Name to serve the model under [default: the source's]
    #[arg(long)]
    model_name: Option<String>,
    /// Ranks to divide the weights over
    #[arg(long, default_value_t = 1)]
    tp_size: usize,
    /// Longest sequence to serve, in tokens [default: the model's own limit]
    #[arg(long)]
    max_num_tokens: Option<usize>,
    /// Most sequences to serve at once [default: left to the worker]
    #[arg(long)]
    max_batch_size: Option<usize>,
    /// Precision of the layers' matrices: fp8 makes e4m3 with a scale for each output channel, bf16 dequantizes
    /// [default: as the source has them]
    #[arg(long, value_enum)]
    dtype: Option<Dtype>,
    /// Check the source and say what would be made; write nothing
    #[arg(long)]
    dry_run: bool,
    /// Replace a model that is there already
    #[arg(long)]
    force: bool,
    /// Print JSON: outcome, path, fingerprint, sizes
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Dtype {
    Bf16,
    Fp8,
}

/// Prepares and says on standard output what was made.
pub fn run(args: ModelPrepArgs) -> Result<(), Failure> {
    let report = prepare(PrepareOptions {
        source: args.model,
        out: args.out,
        name: args.model_name,
        tp_size: args.tp_size,
        tokens_max: args.max_num_tokens,
        batch_max: args.max_batch_size,
        dtype: args.dtype.map(|dtype| match dtype {
            Dtype::Bf16 => Precision::Bf16,
            Dtype::Fp8 => Precision::Fp8,
        }),
        dry_run: args.dry_run,
        force: args.force,
    })?;
    if args.json {
        return Ok(writeln!(std::io::stdout(), "{:#}", to_json(&report))?);
    }
    let outcome = match report.outcome {
        Outcome::Planned => "planned; nothing was written",
        Outcome::Written => "written",
        Outcome::AlreadyThere => "there already, and the same",
    };
    writeln!(std::io::stdout(), "{}\n{outcome}", report.plan)?;
    Ok(())
}

/// As scripts read it. A dry run knows no fingerprint and makes no files.
fn to_json(report: &PrepareReport) -> Value {
    let PrepareReport {
        outcome,
        plan,
        manifest,
    } = report;
    let outcome = match outcome {
        Outcome::Planned => "planned",
        Outcome::Written => "written",
        Outcome::AlreadyThere => "already_there",
    };
    let manifest = manifest.as_ref();
    let files = manifest.map(|manifest| {
        let files = manifest.files.iter();
        let files = files.map(|file| json!({"name": file.name, "bytes": file.bytes}));
        files.collect::<Vec<_>>()
    });
    json!({
        "outcome": outcome,
        "path": plan.out,
        "name": plan.name,
        "source": plan.source,
        "fingerprint": manifest.map(|manifest| &manifest.fingerprint),
        "dtype": plan.dtype.to_string(),
        "tensors": plan.tensors,
        "parameters": plan.parameters,
        "tp_size": plan.tp_size,
        "rank_bytes": plan.rank_bytes,
        "tokens_max": plan.tokens_max,
        "batch_max": plan.batch_max,
        "vocab": plan.vocab,
        "eos_token_ids": plan.eos_token_ids,
        "files": files,
    })
}
