//! Hugging Face directories of every family: prepared whole, divided, and put together again.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use baton_model::{Dtype, ModelDir, Split, expected_tensors, header_bytes, parse_config};
use baton_model_prep::{Outcome, PrepareOptions, prepare};
use half::bf16;
use serde_json::{Value, json};

const TOKENIZER: &str = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
"pre_tokenizer":null,"post_processor":null,"decoder":null,
"model":{"type":"BPE","dropout":null,"unk_token":null,"continuing_subword_prefix":null,"end_of_word_suffix":null,
"fuse_unk":false,"byte_fallback":false,"ignore_merges":false,"vocab":{"a":0,"b":1,"</s>":2},"merges":[]}}"#;

fn config(model_type: &str, architecture: &str, more: Value) -> Value {
    let mut config = json!({
        "architectures": [architecture], "model_type": model_type, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 12,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "hidden_act": "silu", "eos_token_id": 2
    });
    let fields = config.as_object_mut().unwrap();
    fields.extend(more.as_object().unwrap().clone());
    config
}

fn families() -> Vec<Value> {
    vec![
        config(
            "llama",
            "LlamaForCausalLM",
            json!({ "tie_word_embeddings": true }),
        ),
        config(
            "mistral",
            "MistralForCausalLM",
            json!({ "sliding_window": 32 }),
        ),
        config(
            "qwen2",
            "Qwen2ForCausalLM",
            json!({ "use_sliding_window": false }),
        ),
        config("qwen3", "Qwen3ForCausalLM", json!({ "head_dim": 8 })),
    ]
}

/// Deterministic numbers that BF16 holds exactly, so that every source format gives the same weights.
fn value(tensor: usize, element: usize) -> f32 {
    ((tensor * 31 + element * 7) % 255) as f32 / 128.0 - 1.0
}

/// Write a directory and return each tensor's whole content in BF16.
fn write_source(
    dir: &Path,
    config: &Value,
    dtype: Dtype,
    shards: usize,
) -> HashMap<String, Vec<u8>> {
    fs::create_dir_all(dir).unwrap();
    let text = serde_json::to_vec(config).unwrap();
    let tensors = expected_tensors(&parse_config(&text).unwrap());
    fs::write(dir.join("config.json"), text).unwrap();
    fs::write(dir.join("tokenizer.json"), TOKENIZER).unwrap();
    fs::write(
        dir.join("tokenizer_config.json"),
        r#"{"eos_token":"</s>","chat_template":"{{ messages }}"}"#,
    )
    .unwrap();
    let mut whole = HashMap::new();
    let mut weight_map = serde_json::Map::new();
    let per_shard = tensors.len().div_ceil(shards);
    for (s, part) in tensors.chunks(per_shard).enumerate() {
        let name = match shards {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{s}.safetensors"),
        };
        let header: Vec<_> = part
            .iter()
            .map(|t| (t.name.clone(), dtype, t.shape.clone()))
            .collect();
        let mut file = header_bytes(&header);
        for (i, tensor) in part.iter().enumerate() {
            let values: Vec<f32> = (0..tensor.elements())
                .map(|e| value(s * per_shard + i, e))
                .collect();
            for &v in &values {
                match dtype {
                    Dtype::Bf16 => file.extend(bf16::from_f32(v).to_le_bytes()),
                    Dtype::F16 => file.extend(half::f16::from_f32(v).to_le_bytes()),
                    Dtype::F32 => file.extend(v.to_le_bytes()),
                    Dtype::F8E4M3 => file.push(baton_model::e4m3_from_f32(v)),
                }
            }
            let bytes = values
                .iter()
                .flat_map(|&v| bf16::from_f32(v).to_le_bytes())
                .collect();
            whole.insert(tensor.name.clone(), bytes);
            weight_map.insert(tensor.name.clone(), name.clone().into());
        }
        fs::write(dir.join(name), file).unwrap();
    }
    if shards > 1 {
        let index = json!({ "metadata": {}, "weight_map": weight_map });
        fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    }
    whole
}

