//! How a spec is written down: flat if all layers are alike, which is what manifests have always held, else with a list
//! of kinds.

use std::sync::Arc;

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use super::{LayerKind, ModelSpec, UniformSpec};

/// A spec whose layers differ.
#[derive(Serialize, Deserialize)]
struct MixedSpec {
    family: String,
    hidden: usize,
    vocab: usize,
    tokens_max: usize,
    rms_eps: f32,
    tied_embeddings: bool,
    /// Each kind once.
    kinds: Vec<LayerKind>,
    /// The kind of each layer, as an index.
    layers: Vec<usize>,
}

impl Serialize for ModelSpec {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if let Ok(flat) = UniformSpec::try_from(self) {
            return flat.serialize(serializer);
        }
        let kinds = self.kinds();
        let index = |layer| kinds.iter().position(|kind| *kind == layer);
        MixedSpec {
            family: self.family.clone(),
            hidden: self.hidden,
            vocab: self.vocab,
            tokens_max: self.tokens_max,
            rms_eps: self.rms_eps,
            tied_embeddings: self.tied_embeddings,
            layers: self.layers.iter().filter_map(index).collect(),
            kinds: kinds.into_iter().map(|kind| (**kind).clone()).collect(),
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for ModelSpec {
    /// What was read has passed [`ModelSpec::check`].
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let spec = match value.get("kinds") {
            None => {
                let flat: UniformSpec = serde_json::from_value(value).map_err(D::Error::custom)?;
                Self::try_from(flat)
            }
            Some(_) => {
                let mixed: MixedSpec = serde_json::from_value(value).map_err(D::Error::custom)?;
                Self::try_from(mixed)
            }
        };
        spec.map_err(|reason| D::Error::custom(format!("its spec is wrong: {reason}")))
    }
}

impl TryFrom<MixedSpec> for ModelSpec {
    type Error = String;

    fn try_from(mixed: MixedSpec) -> Result<Self, String> {
        let kinds: Vec<Arc<LayerKind>> = mixed.kinds.into_iter().map(Arc::new).collect();
        let kind = |&index: &usize| {
            kinds.get(index).cloned().ok_or_else(|| {
                format!(
                    "a layer is of kind {index}, there are {} kinds",
                    kinds.len()
                )
            })
        };
        let spec = Self {
            family: mixed.family,
            hidden: mixed.hidden,
            layers: mixed.layers.iter().map(kind).collect::<Result<_, _>>()?,
            vocab: mixed.vocab,
            tokens_max: mixed.tokens_max,
            rms_eps: mixed.rms_eps,
            tied_embeddings: mixed.tied_embeddings,
        };
        spec.check()?;
        Ok(spec)
    }
}
