//! What to prepare, and what came of it.

use std::fmt;
use std::path::PathBuf;

use baton_model::{Manifest, WeightFormat};

/// What to prepare, from where, to where.
#[derive(Clone, Debug)]
pub struct PrepareOptions {
    /// A GGUF file, a Hugging Face directory, a friendly name or a Hugging Face name (`owner/model`).
    pub source: String,
    /// Directory to make. Its parent must be writable: the work happens beside it.
    pub out: PathBuf,
    /// Name to serve the model under; `None` takes the source's.
    pub name: Option<String>,
    /// Ranks to divide the weights over.
    pub tp_size: usize,
    /// Longest sequence to serve, in tokens; `None` takes the model's own limit.
    pub tokens_max: Option<usize>,
    /// Most sequences to serve at once; `None` leaves it to the worker.
    pub batch_max: Option<usize>,
    /// What to make of the projections; `None` keeps what the source has, FP8 or not.
    pub dtype: Option<Precision>,
    /// Check and plan, write nothing.
    pub dry_run: bool,
    /// Replace a model that is already there.
    pub force: bool,
}

impl PrepareOptions {
    /// One rank, the model's own limits, nothing overwritten.
    pub fn new(source: impl Into<String>, out: impl Into<PathBuf>) -> Self {
        PrepareOptions {
            source: source.into(),
            out: out.into(),
            name: None,
            tp_size: 1,
            tokens_max: None,
            batch_max: None,
            dtype: None,
            dry_run: false,
            force: false,
        }
    }
}

/// What becomes of a model's projections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// BF16; FP8 is dequantized.
    Bf16,
    /// FP8: kept if the source has it, else made with a scale for each output channel.
    Fp8,
}

/// What a run did.
#[derive(Clone, Debug)]
pub struct PrepareReport {
    /// What came of it.
    pub outcome: Outcome,
    /// What was to be made.
    pub plan: Plan,
    /// The manifest of the directory; `None` after a dry run.
    pub manifest: Option<Manifest>,
}

/// What came of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A dry run: nothing was written.
    Planned,
    /// The directory was made.
    Written,
    /// The same model, divided in the same way, was there already.
    AlreadyThere,
}

/// What a run makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Name the model is served under.
    pub name: String,
    /// Where it comes from.
    pub source: String,
    /// Directory it goes to.
    pub out: PathBuf,
    /// Tensors of the whole model.
    pub tensors: usize,
    /// Parameters of the whole model.
    pub parameters: u64,
    /// Format of the projections.
    pub dtype: WeightFormat,
    /// Bytes of weights of each rank.
    pub rank_bytes: u64,
    /// Ranks.
    pub tp_size: usize,
    /// Longest sequence, in tokens.
    pub tokens_max: usize,
    /// Most sequences at once, if limited.
    pub batch_max: Option<usize>,
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// Tokens that end an answer.
    pub eos_token_ids: Vec<u32>,
    /// Where defaults of sampling come from that the model's files do not say; `None` if there are none of that kind.
    pub sampling_from: Option<&'static str>,
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "model       {}", self.name)?;
        writeln!(f, "from        {}", self.source)?;
        writeln!(f, "to          {}", self.out.display())?;
        writeln!(
            f,
            "weights     {} tensors, {:.1} million parameters, {}",
            self.tensors,
            self.parameters as f64 / 1e6,
            self.dtype
        )?;
        writeln!(
            f,
            "ranks       {} of {:.1} MB each",
            self.tp_size,
            self.rank_bytes as f64 / 1e6
        )?;
        writeln!(
            f,
            "vocabulary  {} tokens, of which {:?} end an answer",
            self.vocab, self.eos_token_ids
        )?;
        write!(f, "limits      {} tokens a sequence", self.tokens_max)?;
        if let Some(batch) = self.batch_max {
            write!(f, ", {batch} sequences at once")?;
        }
        match self.sampling_from {
            Some(source) => write!(f, "\nsampling    by {source}"),
            None => Ok(()),
        }
    }
}
