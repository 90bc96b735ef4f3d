//! GGUF files made by hand: prepared whole, then spoilt in every way we could think of.

mod synthetic;

use std::fs;
use std::path::{Path, PathBuf};

use baton_model::ModelDir;
use baton_model_prep::{Outcome, PrepareOptions, prepare};
use half::bf16;
use proptest::prelude::*;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use synthetic::{Entry, Gguf, HEAD_DIM, HIDDEN, INTERMEDIATE, Meta, VOCAB};
use tempfile::TempDir;

/// Address space for a test of hostile files, which are a few kilobytes long: an allocation of the size
/// that one of them claims to need ends the test.
const ADDRESS_SPACE_BYTES_MAX: u64 = 1 << 30;

struct Bench {
    directory: TempDir,
    file: PathBuf,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("tiny.gguf");
        Bench { directory, file }
    }

    /// A bench on which no allocation can be large.
    fn bounded() -> Self {
        let limit = Rlimit {
            current: Some(ADDRESS_SPACE_BYTES_MAX),
            ..getrlimit(Resource::As)
        };
        setrlimit(Resource::As, limit).unwrap();
        Bench::new()
    }

    fn options(&self) -> PrepareOptions {
        PrepareOptions::new(
            self.file.to_str().unwrap(),
            self.directory.path().join("out"),
        )
    }

    /// What a dry run says of these bytes, if it is an error. Every error must name the file.
    fn refusal(&self, bytes: &[u8]) -> Option<String> {
        fs::write(&self.file, bytes).unwrap();
        let mut options = self.options();
        options.dry_run = true;
        let error = prepare(options).err()?.to_string();
        assert!(error.contains("tiny.gguf"), "no file is named: {error}");
        Some(error)
    }
}

fn column(model: &ModelDir, tensor: &str, width: usize) -> Vec<f32> {
    let weights = model.weights(0).unwrap();
    let bytes = weights.tensor(tensor).unwrap().bytes.to_vec();
    let values: Vec<f32> = bytes
        .chunks_exact(2)
        .map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32())
        .collect();
    values
        .chunks_exact(width)
        .map(|row| {
            assert!(row.iter().all(|v| *v == row[0]), "{tensor}: {row:?}");
            row[0]
        })
        .collect()
}

#[test]
fn every_format_is_read_and_rows_of_q_and_k_go_back_in_order() {
    let bench = Bench::new();
    fs::write(&bench.file, Gguf::tiny().bytes()).unwrap();
    let report = prepare(bench.options()).unwrap();
    assert_eq!(report.outcome, Outcome::Written);
    let model = ModelDir::open(&report.plan.out).unwrap();
    model.verify().unwrap();
    assert_eq!(model.manifest.name, "tiny");
    let kv = model.spec().kv_groups();
    assert_eq!((kv.len(), kv[0].head_dim), (1, HEAD_DIM));
    assert_eq!(model.manifest.eos_token_ids, [5]);
    assert!(report.plan.out.join("chat_template.jinja").is_file());

    let counting = |n: usize| (0..n).map(|row| row as f32).collect::<Vec<_>>();
    let modulo = |n: usize, less: f32| {
        (0..n)
            .map(|row| (row % 16) as f32 - less)
            .collect::<Vec<_>>()
    };
    let layer = |name: &str| format!("model.layers.0.{name}");
    let attention = |name: &str| {
        column(
            &model,
            &layer(&format!("self_attn.{name}_proj.weight")),
            HIDDEN,
        )
    };
    assert_eq!(attention("q"), counting(32));
    assert_eq!(attention("k"), counting(16));
    assert_eq!(attention("v"), counting(16));
    assert_eq!(attention("o"), modulo(HIDDEN, 8.0));
    assert_eq!(
        column(&model, "model.embed_tokens.weight", HIDDEN),
        counting(VOCAB)
    );
    assert_eq!(
        column(&model, &layer("mlp.gate_proj.weight"), HIDDEN),
        modulo(INTERMEDIATE, 8.0)
    );
    assert_eq!(
        column(&model, &layer("mlp.up_proj.weight"), HIDDEN),
        modulo(INTERMEDIATE, 0.0)
    );
    assert_eq!(
        column(&model, &layer("mlp.down_proj.weight"), INTERMEDIATE),
        vec![5.0; HIDDEN]
    );
    assert_eq!(column(&model, "model.norm.weight", 1), vec![1.0; HIDDEN]);
}

