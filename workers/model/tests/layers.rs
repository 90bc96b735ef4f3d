//! What the configurations of real families say of their layers: served, or refused by what it is that cannot be.

use baton_model::{ModelSpec, UniformSpec, parse_config};
use serde_json::{Value, json};

/// A small model of a class, with what its published configurations say besides.
fn config(model_type: &str, architecture: &str, more: Value) -> Value {
    let mut config = json!({
        "architectures": [architecture], "model_type": model_type, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "vocab_size": 100, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu"
    });
    let fields = config.as_object_mut().unwrap();
    fields.extend(more.as_object().unwrap().clone());
    config
}

fn read(config: &Value) -> Result<ModelSpec, String> {
    parse_config(config.to_string().as_bytes()).map_err(|e| e.to_string())
}

fn window(config: &Value) -> Option<usize> {
    let spec = read(config).unwrap_or_else(|e| panic!("{config}: {e}"));
    UniformSpec::try_from(&spec).unwrap().sliding_window
}

fn llama(more: Value) -> Value {
    config("llama", "LlamaForCausalLM", more)
}

fn mistral(more: Value) -> Value {
    config("mistral", "MistralForCausalLM", more)
}

fn qwen2(more: Value) -> Value {
    config("qwen2", "Qwen2ForCausalLM", more)
}

fn qwen3(more: Value) -> Value {
    config("qwen3", "Qwen3ForCausalLM", more)
}

fn layer_types(slides: [bool; 4]) -> Value {
    let name = |slides| match slides {
        true => "sliding_attention",
        false => "full_attention",
    };
    json!(slides.map(name))
}

#[test]
fn windows_are_those_of_the_class_in_transformers() {
    let full = layer_types([false; 4]);
    let sliding = layer_types([true; 4]);
    for (config, expected) in [
        // Llama's class has no windows, whatever is left over in the file.
        (llama(json!({ "sliding_window": 1024 })), None),
        // Mistral 7B v0.1, and v0.3.
        (mistral(json!({ "sliding_window": 1024 })), Some(1024)),
        (mistral(json!({ "sliding_window": null })), None),
        (
            mistral(json!({ "sliding_window": 1024, "layer_types": full })),
            None,
        ),
        (
            mistral(json!({ "sliding_window": 1024, "layer_types": sliding })),
            Some(1024),
        ),
        // A window that holds the longest sequence is none.
        (mistral(json!({ "sliding_window": 4096 })), None),
        (mistral(json!({ "sliding_window": 4095 })), Some(4095)),
        // Qwen2.5 and Qwen3 as they are published.
        (
            qwen2(
                json!({ "sliding_window": 1024, "use_sliding_window": false, "max_window_layers": 2 }),
            ),
            None,
        ),
        (
            qwen3(
                json!({ "sliding_window": null, "use_sliding_window": false, "max_window_layers": 4 }),
            ),
            None,
        ),
        // Above the last layer there is none that slides; from the first on, all do.
        (
            qwen2(
                json!({ "sliding_window": 1024, "use_sliding_window": true, "max_window_layers": 4 }),
            ),
            None,
        ),
        (
            qwen2(
                json!({ "sliding_window": 1024, "use_sliding_window": true, "max_window_layers": 0 }),
            ),
            Some(1024),
        ),
        // The class's own first layer with a window is the 28th, which this model does not have.
        (
            qwen2(json!({ "sliding_window": 1024, "use_sliding_window": true })),
            None,
        ),
        // Mixed, but the window is no limit.
        (
            qwen3(
                json!({ "sliding_window": 4096, "use_sliding_window": true, "max_window_layers": 2 }),
            ),
            None,
        ),
        // No experts, said outright.
        (
            llama(json!({ "num_local_experts": 0, "num_experts": null })),
            None,
        ),
    ] {
        assert_eq!(window(&config), expected, "{config}");
    }
}

