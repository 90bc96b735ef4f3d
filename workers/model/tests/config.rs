//! Variants of `config.json`: read as their family means them, or refused in a sentence.

use baton_model::{
    ModelSpec, RopeScaling, UniformSpec, WeightFormat, checkpoint_format, eos_token_ids,
    parse_config,
};
use serde_json::{Value, json};

fn llama(more: Value) -> Value {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 500000.0
    });
    config
        .as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    config
}

fn of_family(model_type: &str, architecture: &str, more: Value) -> Value {
    let mut config = llama(more);
    config["model_type"] = model_type.into();
    config["architectures"] = json!([architecture]);
    config
}

fn parsed(config: &Value) -> UniformSpec {
    let spec: ModelSpec =
        parse_config(config.to_string().as_bytes()).unwrap_or_else(|e| panic!("{config}: {e}"));
    UniformSpec::try_from(&spec).unwrap()
}

fn refused(config: &Value) -> String {
    let error = parse_config(config.to_string().as_bytes()).err();
    error
        .unwrap_or_else(|| panic!("accepted: {config}"))
        .to_string()
}

#[test]
fn rope_scaling_in_all_its_spellings() {
    let scaling = |more: Value| parsed(&llama(more)).rope.scaling;
    let llama3 = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_tokens_max: 8192.0,
    };
    let fields = json!({
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"
    });
    assert_eq!(scaling(json!({})), RopeScaling::None);
    assert_eq!(scaling(json!({ "rope_scaling": null })), RopeScaling::None);
    assert_eq!(
        scaling(json!({ "rope_scaling": { "rope_type": "default" } })),
        RopeScaling::None
    );
    assert_eq!(scaling(json!({ "rope_scaling": fields })), llama3);
    assert_eq!(
        scaling(json!({ "rope_scaling": { "type": "linear", "factor": 2 } })),
        RopeScaling::Linear { factor: 2.0 }
    );
    // Transformers 5 puts the base beside the scaling, and it counts more than an old one outside.
    let mut nested = fields.clone();
    nested["rope_theta"] = json!(1e6);
    let spec = parsed(&llama(json!({ "rope_parameters": nested })));
    assert_eq!((spec.rope.theta, spec.rope.scaling), (1e6, llama3.clone()));
    // Where the original length stands outside, as in some converted models.
    let mut outside = fields;
    outside
        .as_object_mut()
        .unwrap()
        .remove("original_max_position_embeddings");
    let config = json!({ "rope_scaling": outside, "original_max_position_embeddings": 8192 });
    assert_eq!(scaling(config), llama3);
}

/// Values of Transformers' `_compute_llama3_parameters` for Llama 3.1 (head size 128, base 500,000).
#[test]
fn llama3_frequencies_agree_with_transformers() {
    let spec = parsed(&llama(json!({ "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"
    }})));
    let frequencies = spec.rope.inverse_frequencies(128);
    assert_eq!(frequencies.len(), 64);
    for (i, expected) in LLAMA3_FREQUENCIES {
        assert!(
            (frequencies[i] / expected - 1.0).abs() < 1e-6,
            "{i}: {} {expected}",
            frequencies[i]
        );
    }
}

const LLAMA3_FREQUENCIES: [(usize, f64); 6] = [
    (0, 1.000000000e+00),
    (20, 1.656044088e-02),
    (28, 3.211446106e-03),
    (31, 8.567514597e-04),
    (33, 3.126936499e-04),
    (63, 3.068925878e-07),
];

#[test]
fn families_fill_in_what_their_classes_do() {
    let qwen2 = parsed(&of_family(
        "qwen2",
        "Qwen2ForCausalLM",
        json!({ "sliding_window": 32, "use_sliding_window": false }),
    ));
    assert!(qwen2.qkv_bias && !qwen2.qk_norm && qwen2.sliding_window.is_none());
    let qwen3 = parsed(&of_family("qwen3", "Qwen3ForCausalLM", json!({})));
    assert!(qwen3.qk_norm && !qwen3.qkv_bias);
    assert_eq!(qwen3.head_dim, 128);
    let mistral = parsed(&of_family(
        "mistral",
        "MistralForCausalLM",
        json!({ "sliding_window": 1024, "num_attention_heads": 8, "num_key_value_heads": null }),
    ));
    assert_eq!(
        (mistral.sliding_window, mistral.kv_heads, mistral.head_dim),
        (Some(1024), 8, 8)
    );
    let mut old = llama(json!({}));
    for key in [
        "num_key_value_heads",
        "max_position_embeddings",
        "rope_theta",
        "architectures",
    ] {
        old.as_object_mut().unwrap().remove(key);
    }
    let old = parsed(&old);
    assert_eq!(
        (old.kv_heads, old.tokens_max, old.rope.theta, old.head_dim),
        (4, 2048, 10_000.0, 16)
    );
    assert_eq!(parsed(&llama(json!({ "head_dim": 32 }))).head_dim, 32);
    assert!(parsed(&llama(json!({ "tie_word_embeddings": true }))).tied_embeddings);
    parsed(&llama(
        json!({ "quantization_config": { "quant_method": "none" } }),
    ));
    parsed(&llama(json!({ "quantization_config": null })));
}

