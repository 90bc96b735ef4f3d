//! Tiny random models of every family.

use std::collections::HashMap;

use baton_model::{
    Fp8Matrix, MatrixBytes, ModelSpec, Rope, RopeScaling, TensorBytes, TensorSource, UniformSpec,
    WeightFormat, expected_tensors, f32_from_e4m3, names,
};
use half::bf16;

/// Random weights of a spec.
pub struct Tiny {
    /// What it is.
    pub spec: ModelSpec,
    tensors: HashMap<String, (Vec<usize>, Vec<u8>)>,
    /// Its projections, if they are FP8.
    fp8: HashMap<String, Fp8Matrix<'static>>,
}

impl TensorSource for Tiny {
    fn bf16(&self, name: &str) -> Result<TensorBytes<'_>, String> {
        let (shape, bytes) = self.tensors.get(name).ok_or("there is no such tensor")?;
        Ok(TensorBytes {
            shape: shape.clone(),
            bytes: bytes.into(),
        })
    }

    fn projection(&self, name: &str, out: usize, inputs: usize) -> Result<MatrixBytes<'_>, String> {
        match self.fp8.get(name) {
            None => self.shaped(name, &[out, inputs]).map(MatrixBytes::Bf16),
            Some(matrix) => Ok(MatrixBytes::Fp8(Fp8Matrix {
                codes: matrix.codes.as_ref().into(),
                ..matrix.clone()
            })),
        }
    }
}

/// Numbers that look random and are the same every time.
pub struct Random(pub u64);

impl Random {
    /// Uniform in -1 .. 1.
    pub fn number(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    /// Uniform in `0 .. n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() >> 33) as usize % n
    }

    /// So many tokens of a vocabulary.
    pub fn tokens(&mut self, count: usize, vocab: usize) -> Vec<u32> {
        (0..count).map(|_| self.below(vocab) as u32).collect()
    }

    fn bits(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let x = (self.0 ^ (self.0 >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        x ^ (x >> 33)
    }
}

impl Tiny {
    /// Makes the embedding of a token NaN.
    pub fn break_embedding(&mut self, token: u32) {
        let row = self.spec.hidden * 2;
        let (_, bytes) = self
            .tensors
            .get_mut("model.embed_tokens.weight")
            .expect("every model has it");
        bytes[token as usize * row..][..row].fill(0xff);
    }

    /// Weights of a spec: matrices keep the size of what they are applied to, norms stay near one.
    ///
    /// # Panics
    /// If there is no such model.
    pub fn new(spec: UniformSpec, seed: u64) -> Self {
        Self::of(ModelSpec::try_from(spec).expect("a model"), seed)
    }

    /// The same of layers that may differ.
    pub fn of(spec: ModelSpec, seed: u64) -> Self {
        let mut random = Random(seed);
        let tensors = expected_tensors(&spec).into_iter().map(|t| {
            let vector = t.shape.len() == 1;
            let bias = t.name.ends_with("bias");
            // Matrices keep the size of what they are applied to; norms stay near one.
            let width = (3.0 / t.columns() as f64).sqrt();
            let numbers = (0..t.elements()).flat_map(|_| {
                let x = random.number();
                let x = match (vector, bias) {
                    (false, _) => x * width,
                    (true, true) => x * 0.5,
                    (true, false) => 1.0 + x * 0.3,
                };
                bf16::from_f64(x).to_le_bytes()
            });
            (t.name, (t.shape, numbers.collect()))
        });
        let tensors = tensors.collect();
        Self {
            spec,
            tensors,
            fp8: HashMap::new(),
        }
    }

    /// The same with projections in this format. They exist in it alone: an executor that asks for BF16 gets none.
    pub fn in_format(mut self, format: WeightFormat) -> Self {
        let quantize = match format {
            WeightFormat::Bf16 => return self,
            WeightFormat::Fp8Channel => Fp8Matrix::per_channel,
            WeightFormat::Fp8Block => Fp8Matrix::per_block,
        };
        let of_projections = |name: &String, _: &mut _| names::is_projection(name);
        let projections = self.tensors.extract_if(of_projections);
        let fp8 = projections.map(|(name, (shape, bytes))| {
            let matrix = quantize(&bytes, shape[0], shape[1]);
            (name, matrix)
        });
        self.fp8 = fp8.collect();
        self
    }

    /// A tensor's numbers as they are meant: FP8 times its scales without rounding.
    pub(crate) fn numbers(&self, name: &str) -> Vec<f64> {
        if let Some(matrix) = self.fp8.get(name) {
            let number = |(i, &code): (usize, &u8)| {
                let scale = matrix.scale(i / matrix.columns, i % matrix.columns);
                f64::from(f32_from_e4m3(code)) * f64::from(scale)
            };
            return matrix.codes.iter().enumerate().map(number).collect();
        }
        let bytes = &self.tensors[name].1;
        bytes
            .chunks(2)
            .map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f64())
            .collect()
    }
}

/// One tiny model of each family; sizes are odd on purpose: no padding goes unused.
pub fn families() -> Vec<UniformSpec> {
    let llama = UniformSpec {
        family: "llama".to_owned(),
        hidden: 72,
        intermediate: 144,
        layers: 2,
        heads: 6,
        kv_heads: 2,
        head_dim: 12,
        vocab: 150,
        tokens_max: 256,
        rms_eps: 1e-5,
        rope: Rope {
            theta: 10_000.0,
            scaling: RopeScaling::None,
        },
        qkv_bias: false,
        qk_norm: false,
        tied_embeddings: false,
        sliding_window: None,
    };
    let llama3 = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_tokens_max: 64.0,
    };
    vec![
        llama.clone(),
        UniformSpec {
            rope: Rope {
                theta: 500_000.0,
                scaling: llama3,
            },
            head_dim: 64,
            tied_embeddings: true,
            ..llama.clone()
        },
        UniformSpec {
            rope: Rope {
                theta: 10_000.0,
                scaling: RopeScaling::Linear { factor: 4.0 },
            },
            kv_heads: 6,
            ..llama.clone()
        },
        UniformSpec {
            family: "mistral".to_owned(),
            sliding_window: Some(37),
            kv_heads: 3,
            head_dim: 32,
            ..llama.clone()
        },
        UniformSpec {
            family: "qwen2".to_owned(),
            qkv_bias: true,
            kv_heads: 1,
            ..llama.clone()
        },
        UniformSpec {
            family: "qwen3".to_owned(),
            qk_norm: true,
            head_dim: 128,
            rms_eps: 1e-6,
            ..llama
        },
    ]
}
