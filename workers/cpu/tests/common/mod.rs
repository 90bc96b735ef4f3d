//! Tiny random models, and a plain decoder in f64 to hold the executor against.

#![allow(dead_code)] // each test uses its part

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use baton_cpu::{
    CpuExecutor, CpuOptions, HeapMemory, Kernel, TensorBytes, TensorSource, kv_geometry,
};
use baton_engine::{Executor, KvMemory, SampleRequest, SequenceStep, StepPlan};
use baton_model::{ModelSpec, Rope, RopeScaling, expected_tensors};
use half::bf16;

/// Random weights of a spec.
pub struct Tiny {
    pub spec: ModelSpec,
    tensors: HashMap<String, (Vec<usize>, Vec<u8>)>,
}

impl TensorSource for Tiny {
    fn bf16(&self, name: &str) -> Result<TensorBytes<'_>, String> {
        let (shape, bytes) = self.tensors.get(name).ok_or("there is no such tensor")?;
        Ok(TensorBytes {
            shape: shape.clone(),
            bytes,
        })
    }
}

pub struct Random(pub u64);

impl Random {
    /// Uniform in -1 .. 1.
    pub fn number(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() >> 33) as usize % n
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
    pub fn new(spec: ModelSpec, seed: u64) -> Self {
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
        Self { spec, tensors }
    }

