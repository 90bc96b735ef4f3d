//! FP8 directories: made from BF16, or kept from Hugging Face checkpoints of every kind, whole and divided.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use baton_model::{
    Dtype, Fp8Matrix, Fp8Scales, Manifest, MatrixBytes, ModelDir, Split, TensorSource, TensorSpec,
    WeightFormat, expected_tensors, header_bytes, names, parse_config,
};
use baton_model_prep::{Outcome, Precision, PrepareOptions, prepare};
use half::bf16;
use serde_json::{Value, json};
use tempfile::TempDir;

const TOKENIZER: &str = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
"pre_tokenizer":null,"post_processor":null,"decoder":null,
"model":{"type":"BPE","dropout":null,"unk_token":null,"continuing_subword_prefix":null,"end_of_word_suffix":null,
"fuse_unk":false,"byte_fallback":false,"ignore_merges":false,"vocab":{"a":0,"b":1,"</s>":2},"merges":[]}}"#;

/// A checkpoint in memory, to be spoilt and written.
struct Source {
    config: Value,
    tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>,
}

/// Two ranks share its 128×128 blocks evenly; some blocks are not full.
fn config() -> Value {
    json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 144, "intermediate_size": 256,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 6,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "hidden_act": "silu", "eos_token_id": 2
    })
}

fn tensors(config: &Value) -> Vec<TensorSpec> {
    expected_tensors(&parse_config(config.to_string().as_bytes()).unwrap())
}

/// Numbers of many sizes, the same every time.
fn numbers(seed: usize, count: usize) -> Vec<u8> {
    let mut state = seed as u64 + 1;
    (0..count)
        .flat_map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(99);
            let x = (state >> 40) as f64 / f64::from(1 << 23) - 1.0;
            bf16::from_f64(x * x * x).to_le_bytes()
        })
        .collect()
}

impl Source {
    fn bf16(config: Value) -> Self {
        let tensors = tensors(&config).into_iter().enumerate().map(|(i, t)| {
            let bytes = numbers(i, t.elements());
            (t.name, (Dtype::Bf16, t.shape, bytes))
        });
        let tensors = tensors.collect();
        Source { config, tensors }
    }

    /// Makes FP8 of a matrix, with scales as some checkpoint has them.
    fn quantize(&mut self, name: &str, scales: Scales) {
        let (_, shape, bytes) = &self.tensors[name];
        let &[rows, columns] = shape.as_slice() else {
            panic!("{name}")
        };
        let shape = shape.clone();
        let (suffix, dtype, scales_shape, matrix) = match scales {
            Scales::Block => {
                let blocks = vec![rows.div_ceil(128), columns.div_ceil(128)];
                let matrix = Fp8Matrix::per_block(bytes, rows, columns);
                ("_scale_inv", Dtype::F32, blocks, matrix)
            }
            Scales::Channel => {
                let matrix = Fp8Matrix::per_channel(bytes, rows, columns);
                ("_scale", Dtype::Bf16, vec![rows, 1], matrix)
            }
            // 1/8: large enough for numbers up to one.
            Scales::Tensor(shape) => {
                let mut matrix = Fp8Matrix::per_channel(bytes, rows, columns);
                matrix.scales = Fp8Scales::Channel(vec![0.125]);
                ("_scale", Dtype::F32, shape.to_vec(), matrix)
            }
        };
        let (Fp8Scales::Block(values) | Fp8Scales::Channel(values)) = &matrix.scales;
        let scales = match dtype {
            Dtype::F32 => values.iter().flat_map(|s| s.to_le_bytes()).collect(),
            _ => values
                .iter()
                .flat_map(|s| bf16::from_f32(*s).to_le_bytes())
                .collect(),
        };
        let codes = matrix.codes.into_owned();
        self.tensors
            .insert(format!("{name}{suffix}"), (dtype, scales_shape, scales));
        self.tensors
            .insert(name.to_owned(), (Dtype::F8E4M3, shape, codes));
    }

    fn projections(&self) -> Vec<String> {
        let names = self
            .tensors
            .keys()
            .filter(|name| names::is_projection(name));
        names.cloned().collect()
    }