/// Put the ranks' parts of every tensor together and compare.
fn assert_reassembles(model: &ModelDir, whole: &HashMap<String, Vec<u8>>) {
    let ranks: Vec<_> = (0..model.manifest.tp_size)
        .map(|rank| model.weights(rank).unwrap())
        .collect();
    for tensor in expected_tensors(model.spec()) {
        let parts: Vec<&[u8]> = ranks
            .iter()
            .map(|r| r.tensor(&tensor.name).unwrap().bytes)
            .collect();
        let together = match tensor.split {
            Split::Replicated => {
                assert!(parts.iter().all(|part| *part == parts[0]));
                parts[0].to_vec()
            }
            Split::Rows => parts.concat(),
            Split::Columns => {
                let width = tensor.columns() * 2 / parts.len();
                let rows = (0..tensor.rows()).flat_map(|row| {
                    parts
                        .iter()
                        .map(move |p| &p[row * width..(row + 1) * width])
                });
                rows.collect::<Vec<_>>().concat()
            }
        };
        assert!(together == whole[&tensor.name], "{} differs", tensor.name);
    }
}

#[test]
fn every_family_is_divided_and_put_together_again() {
    for config in families() {
        let family = config["model_type"].as_str().unwrap().to_owned();
        let temporary = tempfile::tempdir().unwrap();
        let mut fingerprints = Vec::new();
        for (dtype, shards) in [(Dtype::Bf16, 1), (Dtype::F16, 2), (Dtype::F32, 3)] {
            let source = temporary.path().join(format!("source-{dtype}"));
            let whole = write_source(&source, &config, dtype, shards);
            for tp_size in [1, 2] {
                let out = temporary.path().join(format!("{dtype}-{tp_size}"));
                let mut options = PrepareOptions::new(source.to_str().unwrap(), &out);
                options.tp_size = tp_size;
                let report = prepare(options.clone()).unwrap_or_else(|e| panic!("{family}: {e}"));
                assert_eq!(report.outcome, Outcome::Written);
                let model = ModelDir::open(&out).unwrap();
                model.verify().unwrap();
                assert_eq!(model.manifest.eos_token_ids, [2]);
                assert_reassembles(&model, &whole);
                assert!(out.join("chat_template.jinja").is_file());
                fingerprints.push(model.manifest.fingerprint.clone());
                assert_eq!(prepare(options).unwrap().outcome, Outcome::AlreadyThere);
            }
        }
        assert!(
            fingerprints.iter().all(|f| *f == fingerprints[0]),
            "{family}: {fingerprints:?}"
        );
    }
}

#[test]
fn broken_sources_leave_nothing_behind() {
    let temporary = tempfile::tempdir().unwrap();
    let source = temporary.path().join("source");
    let config = families().remove(0);
    write_source(&source, &config, Dtype::Bf16, 1);
    let weights = fs::read(source.join("model.safetensors")).unwrap();
    let out = temporary.path().join("out/model");
    for length in (0..weights.len()).step_by(97) {
        fs::write(source.join("model.safetensors"), &weights[..length]).unwrap();
        let error = prepare(PrepareOptions::new(source.to_str().unwrap(), &out))
            .unwrap_err()
            .to_string();
        assert!(error.contains("model.safetensors"), "{error}");
    }
    let mut broken = weights.clone();
    let end = broken.len();
    broken[end - 2..].copy_from_slice(&bf16::NAN.to_le_bytes());
    fs::write(source.join("model.safetensors"), &broken).unwrap();
    let error = prepare(PrepareOptions::new(source.to_str().unwrap(), &out))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("model.norm.weight") && error.contains("not finite"),
        "{error}"
    );
    assert_eq!(
        fs::read_dir(temporary.path().join("out")).unwrap().count(),
        0,
        "a partial directory is left"
    );
}