#[test]
fn layers_that_cannot_be_computed_are_refused_by_name() {
    let mixed = layer_types([true, false, true, false]);
    for (config, expected) in [
        // Layers of two kinds: what the kinds are, and how many layers of each.
        (
            qwen2(
                json!({ "sliding_window": 1024, "use_sliding_window": true, "max_window_layers": 3 }),
            ),
            "its layers differ (3 with full attention of 4/2 heads of 16 and a gated MLP of 96, 1 with sliding attention \
             over 1024 tokens of 4/2 heads of 16 and a gated MLP of 96); only models whose layers are all alike",
        ),
        (
            mistral(json!({ "sliding_window": 1024, "layer_types": mixed })),
            "its layers differ (2 with sliding attention over 1024 tokens",
        ),
        (
            qwen3(
                json!({ "sliding_window": 512, "use_sliding_window": true, "layer_types": mixed }),
            ),
            "its layers differ",
        ),
        (
            qwen3(
                json!({ "sliding_window": 512, "use_sliding_window": false, "layer_types": mixed }),
            ),
            "`layer_types` asks for sliding attention without a window",
        ),
        (
            mistral(json!({ "layer_types": layer_types([true; 4]) })),
            "`layer_types` asks for sliding attention without a window",
        ),
        (
            llama(json!({ "sliding_window": 512, "layer_types": mixed })),
            "`layer_types` asks for sliding attention without a window",
        ),
        (
            llama(json!({ "layer_types": ["full_attention"] })),
            "`layer_types` lists 1 layers, `num_hidden_layers` is 4",
        ),
        (
            // Qwen3-Next.
            llama(
                json!({ "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"] }),
            ),
            "`layer_types` has \"linear_attention\"",
        ),
        (
            // Llama 4.
            llama(
                json!({ "layer_types": ["chunked_attention", "full_attention", "full_attention", "full_attention"] }),
            ),
            "`layer_types` has \"chunked_attention\"",
        ),
        (
            mistral(json!({ "sliding_window": 0 })),
            "sliding_window is 0",
        ),
        // Families by their own names, with what of them is not there.
        (
            config(
                "mixtral",
                "MixtralForCausalLM",
                json!({ "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": null }),
            ),
            "`model_type` \"mixtral\" is not supported (`num_local_experts` is 8: experts are not supported)",
        ),
        (
            config(
                "qwen2_moe",
                "Qwen2MoeForCausalLM",
                json!({ "num_experts": 60, "decoder_sparse_step": 1 }),
            ),
            "(`num_experts` is 60: experts",
        ),
        (
            config(
                "qwen3_moe",
                "Qwen3MoeForCausalLM",
                json!({ "num_experts": 128, "mlp_only_layers": [] }),
            ),
            "(`num_experts` is 128: experts",
        ),
        (
            config(
                "deepseek_v3",
                "DeepseekV3ForCausalLM",
                json!({
                    "n_routed_experts": 256, "n_shared_experts": 1, "first_k_dense_replace": 3, "kv_lora_rank": 512, "q_lora_rank": 1536
                }),
            ),
            "\"deepseek_v3\" is not supported (`n_routed_experts` is 256: experts",
        ),
        (
            config(
                "deepseek_v2",
                "DeepseekV2ForCausalLM",
                json!({ "n_routed_experts": null, "kv_lora_rank": 512 }),
            ),
            "(`kv_lora_rank` is 512: latent attention is not supported)",
        ),
        (
            config(
                "gpt_oss",
                "GptOssForCausalLM",
                json!({
                    "num_local_experts": 32, "sliding_window": 128, "layer_types": mixed, "attention_bias": true
                }),
            ),
            "\"gpt_oss\" is not supported (`num_local_experts` is 32",
        ),
        (
            config(
                "llama4_text",
                "Llama4ForCausalLM",
                json!({ "attention_chunk_size": 8192 }),
            ),
            "(`attention_chunk_size` is 8192: chunked attention",
        ),
        (
            config(
                "gemma2",
                "Gemma2ForCausalLM",
                json!({
                    "sliding_window": 4096, "attn_logit_softcapping": 50.0, "hidden_act": "gelu_pytorch_tanh"
                }),
            ),
            "`model_type` \"gemma2\" is not supported; supported are LlamaForCausalLM",
        ),
        (
            config(
                "gemma3_text",
                "Gemma3ForCausalLM",
                json!({ "sliding_window": 512, "sliding_window_pattern": 6 }),
            ),
            "`model_type` \"gemma3_text\" is not supported; supported are",
        ),
        // A supported class that says it has them is not believed to be plain.
        (
            llama(json!({ "num_local_experts": 8 })),
            "`num_local_experts` is 8: experts are not supported",
        ),
        (
            qwen3(json!({ "num_experts": 128 })),
            "`num_experts` is 128: experts are not supported",
        ),
        (
            llama(json!({ "kv_lora_rank": 512 })),
            "`kv_lora_rank` is 512: latent attention is not supported",
        ),
    ] {
        let error = read(&config)
            .err()
            .unwrap_or_else(|| panic!("accepted: {config}"));
        assert!(
            error.contains(expected),
            "{error:?} should contain {expected:?}"
        );
    }
}
