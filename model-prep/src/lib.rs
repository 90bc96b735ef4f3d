//! From a model's source to a model directory that workers can serve.
//!
//! A source is a Hugging Face name, a local Hugging Face directory or a GGUF file. [`mod@prepare`] checks it
//! whole before it writes a byte, streams its weights (rounded to BF16 or FP8 and divided over the ranks) into a
//! temporary directory beside the output, and renames that when all of it is on disk. So memory stays
//! bounded by one piece of one tensor, and a broken run never looks finished.

#![forbid(unsafe_code)]
#![warn(clippy::unwrap_used)]

mod card;
mod checkpoint;
mod error;
mod friendly;
mod gguf;
mod hf_dir;
mod hub;
mod options;
mod prepare;
mod source;
mod stage;
mod writer;

pub use error::PrepError;
pub use friendly::{friendly_names, hub_name};
pub use options::{Outcome, Plan, Precision, PrepareOptions, PrepareReport};
pub use prepare::prepare;
