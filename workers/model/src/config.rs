//! Hugging Face's `config.json` → [`ModelSpec`].
//!
//! Reads the spelling of Transformers 4 (`rope_theta`, `rope_scaling`) and of Transformers 5
//! (`rope_parameters`). What no executor here could compute is refused in a sentence, never ignored.

use serde_json::{Map, Value};

use crate::error::ModelError;
use crate::quantization;
use crate::spec::{ModelSpec, Rope, RopeScaling};
use crate::weight_format::WeightFormat;

/// What a family's configuration leaves out means what its class in Transformers says.
struct Family {
    model_type: &'static str,
    architecture: &'static str,
    kv_heads: Option<usize>,
    head_dim: Option<usize>,
    tokens_max: usize,
    qkv_bias: bool,
    qk_norm: bool,
}

const FAMILIES: [Family; 4] = [
    Family {
        model_type: "llama",
        architecture: "LlamaForCausalLM",
        kv_heads: None,
        head_dim: None,
        tokens_max: 2048,
        qkv_bias: false,
        qk_norm: false,
    },
    Family {
        model_type: "mistral",
        architecture: "MistralForCausalLM",
        kv_heads: Some(8),
        head_dim: None,
        tokens_max: 131_072,
        qkv_bias: false,
        qk_norm: false,
    },
    Family {
        model_type: "qwen2",
        architecture: "Qwen2ForCausalLM",
        kv_heads: Some(32),
        head_dim: None,
        tokens_max: 32_768,
        qkv_bias: true,
        qk_norm: false,
    },
    Family {
        model_type: "qwen3",
        architecture: "Qwen3ForCausalLM",
        kv_heads: Some(32),
        head_dim: Some(128),
        tokens_max: 32_768,
        qkv_bias: false,
        qk_norm: true,
    },
];

/// Read the text of a `config.json`.
pub fn parse_config(text: &[u8]) -> Result<ModelSpec, ModelError> {
    parse(text).map_err(|reason| ModelError::Config(format!("config.json: {reason}")))
}

/// How the checkpoint of a `config.json` that [`parse_config`] takes keeps its projections: in FP8 blocks, in
/// FP8 with scales for channels or whole tensors (both are [`WeightFormat::Fp8Channel`]), or unquantized.
pub fn checkpoint_format(config: &Value) -> Result<WeightFormat, ModelError> {
    match config.as_object() {
        Some(fields) => quantization::weight_format(fields)
            .map_err(|reason| ModelError::Config(format!("config.json: {reason}"))),
        None => Ok(WeightFormat::Bf16),
    }
}

/// The `eos_token_id` of a `config.json` or `generation_config.json`: one id, a list of them, or none.
pub fn eos_token_ids(config: &Value) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match config.get("eos_token_id") {
        Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}

fn parse(text: &[u8]) -> Result<ModelSpec, String> {
    let value: Value = serde_json::from_slice(text).map_err(|e| format!("is not JSON: {e}"))?;
    let Value::Object(map) = &value else {
        return Err("is not a JSON object".to_owned());
    };
    let config = Fields(map);
    let family = family(&config)?;
    refuse_unsupported(&config, family)?;

    let hidden = config.required("hidden_size")?;
    let heads = config.required("num_attention_heads")?;
    let head_dim = match config.count("head_dim")?.or(family.head_dim) {
        Some(head_dim) => head_dim,
        None if heads > 0 && hidden % heads == 0 => hidden / heads,
        None => {
            return Err(format!(
                "`hidden_size` {hidden} is no multiple of `num_attention_heads` {heads}, and there is no `head_dim`"
            ));
        }
    };
    let spec = ModelSpec {
        family: family.model_type.to_owned(),
        hidden,
        intermediate: config.required("intermediate_size")?,
        layers: config.required("num_hidden_layers")?,
        heads,
        kv_heads: config
            .count("num_key_value_heads")?
            .or(family.kv_heads)
            .unwrap_or(heads),
        head_dim,
        vocab: config.required("vocab_size")?,
        tokens_max: config
            .count("max_position_embeddings")?
            .unwrap_or(family.tokens_max),
        rms_eps: config.number("rms_norm_eps")?.unwrap_or(1e-6) as f32,
        rope: rope(&config)?,
        qkv_bias: family.qkv_bias,
        qk_norm: family.qk_norm,
        tied_embeddings: config.flag("tie_word_embeddings")?.unwrap_or(false),
        sliding_window: sliding_window(&config, family)?,
    };
    spec.check()?;
    Ok(spec)
}