#[test]
fn a_file_cut_off_anywhere_is_refused() {
    let bench = Bench::bounded();
    let gguf = Gguf::tiny();
    let (bytes, header) = (gguf.bytes(), gguf.header().len());
    // Behind the last tensor there is padding alone, which may be missing.
    let needed = bytes.len() - (32 - (HIDDEN * 4) % 32) % 32;
    let lengths = (0..=header)
        .chain((header..needed).step_by(13))
        .chain([needed - 1]);
    for length in lengths {
        let error = bench
            .refusal(&bytes[..length])
            .unwrap_or_else(|| panic!("{length} bytes are enough"));
        if length > header {
            assert!(
                error.contains("tensor `") && error.contains("is cut off"),
                "{error}"
            );
        }
    }
    assert_eq!(bench.refusal(&bytes), None);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Changed bytes anywhere in the header: prepared or refused, nothing else.
    #[test]
    fn changed_bytes_are_read_or_refused(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        words in prop::collection::vec(
            (any::<prop::sample::Index>(), prop::sample::select(vec![0, 1, u64::MAX, 1 << 63, 1 << 40, 1 << 20])),
            0..2,
        ),
    ) {
        thread_local!(static BENCH: Bench = Bench::bounded());
        let gguf = Gguf::tiny();
        let (mut bytes, header) = (gguf.bytes(), gguf.header().len());
        for (at, value) in changes {
            bytes[at.index(header)] = value;
        }
        for (at, value) in words {
            let at = at.index(header - 8);
            bytes[at..at + 8].copy_from_slice(&u64::to_le_bytes(value));
        }
        BENCH.with(|bench| bench.refusal(&bytes));
    }
}

/// Changed weights: what a dry run accepts is written or refused with the tensor's name.
#[test]
fn changed_weights_are_written_or_refused_by_name() {
    let bench = Bench::bounded();
    let gguf = Gguf::tiny();
    let (bytes, data) = (gguf.bytes(), gguf.header().len().next_multiple_of(32));
    for (i, at) in (data..bytes.len()).step_by(997).enumerate() {
        let mut bytes = bytes.clone();
        bytes[at] ^= 0xFF;
        bytes[at + 1] ^= 0xFF;
        assert_eq!(bench.refusal(&bytes), None);
        let mut options = bench.options();
        options.out = bench.directory.path().join(i.to_string());
        if let Err(error) = prepare(options) {
            let error = error.to_string();
            assert!(
                error.contains("tensor `") && error.contains("not finite"),
                "{error}"
            );
        }
    }
}