#[test]
fn what_cannot_be_computed_is_refused() {
    let scaling =
        |kind: &str| llama(json!({ "rope_scaling": { "rope_type": kind, "factor": 4.0 } }));
    let cases = [
        (scaling("yarn"), "rope type \"yarn\" is not supported"),
        (scaling("dynamic"), "rope type \"dynamic\" is not supported"),
        (
            scaling("longrope"),
            "rope type \"longrope\" is not supported",
        ),
        (scaling("llama3"), "lack `low_freq_factor`"),
        (
            llama(json!({ "rope_parameters": { "type": "linear" } })),
            "lack `factor`",
        ),
        (
            llama(json!({ "rope_scaling": { "type": "linear", "factor": 0 } })),
            "impossible",
        ),
        (
            llama(json!({ "rope_scaling": "linear" })),
            "`rope_scaling` is no object",
        ),
        (llama(json!({ "rope_theta": -1 })), "impossible"),
        (
            llama(json!({ "quantization_config": { "quant_method": "gptq" } })),
            "quantized (`quant_method` \"gptq\")",
        ),
        (llama(json!({ "quantization_config": {} })), "quantized"),
        (llama(json!({ "quantization_config": [] })), "is no object"),
        (
            of_family("mixtral", "MixtralForCausalLM", json!({})),
            "\"mixtral\" is not supported",
        ),
        (
            of_family("qwen3_moe", "Qwen3MoeForCausalLM", json!({})),
            "\"qwen3_moe\" is not supported",
        ),
        (
            of_family("llama", "LlamaForSequenceClassification", json!({})),
            "LlamaForSequenceClassification",
        ),
        (
            of_family(
                "qwen2",
                "Qwen2ForCausalLM",
                json!({ "use_sliding_window": true }),
            ),
            "`use_sliding_window` is true without a `sliding_window`",
        ),
        (llama(json!({ "attention_bias": true })), "`attention_bias`"),
        (llama(json!({ "mlp_bias": true })), "`mlp_bias`"),
        (
            llama(json!({ "hidden_act": "gelu" })),
            "\"gelu\" is not supported",
        ),
        (
            llama(json!({ "partial_rotary_factor": 0.5 })),
            "`partial_rotary_factor` 0.5",
        ),
        (
            llama(json!({ "hidden_size": null })),
            "there is no `hidden_size`",
        ),
        (llama(json!({ "hidden_size": 66 })), "no multiple"),
        (
            llama(json!({ "hidden_size": "64" })),
            "`hidden_size` must be a whole number, it is \"64\"",
        ),
        (
            llama(json!({ "hidden_size": 64.5 })),
            "must be a whole number",
        ),
        (llama(json!({ "vocab_size": 0 })), "vocab is 0"),
        (
            llama(json!({ "vocab_size": 1u64 << 63 })),
            "vocab is 9223372036854775808",
        ),
        (
            llama(json!({ "num_attention_heads": 0 })),
            "`num_attention_heads` 0",
        ),
        (llama(json!({ "num_key_value_heads": 3 })), "cannot share"),
        (llama(json!({ "head_dim": 15 })), "even number"),
        (llama(json!({ "rms_norm_eps": -1.0 })), "rms_eps"),
        (
            llama(json!({ "layer_types": ["full_attention", "chunked"] })),
            "\"chunked\"",
        ),
        (
            llama(json!({ "num_hidden_layers": 1u64 << 40 })),
            "`num_hidden_layers` is 1099511627776, at most 1024",
        ),
        (
            llama(json!({ "num_key_value_heads": [2, 4] })),
            "`num_key_value_heads` must be a whole number",
        ),
        (json!([]), "not a JSON object"),
        (json!({}), "there is no `model_type`"),
    ];
    for (config, expected) in cases {
        let error = refused(&config);
        assert!(error.starts_with("config.json: "), "{error}");
        assert!(
            error.contains(expected),
            "{error:?} should contain {expected:?}"
        );
    }
    let error = parse_config(b"{").unwrap_err().to_string();
    assert!(error.contains("is not JSON"), "{error}");
}

fn quantized(quantization: Value) -> Value {
    llama(json!({ "quantization_config": quantization }))
}

/// As DeepSeek and Qwen publish it.
fn block_fp8() -> Value {
    json!({
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm"]
    })
}