    fn numbers(&self, name: &str) -> Vec<f64> {
        let bytes = &self.tensors[name].1;
        bytes
            .chunks(2)
            .map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f64())
            .collect()
    }

    /// Logits after each token, by the book, in f64 throughout.
    pub fn reference(&self, tokens: &[u32]) -> Vec<Vec<f64>> {
        let s = &self.spec;
        let (hd, group) = (s.head_dim, s.heads / s.kv_heads);
        let frequencies = s.rope.inverse_frequencies(hd);
        let embedding = self.numbers("model.embed_tokens.weight");
        let mut x: Vec<Vec<f64>> = tokens
            .iter()
            .map(|t| embedding[*t as usize * s.hidden..][..s.hidden].to_vec())
            .collect();
        for layer in 0..s.layers {
            let w = |name: &str| self.numbers(&format!("model.layers.{layer}.{name}"));
            let norm = w("input_layernorm.weight");
            let n: Vec<_> = x.iter().map(|x| rms_norm(x, &norm, s.rms_eps)).collect();
            let project = |name: &str| {
                let weight = w(&format!("self_attn.{name}_proj.weight"));
                let bias = s
                    .qkv_bias
                    .then(|| w(&format!("self_attn.{name}_proj.bias")));
                let rows = n.iter().map(|n| {
                    let mut y = multiply(&weight, n);
                    for (y, b) in y.iter_mut().zip(bias.iter().flatten()) {
                        *y += b;
                    }
                    y
                });
                rows.collect::<Vec<_>>()
            };
            let (mut q, mut k, v) = (project("q"), project("k"), project("v"));
            for (rows, name) in [(&mut q, "q_norm"), (&mut k, "k_norm")] {
                let weight = s.qk_norm.then(|| w(&format!("self_attn.{name}.weight")));
                for (position, row) in rows.iter_mut().enumerate() {
                    for head in row.chunks_mut(hd) {
                        if let Some(weight) = &weight {
                            head.copy_from_slice(&rms_norm(head, weight, s.rms_eps));
                        }
                        for (i, f) in frequencies.iter().enumerate() {
                            let (sin, cos) = (position as f64 * f).sin_cos();
                            let (a, b) = (head[i], head[i + hd / 2]);
                            head[i] = a * cos - b * sin;
                            head[i + hd / 2] = b * cos + a * sin;
                        }
                    }
                }
            }
            let output = w("self_attn.o_proj.weight");
            for t in 0..tokens.len() {
                let from = s
                    .sliding_window
                    .map_or(0, |window| (t + 1).saturating_sub(window));
                let mut all = Vec::new();
                for head in 0..s.heads {
                    let at = head / group * hd;
                    let q = &q[t][head * hd..][..hd];
                    let scores: Vec<f64> = (from..=t)
                        .map(|u| dot(q, &k[u][at..][..hd]) / (hd as f64).sqrt())
                        .collect();
                    let top = scores.iter().copied().fold(f64::MIN, f64::max);
                    let total: f64 = scores.iter().map(|s| (s - top).exp()).sum();
                    all.extend((0..hd).map(|i| {
                        let weighted = (from..=t).zip(&scores);
                        weighted
                            .map(|(u, s)| (s - top).exp() / total * v[u][at + i])
                            .sum::<f64>()
                    }));
                }
                add(&mut x[t], &multiply(&output, &all));
            }
            let norm = w("post_attention_layernorm.weight");
            let (gate, up) = (w("mlp.gate_proj.weight"), w("mlp.up_proj.weight"));
            let down = w("mlp.down_proj.weight");
            for x in &mut x {
                let n = rms_norm(x, &norm, s.rms_eps);
                let inner: Vec<f64> = multiply(&gate, &n)
                    .iter()
                    .zip(multiply(&up, &n))
                    .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
                    .collect();
                add(x, &multiply(&down, &inner));
            }
        }
        let norm = self.numbers("model.norm.weight");
        let head = if s.tied_embeddings {
            embedding
        } else {
            self.numbers("lm_head.weight")
        };
        x.iter()
            .map(|x| multiply(&head, &rms_norm(x, &norm, s.rms_eps)))
            .collect()
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn multiply(weight: &[f64], x: &[f64]) -> Vec<f64> {
    weight.chunks(x.len()).map(|row| dot(row, x)).collect()
}

fn add(x: &mut [f64], y: &[f64]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

fn rms_norm(x: &[f64], weight: &[f64], eps: f32) -> Vec<f64> {
    let scale = (dot(x, x) / x.len() as f64 + f64::from(eps)).sqrt();
    x.iter().zip(weight).map(|(x, w)| x / scale * w).collect()
}

/// One tiny model of each family; sizes are odd on purpose: no padding goes unused.
pub fn families() -> Vec<ModelSpec> {
    let llama = ModelSpec {
        family: "llama".to_owned(),
        hidden: 72,
        intermediate: 104,
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
        ModelSpec {
            rope: Rope {
                theta: 500_000.0,
                scaling: llama3,
            },
            head_dim: 64,
            tied_embeddings: true,
            ..llama.clone()
        },
        ModelSpec {
            rope: Rope {
                theta: 10_000.0,
                scaling: RopeScaling::Linear { factor: 4.0 },
            },
            kv_heads: 6,
            ..llama.clone()
        },
        ModelSpec {
            family: "mistral".to_owned(),
            sliding_window: Some(37),
            kv_heads: 3,
            head_dim: 32,
            ..llama.clone()
        },
        ModelSpec {
            family: "qwen2".to_owned(),
            qkv_bias: true,
            kv_heads: 1,
            ..llama.clone()
        },
        ModelSpec {
            family: "qwen3".to_owned(),
            qk_norm: true,
            head_dim: 128,
            rms_eps: 1e-6,
            ..llama
        },
    ]
}

/// Kernels of this CPU.
pub fn kernels() -> impl Iterator<Item = Kernel> {
    Kernel::ALL.into_iter().filter(|k| k.available())
}

/// An executor whose arena starts as NaN everywhere: what is read and was not written shows.
pub fn executor(
    spec: &ModelSpec,
    weights: &dyn TensorSource,
    kernel: Kernel,
    threads: usize,
    block_tokens: u32,
    blocks: usize,
) -> CpuExecutor {
    let kv = kv_geometry(spec, block_tokens);
    let memory = HeapMemory::new(blocks * kv.block_bytes());
    // SAFETY: the arena is this function's alone until the executor takes it.
    unsafe { memory.base().write_bytes(0xff, memory.len()) };
    let options = CpuOptions {
        threads,
        kernel: Some(kernel),
        step_tokens_max: 512,
        step_sequences_max: 64,
    };
    CpuExecutor::load_from(spec, weights, Arc::new(memory), kv, options).expect("it loads")
}

/// A sequence's part of a plan: feed `range` of `tokens`, sample after them.
pub struct Part<'a> {
    pub key: u64,
    pub tokens: &'a [u32],
    pub range: Range<usize>,
    pub blocks: &'a [u32],
}

/// Runs one step; the logits after each part.
pub fn step(executor: &mut CpuExecutor, parts: &[Part<'_>]) -> Vec<Vec<f32>> {
    let mut plan = StepPlan {
        want_logits: true,
        ..StepPlan::default()
    };
    for part in parts {
        let tokens = plan.tokens.len()..plan.tokens.len() + part.range.len();
        plan.tokens.extend(&part.tokens[part.range.clone()]);
        let blocks = plan.blocks.len()..plan.blocks.len() + part.blocks.len();
        plan.blocks.extend(part.blocks);
        plan.sequences.push(SequenceStep {
            key: part.key,
            tokens,
            start: part.range.start as u32,
            blocks,
            sample: Some(SampleRequest {
                position: part.range.end as u32,
                state: Arc::default(),
                ban_stop_ids: false,
            }),
            targets: 0..0,
            target_top: 0,
        });
    }
    let output = executor.forward(&plan).expect("a step");
    output.sequences.into_iter().map(|s| s.logits).collect()
}