    fn write(&self, dir: &Path) {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join("config.json"), self.config.to_string()).unwrap();
        fs::write(dir.join("tokenizer.json"), TOKENIZER).unwrap();
        let header: Vec<_> = self
            .tensors
            .iter()
            .map(|(name, (dtype, shape, _))| (name.clone(), *dtype, shape.clone()))
            .collect();
        let mut file = header_bytes(&header);
        for (_, _, bytes) in self.tensors.values() {
            file.extend_from_slice(bytes);
        }
        fs::write(dir.join("model.safetensors"), file).unwrap();
    }

    /// The scale of each number of an FP8 matrix, found without the code under test.
    fn dequantized(&self, name: &str) -> Vec<u8> {
        let (dtype, shape, codes) = &self.tensors[name];
        if *dtype != Dtype::F8E4M3 {
            return codes.clone();
        }
        let scales = ["_scale", "_scale_inv"].map(|suffix| format!("{name}{suffix}"));
        let (name, (dtype, scales_shape, scales)) = scales
            .iter()
            .find_map(|name| self.tensors.get_key_value(name))
            .unwrap();
        let scale = |at: usize| match dtype {
            Dtype::F32 => f32::from_le_bytes(scales[at * 4..][..4].try_into().unwrap()),
            _ => bf16::from_le_bytes(scales[at * 2..][..2].try_into().unwrap()).to_f32(),
        };
        let columns = shape[1];
        let number = |(i, &code): (usize, &u8)| {
            let (row, column) = (i / columns, i % columns);
            let at = match scales_shape.as_slice() {
                [_, across] if name.ends_with("_inv") => row / 128 * across + column / 128,
                [rows, 1] if *rows == shape[0] => row,
                _ => 0,
            };
            bf16::from_f32(baton_model::f32_from_e4m3(code) * scale(at)).to_le_bytes()
        };
        codes.iter().enumerate().flat_map(number).collect()
    }
}

#[derive(Clone, Copy)]
enum Scales {
    Block,
    Channel,
    Tensor(&'static [usize]),
}

fn quantization(scales: Scales) -> Value {
    match scales {
        Scales::Block => json!({
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]
        }),
        Scales::Channel => json!({
            "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
            "config_groups": { "group_0": {
                "targets": ["Linear"], "weights": { "num_bits": 8, "type": "float", "strategy": "channel" }
            } }
        }),
        Scales::Tensor(_) => json!({ "quant_method": "fp8", "activation_scheme": "static" }),
    }
}

/// A checkpoint whose projections are all FP8.
fn fp8_source(scales: Scales) -> Source {
    let mut source = Source::bf16(config());
    source.config["quantization_config"] = quantization(scales);
    for name in source.projections() {
        source.quantize(&name, scales);
    }
    source
}

struct Bench(TempDir);

impl Bench {
    fn new() -> Self {
        Bench(tempfile::tempdir().unwrap())
    }

    fn options(&self, source: &Source, dtype: Option<Precision>, tp_size: usize) -> PrepareOptions {
        let dir = self.0.path().join("source");
        source.write(&dir);
        let out = self.0.path().join(format!("{dtype:?}-{tp_size}"));
        let mut options = PrepareOptions::new(dir.to_str().unwrap(), out);
        (options.dtype, options.tp_size, options.force) = (dtype, tp_size, false);
        options
    }

    fn prepared(&self, source: &Source, dtype: Option<Precision>, tp_size: usize) -> ModelDir {
        let options = self.options(source, dtype, tp_size);
        let out: PathBuf = options.out.clone();
        let report = prepare(options.clone()).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(report.outcome, Outcome::Written);
        assert_eq!(prepare(options).unwrap().outcome, Outcome::AlreadyThere);
        let model = ModelDir::open(out).unwrap();
        model.verify().unwrap();
        let written = fs::metadata(model.path.join("rank0.safetensors"))
            .unwrap()
            .len();
        let header = written - report.plan.rank_bytes;
        assert!(header < 8_192, "{header} bytes more than planned");
        model
    }

    fn refusal(&self, source: &Source, dtype: Option<Precision>, tp_size: usize) -> String {
        let error = prepare(self.options(source, dtype, tp_size)).unwrap_err();
        error.to_string()
    }
}

