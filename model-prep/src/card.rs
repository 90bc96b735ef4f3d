//! How the makers of a model would have its tokens chosen, where they say so in its model card and in none of its files.

use baton_model::{CHAT_TEMPLATE, GENERATION_CONFIG};
use serde_json::{Map, Value, json};

use crate::checkpoint::{Checkpoint, SmallFile};

/// A family and what the card of its chat models recommends.
struct Card {
    /// What its names begin with, in lower case.
    family: &'static str,
    /// Where it is said.
    source: &'static str,
    /// Values of `generation_config.json`.
    sampling: &'static [(&'static str, f64)],
}

const CARDS: [Card; 2] = [
    Card {
        family: "smollm2",
        source: "the model card of HuggingFaceTB/SmolLM2-135M-Instruct, -360M-Instruct and -1.7B-Instruct",
        sampling: &[("temperature", 0.2), ("top_p", 0.9)],
    },
    Card {
        family: "tinyllama",
        source: "the model card of TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        sampling: &[("temperature", 0.7), ("top_p", 0.95), ("top_k", 50.0)],
    },
];

/// What a file says of sampling, if it says anything.
const SAMPLING: [&str; 5] = [
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
];

/// Adds what the model card recommends to `generation_config.json`, if the model is for chats, its card is known and its files say
/// nothing of sampling. Gives where it is from.
pub(crate) fn complete(checkpoint: &mut Checkpoint) -> Option<&'static str> {
    let family = checkpoint.family.to_ascii_lowercase();
    let card = CARDS.iter().find(|card| family.starts_with(card.family))?;
    let files = &mut checkpoint.files;
    if !files.iter().any(|file| file.name == CHAT_TEMPLATE) {
        return None;
    }
    let place = files.iter().position(|file| file.name == GENERATION_CONFIG);
    let mut config: Map<String, Value> = match place {
        Some(place) => serde_json::from_slice(&files[place].content).ok()?,
        None => Map::new(),
    };
    let says = |name: &&str| config.get(*name).is_some_and(|value| !value.is_null());
    if SAMPLING.iter().any(says) {
        return None;
    }
    for (name, value) in card.sampling {
        let value = match value.fract() == 0.0 {
            true => json!(*value as i64),
            false => json!(value),
        };
        config.insert((*name).to_owned(), value);
    }
    let mut content = serde_json::to_vec_pretty(&config).ok()?;
    content.push(b'\n');
    match place {
        Some(place) => files[place].content = content,
        None => files.push(SmallFile {
            name: GENERATION_CONFIG,
            content,
        }),
    }
    Some(card.source)
}
