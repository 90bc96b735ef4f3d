//! The steps of a run: open the source, check all of it, plan, write, publish.

use std::fs;

use baton_model::{
    FingerprintHasher, MANIFEST, MANIFEST_FORMAT, Manifest, ModelDir, ModelSpec, TOKENIZER,
    TensorSpec, WeightFormat, check_tp_size, expected_tensors, hex, stored_tensors,
};
use indicatif::{ProgressBar, ProgressStyle};

use crate::checkpoint::Checkpoint;
use crate::error::PrepError;
use crate::hub::Want;
use crate::options::{Outcome, Plan, Precision, PrepareOptions, PrepareReport};
use crate::stage::Stage;
use crate::{card, source, writer};

/// Make a model directory. Progress goes to standard error if that is a terminal.
pub fn prepare(options: PrepareOptions) -> Result<PrepareReport, PrepError> {
    let want = match options.dry_run {
        true => Want::Plan,
        false => Want::Everything,
    };
    let mut checkpoint = source::open(&options.source, want)?;
    let sampling_from = card::complete(&mut checkpoint);
    let tensors = expected_tensors(&checkpoint.spec);
    let plan = Plan {
        sampling_from,
        ..plan(&options, &checkpoint, &tensors)?
    };
    let kept = checkpoint.format.is_fp8() && plan.dtype.is_fp8();
    for tensor in &tensors {
        checkpoint
            .weights
            .check(tensor, kept.then_some(plan.dtype))?;
    }
    if options.dry_run {
        return Ok(PrepareReport {
            outcome: Outcome::Planned,
            plan,
            manifest: None,
        });
    }
    if let Some(manifest) = check_output(&options, &checkpoint, &plan, &tensors)? {
        return Ok(PrepareReport {
            outcome: Outcome::AlreadyThere,
            plan,
            manifest: Some(manifest),
        });
    }
    let manifest = write(&options, &checkpoint, &plan, &tensors)?;
    Ok(PrepareReport {
        outcome: Outcome::Written,
        plan,
        manifest: Some(manifest),
    })
}

fn plan(
    options: &PrepareOptions,
    checkpoint: &Checkpoint,
    tensors: &[TensorSpec],
) -> Result<Plan, PrepError> {
    let spec = &checkpoint.spec;
    let tp_size = options.tp_size;
    let dtype = match options.dtype {
        None => checkpoint.format,
        Some(Precision::Bf16) => WeightFormat::Bf16,
        Some(Precision::Fp8) if checkpoint.format.is_fp8() => checkpoint.format,
        Some(Precision::Fp8) => WeightFormat::Fp8Channel,
    };
    check_tp_size(spec, dtype, tp_size)?;
    let tokens_max = match options.tokens_max {
        None => spec.tokens_max,
        Some(0) => {
            return Err(PrepError::Option(
                "the longest sequence must be at least 1 token".to_owned(),
            ));
        }
        Some(tokens) if tokens > spec.tokens_max => {
            return Err(PrepError::Option(format!(
                "the longest sequence cannot be {tokens} tokens: the model goes to {}",
                spec.tokens_max
            )));
        }
        Some(tokens) => tokens,
    };
    if options.batch_max == Some(0) {
        return Err(PrepError::Option(
            "the batch must hold at least 1 sequence".to_owned(),
        ));
    }
    let rank_bytes: usize = stored_tensors(spec, dtype, tp_size)
        .map(|(_, dtype, shape)| shape.iter().product::<usize>() * dtype.size())
        .sum();
    Ok(Plan {
        name: options
            .name
            .clone()
            .unwrap_or_else(|| checkpoint.name.clone()),
        source: checkpoint.source.clone(),
        out: options.out.clone(),
        tensors: tensors.len(),
        parameters: tensors.iter().map(|t| t.elements() as u64).sum(),
        dtype,
        rank_bytes: rank_bytes as u64,
        tp_size,
        tokens_max,
        batch_max: options.batch_max,
        vocab: spec.vocab,
        eos_token_ids: checkpoint.eos_token_ids.clone(),
        sampling_from: None,
    })
}