/// As llm-compressor writes it.
fn compressed(strategy: &str) -> Value {
    let input = json!({
        "actorder": null, "block_structure": null, "dynamic": true, "group_size": null, "num_bits": 8,
        "observer": null, "observer_kwargs": {}, "strategy": "token", "symmetric": true, "type": "float"
    });
    let weights = json!({
        "actorder": null, "block_structure": null, "dynamic": false, "group_size": null, "num_bits": 8,
        "observer": "minmax", "observer_kwargs": {}, "strategy": strategy, "symmetric": true, "type": "float"
    });
    json!({
        "config_groups": { "group_0": {
            "input_activations": input, "output_activations": null, "targets": ["Linear"], "weights": weights
        } },
        "format": "float-quantized", "global_compression_ratio": 1.24, "ignore": ["lm_head"],
        "kv_cache_scheme": null, "quant_method": "compressed-tensors", "quantization_status": "compressed"
    })
}

#[test]
fn fp8_checkpoints_of_all_kinds_are_known() {
    let mut compressed_block = compressed("block");
    compressed_block["config_groups"]["group_0"]["weights"]["block_structure"] = json!([128, 128]);
    let mut naive = compressed("tensor");
    naive["format"] = json!("naive-quantized");
    let auto_fp8 = json!({
        "quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]
    });
    for (quantization, format) in [
        (json!(null), WeightFormat::Bf16),
        (json!({ "quant_method": "none" }), WeightFormat::Bf16),
        (block_fp8(), WeightFormat::Fp8Block),
        (auto_fp8, WeightFormat::Fp8Channel),
        (compressed("channel"), WeightFormat::Fp8Channel),
        (naive, WeightFormat::Fp8Channel),
        (compressed_block, WeightFormat::Fp8Block),
    ] {
        let config = quantized(quantization);
        parse_config(config.to_string().as_bytes()).unwrap();
        assert_eq!(checkpoint_format(&config).unwrap(), format, "{config}");
    }
}

#[test]
fn other_quantizations_are_refused_by_what_is_wrong() {
    let with = |mut base: Value, path: &str, value: Value| {
        let (parent, name) = path.rsplit_once('/').unwrap();
        base.pointer_mut(parent).unwrap()[name] = value;
        quantized(base)
    };
    let weights = |name: &str, value| {
        let path = format!("/config_groups/group_0/weights/{name}");
        with(compressed("channel"), &path, value)
    };
    let mut two_kinds = compressed("channel");
    two_kinds["config_groups"]["group_1"] = json!({ "weights": {
        "num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]
    } });
    for (config, expected) in [
        (
            with(block_fp8(), "/fmt", json!("e5m2")),
            "`fmt` of the quantization is \"e5m2\"",
        ),
        (
            with(block_fp8(), "/weight_block_size", json!([64, 128])),
            "`weight_block_size` is [64,128], only [128,128]",
        ),
        (
            with(block_fp8(), "/scale_fmt", json!("ue8m0")),
            "has `scale_fmt` \"ue8m0\"",
        ),
        (
            with(block_fp8(), "/dequantize", json!(true)),
            "`dequantize`",
        ),
        (
            with(compressed("channel"), "/format", json!("pack-quantized")),
            "\"pack-quantized\"",
        ),
        (
            with(
                compressed("channel"),
                "/kv_cache_scheme",
                json!({ "num_bits": 8 }),
            ),
            "KV cache",
        ),
        (
            with(
                compressed("channel"),
                "/sparsity_config",
                json!({ "format": "24" }),
            ),
            "sparsity",
        ),
        (
            with(compressed("channel"), "/config_groups", json!({})),
            "no `config_groups`",
        ),
        (
            weights("num_bits", json!(4)),
            "`group_0`: its weights are no 8-bit floats",
        ),
        (weights("type", json!("int")), "no 8-bit floats"),
        (weights("symmetric", json!(false)), "`symmetric`"),
        (
            weights("strategy", json!("group")),
            "`strategy` of its weights is \"group\"",
        ),
        (quantized(compressed("block")), "`block_structure` is null"),
        (quantized(two_kinds), "mixes"),
    ] {
        let error = refused(&config);
        assert!(
            error.contains(expected),
            "{error:?} should contain {expected:?}"
        );
    }
}

#[test]
fn end_tokens_are_one_or_several() {
    assert_eq!(eos_token_ids(&json!({ "eos_token_id": 2 })), [2]);
    assert_eq!(eos_token_ids(&json!({ "eos_token_id": [1, 2] })), [1, 2]);
    assert!(eos_token_ids(&json!({ "eos_token_id": null })).is_empty());
    assert!(eos_token_ids(&json!({})).is_empty());
}
