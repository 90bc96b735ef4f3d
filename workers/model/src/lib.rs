//! Models on disk: their configuration as a [`ModelSpec`], their weights by name, their shards.

mod spec;

pub use spec::{ModelSpec, Rope, RopeScaling};