#[test]
fn hostile_headers_are_refused_with_the_reason() {
    let bench = Bench::bounded();
    let list = |kind: u32, count: u64| {
        Meta::Raw(9, [&kind.to_le_bytes()[..], &count.to_le_bytes()].concat())
    };
    let with_meta = |key, value| {
        let mut gguf = Gguf::tiny();
        gguf.set(key, value);
        gguf.bytes()
    };
    let with_entry = |name: &str, change: &dyn Fn(&mut Entry)| {
        let mut gguf = Gguf::tiny();
        change(gguf.entry(name));
        gguf.bytes()
    };
    let with_word = |at: usize, value: u64| {
        let mut bytes = Gguf::tiny().bytes();
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        bytes
    };
    let mut twice = Gguf::tiny();
    twice.metadata.push(("llama.block_count", Meta::U32(1)));
    let mut double = Gguf::tiny();
    double.entries.push(double.entries[0].clone());
    let q = "blk.0.attn_q.weight";
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (b"GGML\x03\0\0\0".to_vec(), "does not begin with GGUF"),
        (b"GGUF\0\0\0\x03".to_vec(), "big-endian"),
        (b"GGUF\x01\0\0\0".to_vec(), "version 1"),
        (with_word(8, u64::MAX), "18446744073709551615 tensors"),
        (
            with_word(16, u64::MAX),
            "18446744073709551615 metadata pairs",
        ),
        (with_word(8, 60_000), "truncated or corrupt"),
        (with_word(16, 60_000), ""),
        (with_word(24, u64::MAX), "truncated or corrupt"),
        (with_word(24, 1 << 40), "truncated or corrupt"),
        (twice.bytes(), "`llama.block_count` is there twice"),
        (double.bytes(), "tensor `token_embd.weight` is there twice"),
        (with_meta("x", list(4, u64::MAX)), "truncated or corrupt"),
        (
            with_meta("x", list(8, u64::MAX / 8 + 1)),
            "truncated or corrupt",
        ),
        (with_meta("x", list(9, 1)), "unknown type 9"),
        (with_meta("x", list(77, 1)), "unknown type 77"),
        (with_meta("x", Meta::Raw(13, Vec::new())), "`x`"),
        (
            with_meta("x", Meta::Raw(8, u64::MAX.to_le_bytes().to_vec())),
            "truncated or corrupt",
        ),
        (
            with_meta("general.alignment", Meta::U32(0)),
            "alignment 0 is impossible",
        ),
        (
            with_meta("general.alignment", Meta::U32(48)),
            "alignment 48 is impossible",
        ),
        (
            with_meta("general.alignment", Meta::U32(1 << 31)),
            "alignment 2147483648 is impossible",
        ),
        (
            with_meta("general.architecture", Meta::Text("qwen2")),
            "\"qwen2\" is not supported",
        ),
        (
            with_meta("llama.expert_count", Meta::U32(8)),
            "mixture of experts",
        ),
        (
            with_meta("llama.block_count", Meta::U32(u32::MAX)),
            "layers is 4294967295",
        ),
        (
            with_meta("llama.block_count", Meta::Text("1")),
            "`llama.block_count` should be a whole number",
        ),
        (
            with_meta("llama.block_count", Meta::U32(2)),
            "tensor `blk.1.",
        ),
        (
            with_meta("llama.attention.head_count", Meta::U32(0)),
            "no attention heads",
        ),
        (
            with_meta("llama.attention.head_count", Meta::U32(3)),
            "it should be [30, 32]",
        ),
        (
            with_meta(
                "llama.attention.layer_norm_rms_epsilon",
                Meta::F32(f32::NAN),
            ),
            "rms_eps",
        ),
        (
            with_meta("llama.rope.freq_base", Meta::F32(f32::INFINITY)),
            "rotary embedding",
        ),
        (with_meta("llama.rope.dimension_count", Meta::U32(8)), ""),
        (
            with_meta("llama.rope.scaling.type", Meta::Text("yarn")),
            "\"yarn\" is not supported",
        ),
        (
            with_entry(q, &|e| e.dims = vec![1 << 62, 4, 4]),
            "tensor `blk.0.attn_q.weight` has the impossible shape",
        ),
        (
            with_entry(q, &|e| e.dims = vec![1 << 62, 1]),
            "tensor `blk.0.attn_q.weight` is cut off",
        ),
        (with_entry(q, &|e| e.dims = vec![0, 32]), "impossible shape"),
        (with_entry(q, &|e| e.dims = Vec::new()), "has the shape []"),
        (with_entry(q, &|e| e.dims = vec![1; 5]), "has 5 dimensions"),
        (
            with_entry(q, &|e| e.dims = vec![32, 16]),
            "tensor `blk.0.attn_q.weight` has the shape [16, 32], it should be",
        ),
        (
            with_entry(q, &|e| e.offset = !31),
            "tensor `blk.0.attn_q.weight` is cut off",
        ),
        (with_entry(q, &|e| e.offset += 1), "not aligned to 32"),
        (
            with_entry(q, &|e| e.offset -= 32),
            "tensor `blk.0.attn_q.weight` overlaps `blk.0.attn_norm.weight`",
        ),
        (with_entry(q, &|e| e.format = 12), "Q4_K (12)"),
        (
            with_entry(q, &|e| e.format = u32::MAX),
            "unknown (4294967295)",
        ),
        (
            with_entry("blk.0.attn_v.weight", &|e| e.dims = vec![16, 32]),
            "rows of 16 elements, which Q8_0 cannot hold",
        ),
        (
            with_entry(q, &|e| e.name = "blk.0.attn_q.bias"),
            "tensor `blk.0.attn_q.bias` belongs to no Llama model",
        ),
    ];
    for (i, (bytes, expected)) in cases.iter().enumerate() {
        let error = bench
            .refusal(bytes)
            .unwrap_or_else(|| panic!("case {i} ({expected}) is accepted"));
        assert!(
            error.contains(expected),
            "case {i}: {error:?} should contain {expected:?}"
        );
    }
    assert!(!Path::new(&bench.directory.path().join("out")).exists());
}

/// `general.sampling.*`, as llama.cpp's tools write it, and nothing that the file does not say.
#[test]
fn defaults_of_sampling_are_the_files_own() {
    let bench = Bench::new();
    let config = |gguf: &Gguf| -> serde_json::Value {
        fs::write(&bench.file, gguf.bytes()).unwrap();
        let mut options = bench.options();
        options.force = true;
        let out = prepare(options).unwrap().plan.out;
        let text = fs::read_to_string(out.join("generation_config.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    };
    let mut gguf = Gguf::tiny();
    let silent = config(&gguf);
    for name in [
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
    ] {
        assert!(silent.get(name).is_none(), "{name}: {silent}");
    }
    // A family whose model card recommends something, and is not asked where the file does.
    gguf.set("general.basename", Meta::Text("smollm2"));
    let of_card = config(&gguf);
    assert_eq!(
        (&of_card["temperature"], &of_card["top_p"]),
        (&0.2.into(), &0.9.into())
    );
    assert!(!of_card["eos_token_id"].is_null(), "{of_card}");
    gguf.set("general.sampling.temp", Meta::F32(0.2));
    gguf.set("general.sampling.top_k", Meta::U32(40));
    let said = config(&gguf);
    assert_eq!(said["temperature"], 0.2, "not 0.20000000298");
    assert_eq!(said["top_k"], 40);
    assert!(said.get("top_p").is_none());
    gguf.set("general.sampling.temp", Meta::Text("warm"));
    let error = bench.refusal(&gguf.bytes()).expect("no number");
    assert!(error.contains("general.sampling.temp"), "{error}");
}
