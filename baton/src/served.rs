//! What a served model can do, in one line, as `/v1/models` reports it: for `baton up` and `baton self-check`.

use serde_json::Value;

/// The first model of an answer of `/v1/models`: `smollm2, 2,048 tokens, tools: the model calls them when it wants to`. Fields that
/// the API server does not send, as those of earlier releases, are left out. `None` if it names no model.
pub fn summary(models: &Value) -> Option<String> {
    let model = &models["data"][0];
    let mut parts = vec![model["id"].as_str()?.to_owned()];
    if let Some(tokens) = model["max_model_len"].as_u64() {
        parts.push(format!("{} tokens", grouped(tokens)));
    }
    if let Some(tokens) = model["default_max_tokens"].as_u64() {
        let tokens = grouped(tokens);
        parts.push(format!("answers of {tokens} where max_tokens is not set"));
    }
    match model["tools"].as_str() {
        Some("auto") => parts.push("tools: the model calls them when it wants to".to_owned()),
        Some("required") => parts
            .push("tools: only where tool_choice demands a call (docs/chat-formats.md)".to_owned()),
        _ => {}
    }
    Some(parts.join(", "))
}

/// A number as people read it: `65,536`.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.char_indices() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_model_is_described_by_what_the_server_sends() {
        let said = |model: Value| summary(&json!({"data": [model, {"id": "another"}]}));
        let old = json!({"id": "smollm2", "max_model_len": 2048});
        assert_eq!(said(old).unwrap(), "smollm2, 2,048 tokens");
        let limited = json!({"id": "m", "max_model_len": 131_072, "default_max_tokens": 4096, "tools": "auto"});
        let expected = "m, 131,072 tokens, answers of 4,096 where max_tokens is not set, tools: the model calls them when it wants to";
        assert_eq!(said(limited).unwrap(), expected);
        let unlimited = json!({"id": "m", "default_max_tokens": null, "tools": "required"});
        let expected = "m, tools: only where tool_choice demands a call (docs/chat-formats.md)";
        assert_eq!(said(unlimited).unwrap(), expected);
        let strange = json!({"id": "m", "max_model_len": "many", "tools": {"a": 1}});
        assert_eq!(said(strange).unwrap(), "m");
    }

    #[test]
    fn what_names_no_model_is_not_described() {
        for models in [
            json!(null),
            json!([]),
            json!({"data": []}),
            json!({"data": [{"id": 3}]}),
        ] {
            assert_eq!(summary(&models), None, "{models}");
        }
    }

    #[test]
    fn numbers_are_grouped_by_thousands() {
        let numbers = [0, 7, 512, 2_048, 65_536, 1_000_000];
        let texts = ["0", "7", "512", "2,048", "65,536", "1,000,000"];
        assert_eq!(numbers.map(grouped), texts);
    }
}
