//! How far the loading of weights is, for whoever waits for a worker of a large model.

use std::borrow::Cow;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use baton_model::{MatrixBytes, TensorBytes, TensorSource};

/// Between two lines of the log.
const EVERY: Duration = Duration::from_secs(5);

/// Of all ranks of a worker, which load at the same time.
pub(super) struct Loading {
    layers: usize,
    state: Mutex<State>,
}

struct State {
    started: Instant,
    told: Instant,
    bytes: u64,
    /// That was read last, by whichever rank, counted from 1.
    layer: usize,
}

impl Loading {
    /// Begins now, of a model of so many layers.
    pub(super) fn new(layers: usize) -> Self {
        let now = Instant::now();
        let state = State {
            started: now,
            told: now,
            bytes: 0,
            layer: 0,
        };
        Self {
            layers,
            state: Mutex::new(state),
        }
    }

    /// The same weights, whose reading is watched.
    pub(super) fn watch<'a>(&'a self, source: &'a dyn TensorSource) -> Watched<'a> {
        Watched {
            source,
            loading: self,
        }
    }

    /// A line for the log, if one is due.
    fn read(&self, name: &str, bytes: usize, now: Instant) -> Option<String> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.bytes += bytes as u64;
        state.layer = layer_of(name).map_or(state.layer, |layer| layer + 1);
        if now.duration_since(state.told) < EVERY {
            return None;
        }
        state.told = now;
        let gigabytes = state.bytes as f64 / 1e9;
        let rate = gigabytes / now.duration_since(state.started).as_secs_f64();
        Some(format!(
            "loading weights: layer {} of {}, {gigabytes:.1} GB so far, {rate:.1} GB/s",
            state.layer, self.layers
        ))
    }

    fn tell(&self, name: &str, bytes: usize) {
        if let Some(line) = self.read(name, bytes, Instant::now()) {
            tracing::info!("{line}");
        }
    }
}

/// `model.layers.7.mlp.down_proj.weight` is of layer 7.
fn layer_of(name: &str) -> Option<usize> {
    let (_, rest) = name.split_once("layers.")?;
    rest.split('.').next()?.parse().ok()
}

/// A source that tells [`Loading`] what is read.
pub(super) struct Watched<'a> {
    source: &'a dyn TensorSource,
    loading: &'a Loading,
}

impl TensorSource for Watched<'_> {
    fn bf16(&self, name: &str) -> Result<TensorBytes<'_>, String> {
        let tensor = self.source.bf16(name)?;
        self.loading.tell(name, tensor.bytes.len());
        Ok(tensor)
    }

    fn shaped(&self, name: &str, shape: &[usize]) -> Result<Cow<'_, [u8]>, String> {
        let bytes = self.source.shaped(name, shape)?;
        self.loading.tell(name, bytes.len());
        Ok(bytes)
    }

    fn projection(&self, name: &str, out: usize, inputs: usize) -> Result<MatrixBytes<'_>, String> {
        let matrix = self.source.projection(name, out, inputs)?;
        let bytes = match &matrix {
            MatrixBytes::Bf16(bytes) => bytes.len(),
            MatrixBytes::Fp8(matrix) => matrix.codes.len(),
        };
        self.loading.tell(name, bytes);
        Ok(matrix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_every_five_seconds_says_how_far_it_is() {
        let loading = Loading::new(80);
        let started = loading.state.lock().expect("no panic").started;
        let at = |seconds| started + Duration::from_secs(seconds);
        let name = |layer| format!("model.layers.{layer}.mlp.down_proj.weight");
        assert_eq!(loading.read(&name(0), 1 << 30, at(4)), None);
        let line = loading.read(&name(11), 10_000_000_000 - (1 << 30), at(5));
        let expected = "loading weights: layer 12 of 80, 10.0 GB so far, 2.0 GB/s";
        assert_eq!(line.as_deref(), Some(expected));
        assert_eq!(loading.read("model.norm.weight", 1, at(9)), None);
        let line = loading.read("lm_head.weight", 1, at(10)).expect("due");
        assert!(line.contains("layer 12 of 80"), "{line}");
    }
}
