//! Lists of layers: their kinds, their KV groups, and how they are written down.

use std::sync::Arc;

use serde_json::{Value, json};

use super::*;
use crate::weights::{WeightFormat, check_tp_size, expected_tensors, names};

fn flat() -> Value {
    json!({
        "family": "mistral", "hidden": 64, "intermediate": 96, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 16,
        "vocab": 100, "tokens_max": 4096, "rms_eps": 0.5, "rope": { "theta": 10000.0, "scaling": { "kind": "none" } },
        "qkv_bias": false, "qk_norm": true, "tied_embeddings": false, "sliding_window": 32
    })
}

fn uniform() -> ModelSpec {
    serde_json::from_value(flat()).unwrap()
}

fn attention(spec: &mut ModelSpec, layer: usize) -> &mut AttentionSpec {
    let Mixer::Attention(attention) = &mut Arc::make_mut(&mut spec.layers[layer]).mixer;
    attention
}

/// Layers 0 and 2 slide, 1 does not, 3 has other KV.
fn mixed() -> ModelSpec {
    let mut spec = uniform();
    attention(&mut spec, 1).sliding_window = None;
    let last = attention(&mut spec, 3);
    (last.kv_heads, last.head_dim) = (1, 32);
    spec
}

#[test]
fn layers_that_are_alike_are_one_kind_and_one_group() {
    let spec = uniform();
    assert_eq!((spec.layers.len(), spec.kinds().len()), (4, 1));
    assert!(Arc::ptr_eq(spec.one_kind().unwrap(), &spec.layers[3]));
    let group = KvGroup {
        kv_heads: 2,
        head_dim: 16,
        layers: vec![0, 1, 2, 3],
    };
    assert_eq!(spec.kv_groups(), [group]);
    // Alike is what is equal, shared or not.
    let mut copied = spec.clone();
    copied.layers[2] = Arc::new((*copied.layers[2]).clone());
    assert_eq!((copied.kinds().len(), copied == spec), (1, true));
}

#[test]
fn groups_are_by_strides_and_need_not_be_consecutive() {
    let mut spec = mixed();
    spec.layers.swap(2, 3);
    let group = |kv_heads, head_dim, layers: &[usize]| KvGroup {
        kv_heads,
        head_dim,
        layers: layers.to_vec(),
    };
    // A window changes what is read, not how it lies.
    assert_eq!(
        spec.kv_groups(),
        [group(2, 16, &[0, 1, 3]), group(1, 32, &[2])]
    );
}

#[test]
fn a_model_of_several_kinds_is_no_uniform_one() {
    let spec = mixed();
    assert_eq!(spec.kinds().len(), 3);
    let error = UniformSpec::try_from(&spec).unwrap_err();
    assert_eq!(
        error,
        "its layers differ (2 with sliding attention over 32 tokens of 4/2 heads of 16 and a gated MLP of 96, 1 with full \
         attention of 4/2 heads of 16 and a gated MLP of 96, 1 with sliding attention over 32 tokens of 4/1 heads of 32 \
         and a gated MLP of 96); only models whose layers are all alike are supported"
    );
}

/// Fingerprints are taken of these bytes, and directories that were prepared long ago hold them.
#[test]
fn alike_layers_are_written_as_they_always_were() {
    const WRITTEN: &str = concat!(
        r#"{"family":"mistral","hidden":64,"intermediate":96,"layers":4,"heads":4,"kv_heads":2,"head_dim":16,"#,
        r#""vocab":100,"tokens_max":4096,"rms_eps":0.5,"rope":{"theta":10000.0,"scaling":{"kind":"none"}},"#,
        r#""qkv_bias":false,"qk_norm":true,"tied_embeddings":false,"sliding_window":32}"#
    );
    assert_eq!(serde_json::to_string(&uniform()).unwrap(), WRITTEN);
    assert_eq!(
        serde_json::from_str::<ModelSpec>(WRITTEN).unwrap(),
        uniform()
    );
}

#[test]
fn layers_that_differ_are_written_as_kinds() {
    let spec = mixed();
    let written = serde_json::to_value(&spec).unwrap();
    assert_eq!(written["layers"], json!([0, 1, 0, 2]));
    assert_eq!(written["kinds"].as_array().unwrap().len(), 3);
    let read: ModelSpec = serde_json::from_value(written).unwrap();
    assert_eq!(read, spec);
    assert!(Arc::ptr_eq(&read.layers[0], &read.layers[2]));
}

#[test]
fn what_is_read_is_checked() {
    let mixed = serde_json::to_value(mixed()).unwrap();
    for (base, path, value, expected) in [
        (
            &flat(),
            "/layers",
            json!(1u64 << 60),
            "layers is 1152921504606846976",
        ),
        (&flat(), "/layers", json!(0), "layers is 0"),
        (&flat(), "/kv_heads", json!(3), "cannot share"),
        (&flat(), "/sliding_window", json!(0), "sliding_window is 0"),
        (&flat(), "/hidden", Value::Null, "invalid type"),
        (
            &mixed,
            "/layers/1",
            json!(3),
            "a layer is of kind 3, there are 3 kinds",
        ),
        (&mixed, "/layers", json!([]), "layers is 0"),
        (&mixed, "/layers", json!(vec![0; 1025]), "layers is 1025"),
        (
            &mixed,
            "/kinds/2/mixer/attention/head_dim",
            json!(15),
            "even number",
        ),
        (
            &mixed,
            "/kinds/1/mlp/gated/intermediate",
            json!(0),
            "intermediate is 0",
        ),
    ] {
        let mut broken = base.clone();
        *broken.pointer_mut(path).unwrap() = value;
        let error = serde_json::from_value::<ModelSpec>(broken).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn weights_are_those_of_each_layers_kind() {
    let mut spec = mixed();
    attention(&mut spec, 1).qk_norm = false;
    attention(&mut spec, 3).qkv_bias = true;
    let tensors = expected_tensors(&spec);
    let shape = |layer: usize, name: &str| {
        let name = names::layer(layer, name);
        let found = tensors.iter().find(|tensor| tensor.name == name);
        found.map(|tensor| tensor.shape.clone())
    };
    assert_eq!(shape(0, names::K), Some(vec![32, 64]));
    assert_eq!(shape(3, names::Q), Some(vec![128, 64]));
    assert_eq!(shape(3, names::O), Some(vec![64, 128]));
    assert_eq!(shape(3, names::K_BIAS), Some(vec![32]));
    assert_eq!(shape(0, names::K_BIAS), None);
    assert_eq!(shape(0, names::Q_NORM), Some(vec![16]));
    assert_eq!(shape(1, names::Q_NORM), None);
    // Layer 3 alone has one key/value head.
    let error = check_tp_size(&spec, WeightFormat::Bf16, 2).unwrap_err();
    assert!(error.to_string().contains("1 key/value heads"), "{error}");
    assert!(check_tp_size(&uniform(), WeightFormat::Bf16, 2).is_ok());
}
