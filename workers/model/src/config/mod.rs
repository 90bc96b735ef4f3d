//! Hugging Face's `config.json` → [`ModelSpec`].
//!
//! Reads the spelling of Transformers 4 (`rope_theta`, `rope_scaling`) and of Transformers 5
//! (`rope_parameters`). What no executor here could compute is refused in a sentence, never ignored.

mod fields;
mod layers;
mod quantization;
mod rope;

use std::sync::Arc;

use serde_json::Value;

use crate::error::ModelError;
use crate::spec::{AttentionSpec, GatedMlpSpec, LAYERS_MAX, LayerKind, Mixer, Mlp, ModelSpec};
use crate::weights::WeightFormat;
use fields::Fields;
use layers::{Windows, sliding_windows};

/// What a family's configuration leaves out means what its class in Transformers says.
struct Family {
    model_type: &'static str,
    architecture: &'static str,
    kv_heads: Option<usize>,
    head_dim: Option<usize>,
    tokens_max: usize,
    qkv_bias: bool,
    qk_norm: bool,
    windows: Windows,
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
        windows: Windows::None,
    },
    Family {
        model_type: "mistral",
        architecture: "MistralForCausalLM",
        kv_heads: Some(8),
        head_dim: None,
        tokens_max: 131_072,
        qkv_bias: false,
        qk_norm: false,
        windows: Windows::Every,
    },
    Family {
        model_type: "qwen2",
        architecture: "Qwen2ForCausalLM",
        kv_heads: Some(32),
        head_dim: None,
        tokens_max: 32_768,
        qkv_bias: true,
        qk_norm: false,
        windows: Windows::Upper,
    },
    Family {
        model_type: "qwen3",
        architecture: "Qwen3ForCausalLM",
        kv_heads: Some(32),
        head_dim: Some(128),
        tokens_max: 32_768,
        qkv_bias: false,
        qk_norm: true,
        windows: Windows::Upper,
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
    let count = config.required("num_hidden_layers")?;
    if count > LAYERS_MAX {
        return Err(format!(
            "`num_hidden_layers` is {count}, at most {LAYERS_MAX} are supported"
        ));
    }
    let tokens_max = config
        .count("max_position_embeddings")?
        .unwrap_or(family.tokens_max);
    let full = LayerKind {
        mixer: Mixer::Attention(AttentionSpec {
            heads,
            kv_heads: config
                .count("num_key_value_heads")?
                .or(family.kv_heads)
                .unwrap_or(heads),
            head_dim,
            rope: rope::rope(&config)?,
            qkv_bias: family.qkv_bias,
            qk_norm: family.qk_norm,
            sliding_window: None,
        }),
        mlp: Mlp::Gated(GatedMlpSpec {
            intermediate: config.required("intermediate_size")?,
        }),
    };
    let windows = sliding_windows(&config, family.windows, count, tokens_max)?;
    let spec = ModelSpec {
        family: family.model_type.to_owned(),
        hidden,
        layers: layers(full, windows),
        vocab: config.required("vocab_size")?,
        tokens_max,
        rms_eps: config.number("rms_norm_eps")?.unwrap_or(1e-6) as f32,
        tied_embeddings: config.flag("tie_word_embeddings")?.unwrap_or(false),
    };
    spec.check()?;
    // Executors refuse it too, but not before the weights are downloaded.
    spec.one_kind()?;
    Ok(spec)
}

/// One layer for each window, otherwise like `full`; those of the same window share their kind.
fn layers(full: LayerKind, windows: Vec<Option<usize>>) -> Vec<Arc<LayerKind>> {
    let mut kinds: Vec<(Option<usize>, Arc<LayerKind>)> = Vec::new();
    let of_window = |window: Option<usize>| {
        if let Some((_, kind)) = kinds.iter().find(|(known, _)| *known == window) {
            return kind.clone();
        }
        let mut kind = full.clone();
        let Mixer::Attention(attention) = &mut kind.mixer;
        attention.sliding_window = window;
        let kind = Arc::new(kind);
        kinds.push((window, kind.clone()));
        kind
    };
    windows.into_iter().map(of_window).collect()
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
            let why = beyond_dense(config).map_or(String::new(), |why| format!(" ({why})"));
            format!(
                "`model_type` {model_type:?} is not supported{why}; supported are {}",
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

/// What of a configuration asks for other layers than grouped-query attention and a dense MLP.
fn beyond_dense(config: &Fields) -> Option<String> {
    let fields = [
        // Mixtral and gpt-oss, Qwen MoE, DeepSeek.
        ("num_local_experts", "experts are"),
        ("num_experts", "experts are"),
        ("n_routed_experts", "experts are"),
        ("kv_lora_rank", "latent attention is"), // DeepSeek
        ("attention_chunk_size", "chunked attention is"), // Llama 4
    ];
    fields.into_iter().find_map(|(name, what)| {
        let value = config.present(name).filter(|value| **value != 0)?;
        Some(format!("`{name}` is {value}: {what} not supported"))
    })
}

fn refuse_unsupported(config: &Fields, family: &Family) -> Result<(), String> {
    if let Some(why) = beyond_dense(config) {
        return Err(why);
    }
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