/// What is at the output: nothing (`None`), the very model asked for (its manifest), or an error.
fn check_output(
    options: &PrepareOptions,
    checkpoint: &Checkpoint,
    plan: &Plan,
    tensors: &[TensorSpec],
) -> Result<Option<Manifest>, PrepError> {
    let out = &options.out;
    if !out.exists() {
        return Ok(None);
    }
    let mut entries = fs::read_dir(out).map_err(|e| PrepError::io("list", out, e))?;
    if entries.next().is_none() {
        return Ok(None); // an empty directory may be renamed over
    }
    if options.force {
        if !out.join(MANIFEST).exists() {
            return Err(PrepError::output(
                out,
                format!(
                    "it holds files but no {MANIFEST}, so it is no model directory and is left alone; name another"
                ),
            ));
        }
        return Ok(None);
    }
    let existing = match ModelDir::open(out) {
        Ok(existing) => existing.manifest,
        Err(error) => {
            return Err(PrepError::output(
                out,
                format!(
                    "what is there is no whole model ({error}); use --force to replace it, or name another"
                ),
            ));
        }
    };
    if same_plan(&existing, plan, checkpoint) {
        if existing.source_stamp == checkpoint.stamp {
            return Ok(Some(existing));
        }
        // The source was touched or comes from elsewhere: its content decides.
        let bar = progress_bar("comparing", plan.parameters);
        let mut fingerprint = fingerprint(checkpoint);
        writer::hash_weights(
            tensors,
            checkpoint.weights.as_ref(),
            &mut fingerprint,
            &|n| bar.inc(n as u64),
        )?;
        bar.finish_and_clear();
        if fingerprint.finish() == existing.fingerprint {
            return Ok(Some(existing));
        }
    }
    Err(PrepError::output(
        out,
        format!(
            "it holds {} from {}, prepared otherwise; use --force to replace it, or name another",
            existing.name, existing.source
        ),
    ))
}

fn same_plan(existing: &Manifest, plan: &Plan, checkpoint: &Checkpoint) -> bool {
    existing.name == plan.name
        && existing.dtype == plan.dtype
        && existing.tp_size == plan.tp_size
        && existing.tokens_max == plan.tokens_max
        && existing.batch_max == plan.batch_max
        && existing.bos_token_id == checkpoint.bos_token_id
        && existing.eos_token_ids == checkpoint.eos_token_ids
        && existing.spec == limited_spec(checkpoint, plan)
        && checkpoint.files.iter().all(|file| {
            let sha256 = sha256(&file.content);
            existing
                .files
                .iter()
                .any(|e| e.name == file.name && e.sha256 == sha256)
        })
}

fn write(
    options: &PrepareOptions,
    checkpoint: &Checkpoint,
    plan: &Plan,
    tensors: &[TensorSpec],
) -> Result<Manifest, PrepError> {
    let stage = Stage::new(&options.out)?;
    let mut files = Vec::new();
    for file in &checkpoint.files {
        files.push(stage.write(file.name, &file.content)?);
    }
    let bar = progress_bar("writing", plan.parameters);
    let mut fingerprint = fingerprint(checkpoint);
    files.extend(writer::write_ranks(
        stage.path(),
        tensors,
        checkpoint.weights.as_ref(),
        (plan.dtype, plan.tp_size),
        &mut fingerprint,
        &|n| bar.inc(n as u64),
    )?);
    bar.finish_and_clear();
    let manifest = Manifest {
        format: MANIFEST_FORMAT,
        name: plan.name.clone(),
        fingerprint: fingerprint.finish(),
        dtype: plan.dtype,
        tp_size: plan.tp_size,
        tokens_max: plan.tokens_max,
        batch_max: plan.batch_max,
        spec: limited_spec(checkpoint, plan),
        bos_token_id: checkpoint.bos_token_id,
        eos_token_ids: checkpoint.eos_token_ids.clone(),
        files,
        source: checkpoint.source.clone(),
        source_stamp: checkpoint.stamp.clone(),
    };
    stage.publish(&manifest, options.force)?;
    Ok(manifest)
}

fn fingerprint(checkpoint: &Checkpoint) -> FingerprintHasher {
    let tokenizer = checkpoint
        .files
        .iter()
        .find(|file| file.name == TOKENIZER)
        .expect("every checkpoint has a tokenizer");
    FingerprintHasher::new(&checkpoint.spec, &tokenizer.content)
}

fn limited_spec(checkpoint: &Checkpoint, plan: &Plan) -> ModelSpec {
    ModelSpec {
        tokens_max: plan.tokens_max,
        ..checkpoint.spec.clone()
    }
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    hex(&Sha256::digest(bytes))
}

/// Elements done of those to do; invisible where standard error is no terminal.
fn progress_bar(what: &'static str, parameters: u64) -> ProgressBar {
    let style = ProgressStyle::with_template(
        "{msg} {wide_bar} {percent}% of {human_len} parameters, {eta} left",
    )
    .expect("the template is well-formed");
    ProgressBar::new(parameters)
        .with_style(style)
        .with_message(what)
}
