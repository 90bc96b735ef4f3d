//! The `llama` architecture's metadata → [`UniformSpec`], and the configuration files that say the same.

use baton_model::{ModelSpec, Rope, RopeScaling, UniformSpec};
use half::bf16;
use serde_json::{Value, json};

use super::container::Container;
use super::metadata::{Metadata, required};
use super::quant::Format;
use super::tokenizer::RebuiltTokenizer;

/// Tensor of frequency divisors, in files of models with Llama 3.1's rope scaling.
pub(crate) const ROPE_FREQS: &str = "rope_freqs.weight";
/// Output projection; absent when tied to the embedding.
pub(crate) const OUTPUT: &str = "output.weight";
/// Token embedding.
pub(crate) const TOKEN_EMBD: &str = "token_embd.weight";

pub(crate) fn spec(container: &Container) -> Result<UniformSpec, String> {
    let metadata = &container.metadata;
    let architecture = required(
        "general.architecture",
        metadata.text("general.architecture"),
    )?;
    if architecture != "llama" {
        return Err(format!(
            "its architecture {architecture:?} is not supported as GGUF, only \"llama\" is; use the Hugging Face model"
        ));
    }
    let need = |key: &str| required(key, metadata.uniform_count(key));
    if metadata.count("llama.expert_count")?.is_some_and(|n| n > 0) {
        return Err("it is a mixture of experts, which is not supported".to_owned());
    }
    let hidden = need("llama.embedding_length")?;
    let heads = need("llama.attention.head_count")?;
    if heads == 0 {
        return Err("it has no attention heads".to_owned());
    }
    let rotary = metadata.count("llama.rope.dimension_count")?;
    let head_dim = match metadata.count("llama.attention.key_length")?.or(rotary) {
        Some(head_dim) => head_dim,
        None => hidden / heads,
    };
    for (key, value) in [
        (
            "llama.attention.value_length",
            metadata.count("llama.attention.value_length")?,
        ),
        ("llama.rope.dimension_count", rotary),
    ] {
        if value.is_some_and(|n| n != head_dim) {
            return Err(format!(
                "`{key}` differs from the head's {head_dim} numbers, which is not supported"
            ));
        }
    }
    let embedding = container
        .tensor(TOKEN_EMBD)
        .ok_or_else(|| format!("it has no tensor `{TOKEN_EMBD}`"))?;
    let &[vocab, _] = embedding.shape.as_slice() else {
        return Err(format!(
            "its tensor `{TOKEN_EMBD}` has the shape {:?}",
            embedding.shape
        ));
    };
    let tokens_max = need("llama.context_length")?;
    let spec = UniformSpec {
        family: "llama".to_owned(),
        hidden,
        intermediate: need("llama.feed_forward_length")?,
        layers: need("llama.block_count")?,
        heads,
        kv_heads: metadata
            .uniform_count("llama.attention.head_count_kv")?
            .unwrap_or(heads),
        head_dim,
        vocab,
        tokens_max,
        rms_eps: required(
            "llama.attention.layer_norm_rms_epsilon",
            metadata.float("llama.attention.layer_norm_rms_epsilon"),
        )? as f32,
        rope: Rope {
            theta: metadata.float("llama.rope.freq_base")?.unwrap_or(10_000.0),
            scaling: rope_scaling(metadata)?,
        },
        qkv_bias: false,
        qk_norm: false,
        tied_embeddings: container.tensor(OUTPUT).is_none(),
        sliding_window: metadata
            .count("llama.attention.sliding_window")?
            .filter(|&n| n > 0 && n < tokens_max),
    };
    ModelSpec::try_from(spec.clone())?; // in bounds
    match container.tensor(ROPE_FREQS) {
        None => Ok(spec),
        Some(_) => with_frequency_divisors(spec, container),
    }
}

fn rope_scaling(metadata: &Metadata) -> Result<RopeScaling, String> {
    // Files before the key `scaling.type` had `scale_linear` alone.
    let old = metadata
        .float("llama.rope.scale_linear")?
        .filter(|&factor| factor != 1.0);
    let factor = metadata.float("llama.rope.scaling.factor")?.or(old);
    match metadata.text("llama.rope.scaling.type")? {
        None | Some("none") => {
            Ok(old.map_or(RopeScaling::None, |factor| RopeScaling::Linear { factor }))
        }
        Some("linear") => match factor {
            Some(factor) if factor != 0.0 && factor != 1.0 => Ok(RopeScaling::Linear { factor }),
            _ => Ok(RopeScaling::None),
        },
        Some(other) => Err(format!("its rope scaling {other:?} is not supported")),
    }
}