/// Puts the ranks' parts of a projection together, codes and scales.
fn whole(model: &ModelDir, tensor: &TensorSpec) -> Fp8Matrix<'static> {
    let tp_size = model.manifest.tp_size;
    let &[rows, columns] = tensor.rank_shape(tp_size).as_slice() else {
        panic!()
    };
    let ranks: Vec<_> = (0..tp_size)
        .map(|rank| model.weights(rank).unwrap())
        .collect();
    let parts: Vec<Fp8Matrix> = ranks
        .iter()
        .map(
            |rank| match rank.projection(&tensor.name, rows, columns).unwrap() {
                MatrixBytes::Fp8(matrix) => matrix,
                MatrixBytes::Bf16(_) => panic!("{} is BF16", tensor.name),
            },
        )
        .collect();
    let of = |row: usize, column: usize| match tensor.split {
        Split::Rows => (row / rows, row % rows, column),
        Split::Columns => (column / columns, row, column % columns),
        Split::Replicated => unreachable!("no projection is"),
    };
    let (all_rows, all_columns) = (tensor.rows(), tensor.columns());
    let every = (0..all_rows).flat_map(|row| (0..all_columns).map(move |column| (row, column)));
    let codes: Vec<u8> = every
        .map(|(row, column)| {
            let (part, row, column) = of(row, column);
            parts[part].codes[row * columns + column]
        })
        .collect();
    let scale = |row, column| {
        let (part, row, column) = of(row, column);
        parts[part].scale(row, column)
    };
    let scales = match &parts[0].scales {
        Fp8Scales::Channel(_) => {
            if tensor.split == Split::Columns {
                assert!(parts.iter().all(|part| part.scales == parts[0].scales));
            }
            Fp8Scales::Channel((0..all_rows).map(|row| scale(row, 0)).collect())
        }
        Fp8Scales::Block(_) => {
            let blocks = (0..all_rows).step_by(128).flat_map(|row| {
                (0..all_columns)
                    .step_by(128)
                    .map(move |column| (row, column))
            });
            Fp8Scales::Block(blocks.map(|(row, column)| scale(row, column)).collect())
        }
    };
    Fp8Matrix {
        rows: all_rows,
        columns: all_columns,
        codes: codes.into(),
        scales,
    }
}

/// All BF16 tensors of a directory of one rank.
fn assert_bf16(model: &ModelDir, source: &Source) {
    let weights = model.weights(0).unwrap();
    for tensor in expected_tensors(model.spec()) {
        if !(tensor.projection && model.manifest.dtype.is_fp8()) {
            let bytes = weights.bf16(&tensor.name).unwrap().bytes;
            assert!(bytes == source.dequantized(&tensor.name), "{}", tensor.name);
        }
    }
}

#[test]
fn fp8_is_made_from_bf16_with_a_scale_for_each_channel() {
    let (bench, source) = (Bench::new(), Source::bf16(config()));
    let fingerprint = |manifest: &Manifest| manifest.fingerprint.clone();
    let plain = bench.prepared(&source, None, 1);
    assert_eq!(plain.manifest.dtype, WeightFormat::Bf16);
    for tp_size in [1, 2] {
        let model = bench.prepared(&source, Some(Precision::Fp8), tp_size);
        assert_eq!(model.manifest.dtype, WeightFormat::Fp8Channel);
        assert_eq!(
            fingerprint(&model.manifest),
            fingerprint(&plain.manifest),
            "it is the same model"
        );
        for tensor in expected_tensors(model.spec())
            .iter()
            .filter(|t| t.projection)
        {
            let (_, _, bytes) = &source.tensors[&tensor.name];
            let expected = Fp8Matrix::per_channel(bytes, tensor.rows(), tensor.columns());
            assert!(whole(&model, tensor) == expected, "{}", tensor.name);
        }
        if tp_size == 1 {
            assert_bf16(&model, &source);
        }
    }
    // BF16 where FP8 is, or the reverse, is another directory.
    let mut options = bench.options(&source, Some(Precision::Fp8), 1);
    options.dtype = Some(Precision::Bf16);
    let error = prepare(options).unwrap_err().to_string();
    assert!(error.contains("prepared otherwise; use --force"), "{error}");
}