/// Found by fuzzing: the tokenizers crate panics over a decoder that breaks off.
#[test]
fn a_tokenizer_that_breaks_off_is_named() {
    let temporary = tempfile::tempdir().unwrap();
    let source = temporary.path().join("source");
    write_source(&source, &families().remove(0), Dtype::Bf16, 1);
    let tokenizer = TOKENIZER.replace(r#""decoder":null"#, r#""decoder":{"type":"Fuse"}"#);
    assert!(tokenizer.contains("Fuse"));
    for end in 1..tokenizer.trim_end().len() {
        fs::write(source.join("tokenizer.json"), &tokenizer[..end]).unwrap();
        let mut options = PrepareOptions::new(source.to_str().unwrap(), temporary.path());
        options.dry_run = true;
        let error = prepare(options).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
    }
}

#[test]
fn limits_are_kept_within_the_model_and_noted() {
    let temporary = tempfile::tempdir().unwrap();
    let source = temporary.path().join("source");
    write_source(&source, &families().remove(0), Dtype::Bf16, 1);
    let options = |tokens_max, batch_max| {
        let out = temporary.path().join("out");
        let mut options = PrepareOptions::new(source.to_str().unwrap(), &out);
        (options.tokens_max, options.batch_max) = (tokens_max, batch_max);
        options
    };
    for (tokens, batch, expected) in [
        (Some(0), None, "at least 1 token"),
        (Some(65), None, "cannot be 65 tokens: the model goes to 64"),
        (None, Some(0), "at least 1 sequence"),
    ] {
        let error = prepare(options(tokens, batch)).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let mut uneven = options(None, None);
    uneven.tp_size = 3;
    let error = prepare(uneven).unwrap_err().to_string();
    assert!(
        error.contains("size 3 does not divide the model's 2 key/value heads"),
        "{error}"
    );
    assert_eq!(
        fs::read_dir(temporary.path()).unwrap().count(),
        1,
        "something was written"
    );

    prepare(options(Some(32), Some(4))).unwrap();
    let manifest = ModelDir::open(temporary.path().join("out"))
        .unwrap()
        .manifest;
    assert_eq!((manifest.tokens_max, manifest.spec.tokens_max), (32, 32));
    assert_eq!(manifest.batch_max, Some(4));
    // Other limits are another model directory, of the same model.
    let error = prepare(options(None, Some(4))).unwrap_err().to_string();
    assert!(error.contains("prepared otherwise; use --force"), "{error}");
    let mut forced = options(None, Some(4));
    forced.force = true;
    let report = prepare(forced).unwrap();
    assert_eq!(report.outcome, Outcome::Written);
    assert_eq!(report.manifest.unwrap().fingerprint, manifest.fingerprint);
    assert_eq!(
        fs::read_dir(temporary.path()).unwrap().count(),
        2,
        "the old model is left"
    );
}

#[test]
fn force_replaces_models_and_nothing_else() {
    let temporary = tempfile::tempdir().unwrap();
    let source = temporary.path().join("source");
    write_source(&source, &families().remove(0), Dtype::Bf16, 1);
    let out = temporary.path().join("out");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("thesis.txt"), "irreplaceable").unwrap();
    for force in [false, true] {
        let mut options = PrepareOptions::new(source.to_str().unwrap(), &out);
        options.force = force;
        let error = prepare(options).unwrap_err().to_string();
        assert!(error.starts_with("cannot write the model to"), "{error}");
        assert_eq!(fs::read(out.join("thesis.txt")).unwrap(), b"irreplaceable");
    }
    // A broken model is one to replace.
    fs::remove_file(out.join("thesis.txt")).unwrap();
    fs::write(out.join("manifest.json"), "{").unwrap();
    let mut options = PrepareOptions::new(source.to_str().unwrap(), &out);
    let error = prepare(options.clone()).unwrap_err().to_string();
    assert!(error.contains("use --force"), "{error}");
    options.force = true;
    prepare(options).unwrap();
    ModelDir::open(&out).unwrap().verify().unwrap();
}

#[test]
fn a_dry_run_plans_and_writes_nothing() {
    let temporary = tempfile::tempdir().unwrap();
    let source = temporary.path().join("source");
    write_source(&source, &families().remove(0), Dtype::Bf16, 1);
    let mut options = PrepareOptions::new(source.to_str().unwrap(), temporary.path().join("a/b"));
    (options.dry_run, options.tp_size, options.name) = (true, 2, Some("mine".to_owned()));
    let report = prepare(options).unwrap();
    assert_eq!(report.outcome, Outcome::Planned);
    assert!(report.manifest.is_none());
    assert_eq!(
        (report.plan.name.as_str(), report.plan.tp_size),
        ("mine", 2)
    );
    assert!(report.plan.to_string().contains("64 tokens a sequence"));
    assert!(!temporary.path().join("a").exists());
}
