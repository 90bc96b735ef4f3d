//! Log-probabilities as chats and responses have them: an object for each token.

use baton_protocol::TopLogprob;

use super::shape::{escape, put};
use crate::output::LogprobEntry;
use crate::text::tokenizer::ModelText;

/// Writes `{"token", "logprob", "bytes", "top_logprobs"}` of a token; `as_ids` names tokens by their ids.
pub fn logprob_object(entry: &LogprobEntry, as_ids: bool, model: &ModelText, out: &mut Vec<u8>) {
    let one = |token: u32, logprob: f32, out: &mut Vec<u8>| {
        out.extend_from_slice(b"{\"token\":");
        token_name(token, as_ids, model, out);
        put(
            out,
            format_args!(",\"logprob\":{},\"bytes\":[", finite(logprob)),
        );
        separated(model.vocabulary.bytes(token), out, |byte, out| {
            put(out, format_args!("{byte}"))
        });
        out.push(b']');
    };
    one(entry.token, entry.logprob.unwrap_or(0.0), out);
    out.extend_from_slice(b",\"top_logprobs\":[");
    separated(&entry.top, out, |TopLogprob(token, logprob), out| {
        one(*token, *logprob, out);
        out.push(b'}');
    });
    out.extend_from_slice(b"]}");
}

/// A token's text, or its id, as a JSON string.
pub(super) fn token_name(token: u32, as_id: bool, model: &ModelText, out: &mut Vec<u8>) {
    match as_id {
        true => put(out, format_args!("\"token_id:{token}\"")),
        false => token_text(token, model, out),
    }
}

/// A token's text as a JSON string.
pub(super) fn token_text(token: u32, model: &ModelText, out: &mut Vec<u8>) {
    out.push(b'"');
    escape(&model.token_text(token), out);
    out.push(b'"');
}

/// JSON has no infinity; OpenAI's stand-in for an impossible token is -9999.
pub(super) fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() {
        logprob
    } else {
        -9999.0
    }
}

/// Items with commas between.
pub(super) fn separated<T>(
    items: &[T],
    out: &mut Vec<u8>,
    mut write: impl FnMut(&T, &mut Vec<u8>),
) {
    for (i, item) in items.iter().enumerate() {
        if i > 0 {
            out.push(b',');
        }
        write(item, out);
    }
}