#[test]
fn fp8_checkpoints_are_kept_as_they_are() {
    for (scales, format) in [
        (Scales::Block, WeightFormat::Fp8Block),
        (Scales::Channel, WeightFormat::Fp8Channel),
        (Scales::Tensor(&[]), WeightFormat::Fp8Channel),
        (Scales::Tensor(&[1]), WeightFormat::Fp8Channel),
    ] {
        let (bench, mut source) = (Bench::new(), fp8_source(scales));
        source.quantize(names::LM_HEAD, scales);
        for name in source.projections() {
            let name = name.replace("weight", "input_scale");
            let scale = (Dtype::F32, vec![], 1f32.to_le_bytes().to_vec());
            source.tensors.insert(name, scale);
        }
        let mut fingerprints = Vec::new();
        for (dtype, tp_size) in [(None, 1), (None, 2), (Some(Precision::Fp8), 1)] {
            let model = bench.prepared(&source, dtype, tp_size);
            assert_eq!(model.manifest.dtype, format);
            for tensor in expected_tensors(model.spec())
                .iter()
                .filter(|t| t.projection)
            {
                let matrix = whole(&model, tensor);
                let (_, _, codes) = &source.tensors[&tensor.name];
                assert!(*matrix.codes == **codes, "{}", tensor.name);
                let mut bf16 = Vec::new();
                matrix.dequantize(&mut bf16);
                assert!(bf16 == source.dequantized(&tensor.name), "{}", tensor.name);
            }
            if tp_size == 1 {
                assert_bf16(&model, &source);
            }
            fingerprints.push(model.manifest.fingerprint);
        }
        let model = bench.prepared(&source, Some(Precision::Bf16), 1);
        assert_eq!(model.manifest.dtype, WeightFormat::Bf16);
        assert_bf16(&model, &source);
        fingerprints.push(model.manifest.fingerprint);
        assert!(fingerprints.iter().all(|f| *f == fingerprints[0]));
    }
}

/// The matrices of the feed-forward layer have more than the million elements that are read at a time.
#[test]
fn matrices_of_several_pieces_are_whole() {
    let mut config = config();
    config["intermediate_size"] = json!(8192);
    let (bench, mut source) = (Bench::new(), Source::bf16(config));
    let whole_is = |model: &ModelDir, expected: &dyn Fn(&TensorSpec) -> Vec<u8>| {
        for tensor in expected_tensors(model.spec())
            .iter()
            .filter(|t| t.projection)
        {
            let mut bytes = Vec::new();
            whole(model, tensor).dequantize(&mut bytes);
            assert!(bytes == expected(tensor), "{}", tensor.name);
        }
    };
    let made = bench.prepared(&source, Some(Precision::Fp8), 2);
    whole_is(&made, &|tensor| {
        let (_, _, bytes) = &source.tensors[&tensor.name];
        let matrix = Fp8Matrix::per_channel(bytes, tensor.rows(), tensor.columns());
        let mut bytes = Vec::new();
        matrix.dequantize(&mut bytes);
        bytes
    });

    source.config["quantization_config"] = quantization(Scales::Block);
    for name in source.projections() {
        source.quantize(&name, Scales::Block);
    }
    let kept = bench.prepared(&source, None, 2);
    whole_is(&kept, &|tensor| source.dequantized(&tensor.name));
    let bf16 = bench.prepared(&source, Some(Precision::Bf16), 1);
    assert_bf16(&bf16, &source);
    assert_eq!(bf16.manifest.fingerprint, kept.manifest.fingerprint);
}

#[test]
fn blocks_are_not_cut() {
    let mut config = config();
    config["intermediate_size"] = json!(384);
    let (bench, mut source) = (Bench::new(), Source::bf16(config));
    source.config["quantization_config"] = quantization(Scales::Block);
    for name in source.projections() {
        source.quantize(&name, Scales::Block);
    }
    let error = bench.refusal(&source, None, 2);
    assert!(
        error.contains("gives a rank 192 of the 384 rows of `model.layers.0.mlp.gate_proj.weight`, which cuts a 128×128"),
        "{error}"
    );
    bench.prepared(&source, None, 1);
    bench.prepared(&source, Some(Precision::Bf16), 2);
}

