//! Every weight name, as Hugging Face checkpoints of Llama-type decoders spell them.

/// Token embedding, `[vocab, hidden]`.
pub const EMBED: &str = "model.embed_tokens.weight";
/// Last RMSNorm, `[hidden]`.
pub const FINAL_NORM: &str = "model.norm.weight";
/// Output projection, `[vocab, hidden]`; absent when tied to [`EMBED`].
pub const LM_HEAD: &str = "lm_head.weight";

/// RMSNorm before attention, `[hidden]`.
pub const ATTN_NORM: &str = "input_layernorm.weight";
/// RMSNorm before the feed-forward layer, `[hidden]`.
pub const MLP_NORM: &str = "post_attention_layernorm.weight";
/// Query projection, `[heads * head_dim, hidden]`.
pub const Q: &str = "self_attn.q_proj.weight";
/// Key projection, `[kv_heads * head_dim, hidden]`.
pub const K: &str = "self_attn.k_proj.weight";
/// Value projection, `[kv_heads * head_dim, hidden]`.
pub const V: &str = "self_attn.v_proj.weight";
/// Query bias, `[heads * head_dim]` (Qwen2).
pub const Q_BIAS: &str = "self_attn.q_proj.bias";
/// Key bias, `[kv_heads * head_dim]` (Qwen2).
pub const K_BIAS: &str = "self_attn.k_proj.bias";
/// Value bias, `[kv_heads * head_dim]` (Qwen2).
pub const V_BIAS: &str = "self_attn.v_proj.bias";
/// RMSNorm of each query head, `[head_dim]` (Qwen3).
pub const Q_NORM: &str = "self_attn.q_norm.weight";
/// RMSNorm of each key head, `[head_dim]` (Qwen3).
pub const K_NORM: &str = "self_attn.k_norm.weight";
/// Attention output projection, `[hidden, heads * head_dim]`.
pub const O: &str = "self_attn.o_proj.weight";
/// Gate of SwiGLU, `[intermediate, hidden]`.
pub const GATE: &str = "mlp.gate_proj.weight";
/// The gated half of SwiGLU, `[intermediate, hidden]`.
pub const UP: &str = "mlp.up_proj.weight";
/// Back to the residual stream, `[hidden, intermediate]`.
pub const DOWN: &str = "mlp.down_proj.weight";

/// The matrices of a layer whose format is the model's [`crate::WeightFormat`].
pub const PROJECTIONS: [&str; 7] = [Q, K, V, O, GATE, UP, DOWN];

/// Full name of a layer's weight: `layer(3, names::Q)` is `model.layers.3.self_attn.q_proj.weight`.
pub fn layer(layer: usize, name: &str) -> String {
    format!("model.layers.{layer}.{name}")
}

/// Scales of an FP8 projection: `model.layers.3.self_attn.q_proj.weight_scale`.
pub fn scales(projection: &str) -> String {
    format!("{projection}_scale")
}

/// Whether a full name is that of one of a layer's seven projections.
pub fn is_projection(name: &str) -> bool {
    let part = name
        .strip_prefix("model.layers.")
        .and_then(|rest| rest.split_once('.'));
    part.is_some_and(|(_, part)| PROJECTIONS.contains(&part))
}
