//! The `quantization_config` of a Hugging Face `config.json` → how its projections are kept.
//!
//! Read are the two families of FP8 checkpoints that people publish: `quant_method` `fp8` (DeepSeek's and
//! Qwen's with 128×128 blocks, AutoFP8's with one scale for a tensor) and `compressed-tensors` in the
//! formats `float-quantized` and `naive-quantized`. Of both only what says how weights are stored matters
//! here: static scales of activations are not used, since activations are quantized as they come, and which
//! modules stay unquantized (`ignore`, `modules_to_not_convert`) is seen from the tensors themselves.

use serde_json::{Map, Value};

use crate::weights::{BLOCK, WeightFormat};

type Object = Map<String, Value>;

/// How a checkpoint keeps its projections, from the `quantization_config` of its `config.json`; BF16 stands
/// for every unquantized format. What cannot be read is refused in a sentence.
pub(crate) fn weight_format(config: &Object) -> Result<WeightFormat, String> {
    let Some(quantization) = present(config, "quantization_config") else {
        return Ok(WeightFormat::Bf16);
    };
    let Value::Object(quantization) = quantization else {
        return Err(format!(
            "`quantization_config` is no object: {quantization}"
        ));
    };
    match quantization.get("quant_method").and_then(Value::as_str) {
        Some("none") => Ok(WeightFormat::Bf16),
        Some("fp8") => fp8(quantization),
        Some("compressed-tensors") => compressed_tensors(quantization),
        _ => {
            let method = quantization.get("quant_method").unwrap_or(&Value::Null);
            Err(format!(
                "the weights are quantized (`quant_method` {method}); only \"fp8\" and \"compressed-tensors\" with \
                 8-bit floats are read, so use the unquantized model, or a GGUF file"
            ))
        }
    }
}

fn fp8(quantization: &Object) -> Result<WeightFormat, String> {
    only(
        quantization,
        "quantization_config",
        &[
            "quant_method",
            "fmt",
            "activation_scheme",
            "weight_block_size",
            // The tensors say which modules are quantized.
            "modules_to_not_convert",
            "ignored_layers",
            "dequantize",
        ],
    )?;
    one_of(quantization, "fmt", &["e4m3"])?;
    one_of(quantization, "activation_scheme", &["dynamic", "static"])?;
    if present(quantization, "dequantize").is_some_and(|value| value != false) {
        return Err(
            "`quantization_config` asks for `dequantize`, which is not supported".to_owned(),
        );
    }
    match present(quantization, "weight_block_size") {
        None => Ok(WeightFormat::Fp8Channel),
        Some(size) => block(size, "weight_block_size"),
    }
}

fn compressed_tensors(quantization: &Object) -> Result<WeightFormat, String> {
    only(
        quantization,
        "quantization_config",
        &[
            "quant_method",
            "config_groups",
            "format",
            "ignore",
            // What was done when, with which program and to what effect.
            "quantization_status",
            "global_compression_ratio",
            "version",
            // Refused below unless empty.
            "kv_cache_scheme",
            "sparsity_config",
            "transform_config",
        ],
    )?;
    one_of(quantization, "format", &FORMATS)?;
    if present(quantization, "kv_cache_scheme").is_some() {
        return Err(
            "`quantization_config` has a `kv_cache_scheme`, and the KV cache is not quantized here; use the model \
             without one"
                .to_owned(),
        );
    }
    for name in ["sparsity_config", "transform_config"] {
        if present(quantization, name).is_some_and(|value| *value != Value::Object(Map::new())) {
            return Err(format!(
                "`quantization_config` has a `{name}`, which is not supported"
            ));
        }
    }
    let groups = match present(quantization, "config_groups") {
        Some(Value::Object(groups)) if !groups.is_empty() => groups,
        _ => return Err("`quantization_config` has no `config_groups`".to_owned()),
    };
    let mut formats = groups
        .iter()
        .map(|(name, group)| self::group(group).map_err(|reason| format!("`{name}`: {reason}")));
    let first = formats.next().expect("there are groups")?;
    for format in formats {
        if format? != first {
            return Err(
                "`config_groups` mixes scales of blocks and of channels, which is not supported"
                    .to_owned(),
            );
        }
    }
    Ok(first)
}

/// Both keep each number in a byte and the scales under `weight_scale`.
const FORMATS: [&str; 2] = ["float-quantized", "naive-quantized"];

/// One of the `config_groups`: its weights must be symmetric 8-bit floats.
fn group(group: &Value) -> Result<WeightFormat, String> {
    let group = group.as_object().ok_or("it is no object")?;
    one_of(group, "format", &FORMATS)?;
    if present(group, "output_activations").is_some() {
        return Err("`output_activations` are quantized, which is not supported".to_owned());
    }
    let weights = present(group, "weights")
        .and_then(Value::as_object)
        .ok_or("it has no `weights`")?;
    let eight_bit_floats = weights.get("num_bits").and_then(Value::as_u64) == Some(8)
        && weights.get("type").and_then(Value::as_str) == Some("float");
    if !eight_bit_floats {
        return Err("its weights are no 8-bit floats, and nothing else is read".to_owned());
    }
    for (name, plain) in [("symmetric", true), ("dynamic", false)] {
        if present(weights, name).is_some_and(|value| *value != plain) {
            return Err(format!("`{name}` of its weights is not {plain}"));
        }
    }
    match present(weights, "strategy").and_then(Value::as_str) {
        Some("tensor" | "channel") => Ok(WeightFormat::Fp8Channel),
        Some("block") => block(
            weights.get("block_structure").unwrap_or(&Value::Null),
            "block_structure",
        ),
        _ => Err(format!(
            "the `strategy` of its weights is {}; tensor, channel and block are read",
            weights.get("strategy").unwrap_or(&Value::Null)
        )),
    }
}

fn block(size: &Value, name: &str) -> Result<WeightFormat, String> {
    if *size == serde_json::json!([BLOCK, BLOCK]) {
        return Ok(WeightFormat::Fp8Block);
    }
    Err(format!(
        "`{name}` is {size}, only [{BLOCK},{BLOCK}] is supported"
    ))
}

/// Refuses fields that are not known: each may change what the weights mean.
fn only(object: &Object, what: &str, known: &[&str]) -> Result<(), String> {
    let unknown = object
        .iter()
        .find(|(name, value)| !value.is_null() && !known.contains(&name.as_str()));
    match unknown {
        None => Ok(()),
        Some((name, value)) => Err(format!(
            "`{what}` has `{name}` {value}, which is not supported"
        )),
    }
}

/// Refuses a field that is there and says something else.
fn one_of(object: &Object, name: &str, supported: &[&str]) -> Result<(), String> {
    match present(object, name) {
        Some(value) if !supported.iter().any(|supported| value == supported) => Err(format!(
            "`{name}` of the quantization is {value}; supported is {}",
            supported.join(" or ")
        )),
        _ => Ok(()),
    }
}

fn present<'a>(object: &'a Object, name: &str) -> Option<&'a Value> {
    object.get(name).filter(|value| !value.is_null())
}
