//! Rotary positions, in the spellings of Transformers 4 and 5.

use serde_json::Value;

use super::fields::Fields;
use crate::spec::{Rope, RopeScaling};

pub(super) fn rope(config: &Fields) -> Result<Rope, String> {
    let object = |name: &str| match config.present(name) {
        None => Ok(None),
        Some(Value::Object(map)) => Ok(Some(Fields(map))),
        Some(other) => Err(format!("`{name}` is no object: {other}")),
    };
    let parameters = object("rope_parameters")?.or(object("rope_scaling")?);
    let nested = match &parameters {
        Some(fields) => fields.number("rope_theta")?,
        None => None,
    };
    let theta = nested.or(config.number("rope_theta")?).unwrap_or(10_000.0);
    let scaling = match &parameters {
        None => RopeScaling::None,
        Some(fields) => rope_scaling(fields, config)?,
    };
    Ok(Rope { theta, scaling })
}

fn rope_scaling(fields: &Fields, config: &Fields) -> Result<RopeScaling, String> {
    if let Some(factor) = fields.number("partial_rotary_factor")?
        && factor != 1.0
    {
        return Err(format!(
            "`partial_rotary_factor` {factor} is not supported, only 1 is"
        ));
    }
    let number = |name: &str| {
        fields
            .number(name)?
            .ok_or_else(|| format!("the rope parameters lack `{name}`"))
    };
    let kind = match fields.text("rope_type")? {
        Some(kind) => Some(kind),
        None => fields.text("type")?,
    };
    match kind.unwrap_or("default") {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear {
            factor: number("factor")?,
        }),
        "llama3" => Ok(RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_tokens_max: match fields.number("original_max_position_embeddings")? {
                Some(tokens) => tokens,
                None => config
                    .number("original_max_position_embeddings")?
                    .ok_or("the rope parameters lack `original_max_position_embeddings`")?,
            },
        }),
        other => Err(format!(
            "rope type {other:?} is not supported; supported are default, linear and llama3"
        )),
    }
}
