//! Short names of well-known models.

/// Short name and Hugging Face name.
const FRIENDLY_NAMES: [(&str, &str); 25] = [
    ("llama-2-7b-chat", "meta-llama/Llama-2-7b-chat-hf"),
    ("llama-3-8b-instruct", "meta-llama/Meta-Llama-3-8B-Instruct"),
    ("llama-3.1-8b", "meta-llama/Llama-3.1-8B"),
    ("llama-3.1-8b-instruct", "meta-llama/Llama-3.1-8B-Instruct"),
    (
        "llama-3.1-70b-instruct",
        "meta-llama/Llama-3.1-70B-Instruct",
    ),
    ("llama-3.2-1b-instruct", "meta-llama/Llama-3.2-1B-Instruct"),
    ("llama-3.2-3b-instruct", "meta-llama/Llama-3.2-3B-Instruct"),
    (
        "llama-3.3-70b-instruct",
        "meta-llama/Llama-3.3-70B-Instruct",
    ),
    (
        "mistral-7b-instruct-v0.2",
        "mistralai/Mistral-7B-Instruct-v0.2",
    ),
    (
        "mistral-7b-instruct-v0.3",
        "mistralai/Mistral-7B-Instruct-v0.3",
    ),
    ("qwen2.5-0.5b-instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
    ("qwen2.5-1.5b-instruct", "Qwen/Qwen2.5-1.5B-Instruct"),
    ("qwen2.5-7b-instruct", "Qwen/Qwen2.5-7B-Instruct"),
    ("qwen2.5-14b-instruct", "Qwen/Qwen2.5-14B-Instruct"),
    ("qwen2.5-32b-instruct", "Qwen/Qwen2.5-32B-Instruct"),
    ("qwen3-0.6b", "Qwen/Qwen3-0.6B"),
    ("qwen3-1.7b", "Qwen/Qwen3-1.7B"),
    ("qwen3-4b", "Qwen/Qwen3-4B"),
    ("qwen3-8b", "Qwen/Qwen3-8B"),
    ("qwen3-14b", "Qwen/Qwen3-14B"),
    ("qwen3-32b", "Qwen/Qwen3-32B"),
    (
        "smollm2-135m-instruct",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    (
        "smollm2-360m-instruct",
        "HuggingFaceTB/SmolLM2-360M-Instruct",
    ),
    (
        "smollm2-1.7b-instruct",
        "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    ),
    ("tinyllama-1.1b-chat", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
];

/// Hugging Face name of a short name, whatever its case.
pub fn hub_name(friendly: &str) -> Option<&'static str> {
    FRIENDLY_NAMES
        .iter()
        .find(|(name, _)| name.eq_ignore_ascii_case(friendly))
        .map(|(_, hub)| *hub)
}

/// All short names with their Hugging Face names.
pub fn friendly_names() -> &'static [(&'static str, &'static str)] {
    &FRIENDLY_NAMES
}