fn family(config: &Fields) -> Result<&'static Family, String> {
    let supported = || {
        let names: Vec<_> = FAMILIES.iter().map(|f| f.architecture).collect();
        names.join(", ")
    };
    let model_type = config
        .text("model_type")?
        .ok_or("there is no `model_type`")?;
    let family = FAMILIES
        .iter()
        .find(|f| f.model_type == model_type)
        .ok_or_else(|| {
            format!(
                "`model_type` {model_type:?} is not supported; supported are {}",
                supported()
            )
        })?;
    match config.present("architectures") {
        None => {}
        Some(Value::Array(names)) if names.iter().any(|n| n == family.architecture) => {}
        Some(names) => {
            return Err(format!(
                "`architectures` {names} is not supported; supported are {}",
                supported()
            ));
        }
    }
    Ok(family)
}

fn refuse_unsupported(config: &Fields, family: &Family) -> Result<(), String> {
    quantization::weight_format(config.0)?;
    if let Some(act) = config.text("hidden_act")?
        && act != "silu"
    {
        return Err(format!(
            "`hidden_act` {act:?} is not supported, only \"silu\" is"
        ));
    }
    // Qwen2's class has its biases whatever this says.
    if family.model_type != "qwen2" && config.flag("attention_bias")? == Some(true) {
        return Err(format!(
            "`attention_bias` is not supported for {}",
            family.model_type
        ));
    }
    if config.flag("mlp_bias")? == Some(true) {
        return Err("`mlp_bias` is not supported".to_owned());
    }
    if let Some(factor) = config.number("partial_rotary_factor")?
        && factor != 1.0
    {
        return Err(format!(
            "`partial_rotary_factor` {factor} is not supported, only 1 is"
        ));
    }
    Ok(())
}

fn sliding_window(config: &Fields, family: &Family) -> Result<Option<usize>, String> {
    let kinds: Vec<&Value> = match config.present("layer_types") {
        Some(Value::Array(kinds)) => kinds.iter().collect(),
        Some(other) => return Err(format!("`layer_types` is no list: {other}")),
        None => Vec::new(),
    };
    if let Some(kind) = kinds
        .iter()
        .find(|&&kind| kind != "full_attention" && kind != "sliding_attention")
    {
        return Err(format!("`layer_types` has {kind}, which is not supported"));
    }
    let sliding = kinds
        .iter()
        .filter(|&&kind| kind == "sliding_attention")
        .count();
    if sliding != 0 && sliding != kinds.len() {
        return Err(
            "`layer_types` mixes full and sliding attention, which is not supported".to_owned(),
        );
    }
    let window = match family.model_type {
        "mistral" => config.count("sliding_window")?,
        "qwen2" | "qwen3" if config.flag("use_sliding_window")? == Some(true) => {
            return Err(
                "`use_sliding_window` (in the upper layers only) is not supported".to_owned(),
            );
        }
        _ => None,
    };
    match window {
        None if sliding != 0 => {
            Err("`layer_types` asks for sliding attention without a window".to_owned())
        }
        // Full attention in every layer, said outright, outranks a left-over window.
        Some(_) if !kinds.is_empty() && sliding == 0 => Ok(None),
        window => Ok(window),
    }
}

fn rope(config: &Fields) -> Result<Rope, String> {
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

/// Typed access to a JSON object; `null` counts as absent.
struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    fn present(&self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    fn required(&self, name: &str) -> Result<usize, String> {
        self.count(name)?
            .ok_or_else(|| format!("there is no `{name}`"))
    }

    fn count(&self, name: &str) -> Result<Option<usize>, String> {
        self.typed(name, "a whole number", |value| {
            value.as_u64().and_then(|n| usize::try_from(n).ok())
        })
    }

    fn number(&self, name: &str) -> Result<Option<f64>, String> {
        self.typed(name, "a number", Value::as_f64)
    }

    fn flag(&self, name: &str) -> Result<Option<bool>, String> {
        self.typed(name, "true or false", Value::as_bool)
    }

    fn text(&self, name: &str) -> Result<Option<&'a str>, String> {
        self.typed(name, "a string", Value::as_str)
    }

    fn typed<T>(
        &self,
        name: &str,
        what: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, String> {
        match self.present(name) {
            None => Ok(None),
            Some(value) => match read(value) {
                Some(read) => Ok(Some(read)),
                None => Err(format!("`{name}` must be {what}, it is {value}")),
            },
        }
    }
}