#[test]
fn what_is_wrong_with_an_fp8_checkpoint_is_said() {
    const DOWN: &str = "model.layers.0.mlp.down_proj.weight";
    let spoilt = |scales, spoil: fn(&mut Source)| {
        let mut source = fp8_source(scales);
        spoil(&mut source);
        source
    };
    let scale = |source: &mut Source, value: f32| {
        let scales = source
            .tensors
            .get_mut(&format!("{DOWN}_scale_inv"))
            .unwrap();
        scales.2[4..8].copy_from_slice(&value.to_le_bytes());
    };
    let cases = [
        (
            spoilt(Scales::Block, |s| {
                s.tensors.remove(&format!("{DOWN}_scale_inv"));
            }),
            "there are no scales for it",
        ),
        (
            spoilt(Scales::Block, |s| {
                let scales = s.tensors.get_mut(&format!("{DOWN}_scale_inv")).unwrap();
                scales.0 = Dtype::F8E4M3;
                scales.2.truncate(4);
            }),
            "is F8_E4M3, which scales cannot be",
        ),
        (
            spoilt(Scales::Channel, |s| {
                s.config["quantization_config"] = quantization(Scales::Block)
            }),
            "should be [4, 2]",
        ),
        (
            spoilt(Scales::Block, |s| {
                s.config
                    .as_object_mut()
                    .unwrap()
                    .remove("quantization_config");
            }),
            "belongs to no model that config.json describes",
        ),
        (
            spoilt(Scales::Block, |s| {
                let bf16 = Source::bf16(config()).tensors.remove(DOWN).unwrap();
                s.tensors.insert(DOWN.to_owned(), bf16);
            }),
            "a mixture cannot be served; prepare it with `--dtype bf16`",
        ),
        (
            spoilt(Scales::Block, |s| {
                s.tensors.get_mut(DOWN).unwrap().2[7] = 0xff
            }),
            "not finite, element 7",
        ),
        (
            spoilt(Scales::Block, |s| {
                s.tensors.get_mut(names::FINAL_NORM).unwrap().0 = Dtype::F8E4M3;
                s.tensors
                    .get_mut(names::FINAL_NORM)
                    .unwrap()
                    .2
                    .truncate(144);
            }),
            "which only projections may be",
        ),
    ];
    let bench = Bench::new();
    for (source, expected) in cases {
        let error = bench.refusal(&source, None, 1);
        assert!(
            error.contains("model.safetensors") && error.contains(expected),
            "{error:?}: {expected:?}"
        );
    }
    for value in [f32::NAN, f32::INFINITY, -1.0] {
        let mut source = fp8_source(Scales::Block);
        scale(&mut source, value);
        let error = bench.refusal(&source, None, 1);
        assert!(error.contains("which no scale can be"), "{error}");
    }
    // The product may be too large though both factors are fine.
    let mut source = fp8_source(Scales::Block);
    scale(&mut source, 3e38);
    let error = bench.refusal(&source, None, 1);
    assert!(
        error.contains(DOWN) && error.contains("not finite"),
        "{error}"
    );

    // A mixture dequantizes.
    let mut source = fp8_source(Scales::Block);
    let bf16 = Source::bf16(config()).tensors.remove(DOWN).unwrap();
    source.tensors.insert(DOWN.to_owned(), bf16);
    let model = bench.prepared(&source, Some(Precision::Bf16), 1);
    assert_bf16(&model, &source);

    // FP8 that nobody announced.
    let mut source = Source::bf16(config());
    source.quantize(DOWN, Scales::Block);
    source.tensors.remove(&format!("{DOWN}_scale_inv"));
    let error = bench.refusal(&source, Some(Precision::Fp8), 1);
    assert!(
        error.contains("no `quantization_config` that says so"),
        "{error}"
    );
}

#[test]
fn numbers_that_are_not_finite_are_refused_by_name() {
    let (bench, mut source) = (Bench::new(), Source::bf16(config()));
    let name = "model.layers.0.self_attn.k_proj.weight";
    let (_, _, bytes) = source.tensors.get_mut(name).unwrap();
    bytes[10..12].copy_from_slice(&bf16::INFINITY.to_le_bytes());
    let error = bench.refusal(&source, Some(Precision::Fp8), 1);
    assert!(
        error.contains(name) && error.contains("not finite, element 5"),
        "{error}"
    );
}