/// Llama 3.1's scaling is stored as its effect, a divisor for each frequency. Find the parameters that
/// have this effect: those of the models that were published with it.
fn with_frequency_divisors(
    spec: UniformSpec,
    container: &Container,
) -> Result<UniformSpec, String> {
    let tensor = container.tensor(ROPE_FREQS).expect("the caller looked");
    let pairs = spec.head_dim / 2;
    if tensor.shape != [pairs] || tensor.format != Format::F32 {
        return Err(format!(
            "its tensor `{ROPE_FREQS}` is {} of shape {:?}, it should be F32 of shape [{pairs}]",
            tensor.format, tensor.shape
        ));
    }
    let mut bytes = vec![0; pairs * 4];
    container
        .read_at(tensor.start, &mut bytes)
        .map_err(|e| e.to_string())?;
    let mut divisors = Vec::with_capacity(pairs);
    Format::F32.dequantize(&bytes, &mut divisors);

    let plain = Rope {
        theta: spec.rope.theta,
        scaling: RopeScaling::None,
    }
    .inverse_frequencies(spec.head_dim);
    for factor in [8.0, 32.0] {
        let rope = Rope {
            theta: spec.rope.theta,
            scaling: RopeScaling::Llama3 {
                factor,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_tokens_max: 8192.0,
            },
        };
        let scaled = rope.inverse_frequencies(spec.head_dim);
        let same =
            divisors
                .iter()
                .zip(plain.iter().zip(&scaled))
                .all(|(&divisor, (plain, scaled))| {
                    (f64::from(divisor) - plain / scaled).abs() <= 1e-3 * (plain / scaled)
                });
        if same {
            return Ok(UniformSpec { rope, ..spec });
        }
    }
    Err(format!(
        "the frequency divisors in its tensor `{ROPE_FREQS}` are not those of Llama 3.1 or 3.2, which is not supported"
    ))
}

/// A `config.json` that reads back as this spec.
pub(crate) fn config_json(spec: &UniformSpec, tokenizer: &RebuiltTokenizer) -> Value {
    let rope_scaling = match spec.rope.scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_tokens_max,
        } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_tokens_max as u64,
        }),
    };
    // Mistral differs from Llama by its window alone, and GGUF calls both llama.
    let (model_type, architecture) = match spec.sliding_window {
        Some(_) => ("mistral", "MistralForCausalLM"),
        None => ("llama", "LlamaForCausalLM"),
    };
    json!({
        "architectures": [architecture],
        "model_type": model_type,
        "attention_bias": false,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_ids,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "max_position_embeddings": spec.tokens_max,
        "num_attention_heads": spec.heads,
        "num_hidden_layers": spec.layers,
        "num_key_value_heads": spec.kv_heads,
        "rms_norm_eps": spec.rms_eps,
        "rope_scaling": rope_scaling,
        "rope_theta": spec.rope.theta,
        "sliding_window": spec.sliding_window,
        "tie_word_embeddings": spec.tied_embeddings,
        "torch_dtype": "bfloat16",
        "vocab_size": spec.vocab,
    })
}

/// How a file's maker would have its tokens chosen (llama.cpp's `general.sampling.*`), and what Hugging Face calls it.
const SAMPLING: [(&str, &str); 4] = [
    ("general.sampling.temp", "temperature"),
    ("general.sampling.top_p", "top_p"),
    ("general.sampling.min_p", "min_p"),
    ("general.sampling.penalty_repeat", "repetition_penalty"),
];

/// A `generation_config.json` with the tokens that begin and end an answer, and with what the file says of sampling, if it says
/// anything. Nothing is made up: a file that is silent gives no defaults.
pub(crate) fn generation_config_json(
    metadata: &Metadata,
    tokenizer: &RebuiltTokenizer,
) -> Result<Value, String> {
    let mut config = json!({
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_ids,
    });
    for (key, name) in SAMPLING {
        if let Some(value) = metadata.float(key)? {
            // Single precision in the file: written with all digits of a double it would be 0.20000000298.
            let shortest: f64 = (value as f32).to_string().parse().unwrap_or(value);
            config[name] = shortest.into();
        }
    }
    if let Some(top_k) = metadata.count("general.sampling.top_k")? {
        config["top_k"] = top_k.into();
    }
    Ok(config)
}

/// f32 → little-endian BF16, to nearest, ties to even.
pub(crate) fn round_to_bf16(values: &[f32], out: &mut Vec<u8>) {
    out.extend(
        values
            .iter()
            .flat_map(|&value| bf16::from_f32(value).to_le_bytes()),
    );
}

#[cfg(test)]
mod tests {
    use super::round_to_bf16;

    #[test]
    fn rounding_is_to_nearest_and_ties_go_to_even() {
        let cases = [
            (0x3F80_0000, 0x3F80),
            (0x3F80_7FFF, 0x3F80), // under the middle
            (0x3F80_8000, 0x3F80), // the middle, even below
            (0x3F80_8001, 0x3F81), // over the middle
            (0x3F81_8000, 0x3F82), // the middle, even above
            (0xBF81_8000, 0xBF82), // away from zero just so
            (0xBF80_8000, 0xBF80),
            (0x3FFF_8000, 0x4000), // into the next power of two
            (0x0000_8000, 0x0000), // subnormal numbers are no exception
            (0x0001_8000, 0x0002),
            (0x8000_0000, 0x8000), // minus zero
            (0x7F7F_7FFF, 0x7F7F), // the largest that stays finite
            (0x7F7F_8000, 0x7F80),
        ];
        for (bits, expected) in cases {
            let mut out = Vec::new();
            round_to_bf16(&[f32::from_bits(bits)], &mut out);
            assert_eq!(out, u16::to_le_bytes(expected), "{bits:#010x}");
        }
    }
}
