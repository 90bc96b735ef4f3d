//! A plain decoder in f64: what an executor is held against.

use baton_model::{LayerKind, Mixer, Mlp};

use crate::Tiny;

impl Tiny {
    /// Logits after each token, by the book, in f64 throughout.
    pub fn reference(&self, tokens: &[u32]) -> Vec<Vec<f64>> {
        let s = &self.spec;
        let embedding = self.numbers("model.embed_tokens.weight");
        let mut x: Vec<Vec<f64>> = tokens
            .iter()
            .map(|t| embedding[*t as usize * s.hidden..][..s.hidden].to_vec())
            .collect();
        for (layer, kind) in s.layers.iter().enumerate() {
            let LayerKind {
                mixer: Mixer::Attention(a),
                mlp: Mlp::Gated(_),
            } = &**kind;
            let (hd, group) = (a.head_dim, a.heads / a.kv_heads);
            let frequencies = a.rope.inverse_frequencies(hd);
            let w = |name: &str| self.numbers(&format!("model.layers.{layer}.{name}"));
            let norm = w("input_layernorm.weight");
            let n: Vec<_> = x.iter().map(|x| rms_norm(x, &norm, s.rms_eps)).collect();
            let project = |name: &str| {
                let weight = w(&format!("self_attn.{name}_proj.weight"));
                let bias = a
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
                let weight = a.qk_norm.then(|| w(&format!("self_attn.{name}.weight")));
                for (position, row) in rows.iter_mut().enumerate() {
                    for head in row.chunks_mut(hd) {
                        if let Some(weight) = &weight {
                            head.copy_from_slice(&rms_norm(head, weight, s.rms_eps));
                        }
                        for (i, f) in frequencies.iter().enumerate() {
                            let (sin, cos) = (position as f64 * f).sin_cos();
                            let (x, y) = (head[i], head[i + hd / 2]);
                            head[i] = x * cos - y * sin;
                            head[i + hd / 2] = y * cos + x * sin;
                        }
                    }
                }
            }
            let output = w("self_attn.o_proj.weight");
            for t in 0..tokens.len() {
                let from = a
                    .sliding_window
                    .map_or(0, |window| (t + 1).saturating_sub(window));
                let mut all = Vec::new();
                for head in 0..a.heads {
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
