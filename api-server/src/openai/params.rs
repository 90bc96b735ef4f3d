//! Parameters that chat and text completions share.

use std::sync::Arc;

use baton_chat_formats::{Format, Reasoning};
use baton_protocol::limits::TOP_LOGPROBS_MAX;
use baton_protocol::{CacheSalt, Generation, Grammar, Sampling, TokenRules};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::class;
use super::fields::{Fields, whole, wrong_type};
use super::grammar;
use super::table::{self, Door};
use super::token_wishes::TokenWishes;
use super::tool_grammar::Answer;
use super::tools::Offer;
use crate::config::Limits;
use crate::error::{ApiError, ErrorKind};
use crate::service::Class;
use crate::text::texts::Until;
use crate::text::tokenizer::{GenerationDefaults, Keep, ModelText, Side};

/// Most entries of `logit_bias` and of `stop_token_ids`.
const IDS_MAX: usize = 1024;

/// Longest stop string, in bytes.
const STOP_BYTES_MAX: usize = 1024;

/// What a client asks for besides its prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Params {
    /// Name of the model.
    pub model: Option<String>,
    /// Choices per prompt.
    pub n: u32,
    /// Answer as a stream.
    pub stream: bool,
    /// Report usage at the end of the stream.
    pub include_usage: bool,
    /// Report usage so far with each event of the stream.
    pub continuous_usage: bool,
    /// Strings that end a generation.
    pub stops: Vec<String>,
    /// What ends a generation is part of its text.
    pub include_stop: bool,
    /// Special tokens of the output are part of its text.
    pub special_tokens: bool,
    /// Most output tokens, if the client says. 0 is for a prompt that is only repeated.
    pub max_tokens: Option<u32>,
    /// More than there is room for means as many as there is.
    pub fills_room: bool,
    /// No stop before this many tokens.
    pub min_tokens: u32,
    /// Go on past the model's end-of-sequence ids.
    pub ignore_eos: bool,
    /// More ids that end a generation.
    pub stop_token_ids: Vec<u32>,
    /// How tokens are chosen; `seed` is the client's, if [`Params::seeded`].
    pub sampling: Sampling,
    /// Whether the client gave a seed.
    pub seeded: bool,
    /// Whose KV the prompt may use.
    pub cache_salt: CacheSalt,
    /// What the output must follow.
    pub grammar: Option<Grammar>,
    /// The field that asks for that.
    pub grammar_field: Option<String>,
    /// Which tokens it may have, as the client says it.
    pub tokens: TokenWishes,
    /// The same in ids of the model, once [`Params::know`] was told which.
    pub token_rules: Option<Arc<TokenRules>>,
    /// Report log-probabilities of the prompt's tokens, with so many alternatives each.
    pub prompt_logprobs: Option<u8>,
    /// What to keep of a prompt that is longer; as many tokens as there is room for, if it names no number.
    pub truncation: Option<(Option<u32>, Side)>,
    /// Whether the tokenizer's own tokens are added at the ends of the prompt, if the client says.
    pub add_special_tokens: Option<bool>,
    /// Report token ids.
    pub token_ids: bool,
    /// Name tokens by their ids in log-probabilities.
    pub tokens_as_ids: bool,
    /// Who goes first.
    pub class: Class,
}

impl Params {
    /// Reads the shared parameters of a body that came to this door and asks for `max_tokens_min` tokens at least.
    ///
    /// # Errors
    /// 400 with the parameter's name.
    pub fn read(
        door: Door,
        fields: &Fields,
        max_tokens_min: i64,
        defaults: &GenerationDefaults,
        limits: &Limits,
    ) -> Result<Self, ApiError> {
        let max = i64::from(u32::MAX);
        let max_completion = fields.integer("max_completion_tokens", max_tokens_min, max)?;
        let max_tokens = fields.integer("max_tokens", max_tokens_min, max)?;
        let choices_max = limits.choices_max as i64;
        let seed = seed(fields)?;
        let stream = fields.bool("stream")?.unwrap_or(false);
        let (include_usage, continuous_usage) = stream_options(door, fields, stream)?;
        let flag = |name: &str| Ok::<_, ApiError>(fields.bool(name)?.unwrap_or(false));
        let (grammar_field, grammar) = grammar::read(fields)?.unzip();
        Ok(Self {
            model: fields.string("model")?.map(str::to_owned),
            n: fields.integer("n", 1, choices_max)?.unwrap_or(1) as u32,
            stream,
            include_usage,
            continuous_usage,
            stops: stops(fields, "stop", limits.stops_max)?,
            include_stop: flag("include_stop_str_in_output")?,
            special_tokens: fields.bool("skip_special_tokens")? == Some(false),
            max_tokens: max_completion.or(max_tokens).map(|n| n as u32),
            fills_room: false,
            min_tokens: fields.integer("min_tokens", 0, max)?.unwrap_or(0) as u32,
            ignore_eos: fields.bool("ignore_eos")?.unwrap_or(false),
            stop_token_ids: stop_token_ids(fields)?,
            sampling: sampling(fields, defaults, seed)?,
            seeded: seed.is_some(),
            cache_salt: cache_salt(fields)?,
            grammar,
            grammar_field,
            tokens: TokenWishes::read(fields)?,
            token_rules: None,
            prompt_logprobs: prompt_logprobs(fields, stream)?,
            truncation: truncation(fields)?,
            add_special_tokens: fields.bool("add_special_tokens")?,
            token_ids: flag("return_token_ids")?,
            tokens_as_ids: flag("return_tokens_as_token_ids")?,
            class: class::read(fields)?,
        })
    }

    /// Puts what it asks for in terms of this model.
    ///
    /// # Errors
    /// As [`TokenWishes::rules`].
    pub fn know(&mut self, model: &ModelText, until: &Until) -> Result<(), ApiError> {
        self.token_rules = self.tokens.rules(model, until)?.map(Arc::new);
        Ok(())
    }

    /// What is kept of a longer prompt, if not all of it. `default_max_tokens` is what the output has if the client does not say.
    pub fn keep(&self, model: &ModelText, default_max_tokens: Option<u32>) -> Option<Keep> {
        let (tokens, side) = self.truncation?;
        let output = self.max_tokens.or(default_max_tokens).unwrap_or(1).max(1);
        let room = model.tokens_max.saturating_sub(output).max(1);
        Some(Keep {
            tokens: tokens.unwrap_or(room) as usize,
            side,
        })
    }

    /// Adds to what the output must follow that calls of these tools are written rightly, and come if they must, and that a model
    /// that reasons may do so before. True if there may be more than content in the output.
    ///
    /// # Errors
    /// As [`Offer::grammar`].
    pub fn hold_calls(
        &mut self,
        offer: &Offer,
        format: Format,
        reasoning: Reasoning,
        model: &ModelText,
    ) -> Result<bool, ApiError> {
        let field = self.grammar_field.as_deref().unwrap_or("response_format");
        let answer = self.grammar.as_ref();
        let answer = answer.map(|grammar| Answer { field, grammar });
        let token = |text: &str| model.special_token(text);
        let held = offer.grammar(format, reasoning, answer, &token)?;
        let is_all = held.is_some() && held == self.grammar;
        self.grammar = held;
        Ok(!is_all)
    }

    /// The rules of generation for a prompt of this many tokens. `prompt` names the parameter that it came
    /// from.
    ///
    /// # Errors
    /// 400 if prompt and output do not fit the model.
    pub fn generation(
        &self,
        model: &ModelText,
        prompt: &str,
        prompt_tokens: usize,
        default_max_tokens: Option<u32>,
    ) -> Result<Generation, ApiError> {
        let tokens_max = model.tokens_max as usize;
        if prompt_tokens >= tokens_max {
            let message = format!(
                "the prompt has {prompt_tokens} tokens, and the model holds {tokens_max} with at least \
                 one for the output: shorten the prompt"
            );
            return Err(too_long(prompt, message));
        }
        let room = (tokens_max - prompt_tokens) as u32;
        let max_tokens = match self.max_tokens {
            Some(asked) if asked > room && !self.fills_room => {
                let message = format!(
                    "max_tokens is {asked}, but after a prompt of {prompt_tokens} tokens the model has \
                     room for {room} ({tokens_max} in all)"
                );
                return Err(too_long("max_tokens", message));
            }
            // Of a prompt that is only repeated, what follows is made and not shown: a prefill gives a token.
            Some(asked) => asked.clamp(1, room),
            None => default_max_tokens.map_or(room, |default| default.min(room)),
        };
        if self.min_tokens > max_tokens {
            let message = format!(
                "min_tokens ({}) must not exceed max_tokens ({max_tokens})",
                self.min_tokens
            );
            return Err(ApiError::param("min_tokens", message));
        }
        let vocabulary = model.vocabulary.count() as u32;
        if let Some((id, _)) = self
            .sampling
            .logit_bias
            .iter()
            .find(|(id, _)| *id >= vocabulary)
        {
            let message = format!("logit_bias names token {id}; the vocabulary has {vocabulary}");
            return Err(ApiError::param("logit_bias", message));
        }
        let mut stop_token_ids = self.stop_token_ids.clone();
        if !self.ignore_eos {
            stop_token_ids.extend(&model.eos_token_ids);
        }
        stop_token_ids.sort_unstable();
        stop_token_ids.dedup();
        let allowed = self
            .token_rules
            .as_ref()
            .and_then(|rules| rules.allowed.as_ref());
        if let Some(allowed) = allowed
            && self.min_tokens > 0
            && allowed.0.iter().all(|id| stop_token_ids.contains(id))
        {
            let message =
                "min_tokens must be 0 where allowed_token_ids has only ids that end the output";
            return Err(ApiError::param("min_tokens", message));
        }
        Ok(Generation {
            sampling: self.sampling.clone(),
            stop_token_ids,
            min_tokens: self.min_tokens,
            max_tokens,
            grammar: self.grammar.clone(),
            token_rules: self.token_rules.clone(),
        })
    }
}

/// The salt of a text: equal texts, and no others, share KV.
fn cache_salt(fields: &Fields) -> Result<CacheSalt, ApiError> {
    let Some(text) = fields.string("cache_salt")? else {
        return Ok(CacheSalt::NONE);
    };
    if text.is_empty() {
        let message =
            "cache_salt must not be empty: leave it out to share KV with everybody who does";
        return Err(ApiError::param("cache_salt", message.to_owned()));
    }
    let digest: [u8; 32] = Sha256::digest(text).into();
    let (half, _) = digest.as_chunks::<16>();
    Ok(CacheSalt(u128::from_be_bytes(half[0])))
}

/// A seed: any integer of 64 bits, signed or not.
fn seed(fields: &Fields) -> Result<Option<u64>, ApiError> {
    const NAME: &str = "seed";
    let Some(value) = fields.value(NAME) else {
        return Ok(None);
    };
    let Value::Number(number) = value else {
        return Err(wrong_type(NAME, "an integer", value));
    };
    let signed = || whole(value).map(|seed| seed as u64);
    match number.as_u64().or_else(signed) {
        Some(seed) => Ok(Some(seed)),
        None => {
            let message = format!(
                "{NAME} must be an integer from {} to {}, got {number}",
                i64::MIN,
                u64::MAX
            );
            Err(ApiError::param(NAME, message))
        }
    }
}

fn too_long(param: &str, message: String) -> ApiError {
    let param = Some(param.to_owned());
    ApiError {
        param,
        ..ApiError::new(ErrorKind::ContextLength, message)
    }
}

fn sampling(
    fields: &Fields,
    defaults: &GenerationDefaults,
    seed: Option<u64>,
) -> Result<Sampling, ApiError> {
    let temperature = fields
        .number("temperature", 0.0, 2.0)?
        .or(defaults.temperature);
    let top_p = fields.number("top_p", 0.0, 1.0)?.or(defaults.top_p);
    if top_p == Some(0.0) {
        return Err(ApiError::param("top_p", "top_p must be over 0"));
    }
    let top_k = fields
        .integer("top_k", -1, i64::from(u32::MAX))?
        .or(defaults.top_k)
        .unwrap_or(0);
    let repetition = fields
        .number("repetition_penalty", 0.0, 100.0)?
        .or(defaults.repetition_penalty);
    // Logits are divided by it, and workers refuse what is too small to divide by.
    if repetition.is_some_and(|penalty| penalty < f32::MIN_POSITIVE) {
        let message = "repetition_penalty must be over 0";
        return Err(ApiError::param("repetition_penalty", message));
    }
    Ok(Sampling {
        temperature: temperature.unwrap_or(1.0),
        top_k: top_k.max(0) as u32,
        top_p: top_p.unwrap_or(1.0),
        min_p: fields
            .number("min_p", 0.0, 1.0)?
            .or(defaults.min_p)
            .unwrap_or(0.0),
        repetition_penalty: repetition.unwrap_or(1.0),
        presence_penalty: fields.number("presence_penalty", -2.0, 2.0)?.unwrap_or(0.0),
        frequency_penalty: fields
            .number("frequency_penalty", -2.0, 2.0)?
            .unwrap_or(0.0),
        logit_bias: logit_bias(fields)?,
        seed: seed.unwrap_or(0),
        logprobs: None,
    })
}

/// Whether usage is reported at the end, and with each event.
fn stream_options(door: Door, fields: &Fields, stream: bool) -> Result<(bool, bool), ApiError> {
    const NAME: &str = "stream_options";
    let Some(value) = fields.value(NAME) else {
        return Ok((false, false));
    };
    if !stream {
        let message = "stream_options needs stream to be true";
        return Err(ApiError::param(NAME, message));
    }
    let options = table::object(door, NAME, value)?;
    let flag = |name: &str| match options.get(name) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(yes)) => Ok(*yes),
        Some(other) => Err(wrong_type(&format!("{NAME}.{name}"), "a boolean", other)),
    };
    let (at_end, always) = (flag("include_usage")?, flag("continuous_usage_stats")?);
    Ok((at_end, at_end && always))
}

fn truncation(fields: &Fields) -> Result<Option<(Option<u32>, Side)>, ApiError> {
    let (name, most) = ("truncate_prompt_tokens", i64::from(u32::MAX));
    let tokens = fields.integer(name, -1, most)?;
    let side = match fields.string("truncation_side")? {
        None | Some("left") => Side::Left,
        Some("right") => Side::Right,
        Some(_) => {
            let message = "truncation_side must be \"left\" or \"right\"";
            return Err(ApiError::param("truncation_side", message));
        }
    };
    match tokens {
        None => Ok(None),
        Some(-1) => Ok(Some((None, side))),
        Some(0) => {
            let message = format!("{name} must be -1 or at least 1, got 0");
            Err(ApiError::param(name, message))
        }
        Some(tokens) => Ok(Some((Some(tokens as u32), side))),
    }
}

/// The strings of this field, each of which ends the output.
///
/// # Errors
/// 400 with the field's name: another type, an empty string, too many or too long ones.
pub fn stops(fields: &Fields, name: &str, stops_max: usize) -> Result<Vec<String>, ApiError> {
    const EXPECTED: &str = "a string or an array of strings";
    let stops: Vec<String> = match fields.value(name) {
        None => Vec::new(),
        Some(Value::String(stop)) => vec![stop.clone()],
        Some(Value::Array(list)) => list
            .iter()
            .map(|stop| {
                let text = stop
                    .as_str()
                    .ok_or_else(|| wrong_type(name, EXPECTED, stop))?;
                Ok(text.to_owned())
            })
            .collect::<Result<_, ApiError>>()?,
        Some(other) => return Err(wrong_type(name, EXPECTED, other)),
    };
    if stops.len() > stops_max {
        let message = format!(
            "{name} takes at most {stops_max} strings, got {}",
            stops.len()
        );
        return Err(ApiError::param(name, message));
    }
    if stops
        .iter()
        .any(|stop| stop.is_empty() || stop.len() > STOP_BYTES_MAX)
    {
        let message = format!("strings of {name} must have 1 to {STOP_BYTES_MAX} bytes");
        return Err(ApiError::param(name, message));
    }
    Ok(stops)
}

fn stop_token_ids(fields: &Fields) -> Result<Vec<u32>, ApiError> {
    const NAME: &str = "stop_token_ids";
    let ids = token_ids(fields, NAME)?.unwrap_or_default();
    match ids.len() <= IDS_MAX {
        true => Ok(ids),
        false => {
            let message = format!("{NAME} takes at most {IDS_MAX} ids");
            Err(ApiError::param(NAME, message))
        }
    }
}

/// An array of token ids.
pub fn token_ids(fields: &Fields, name: &str) -> Result<Option<Vec<u32>>, ApiError> {
    const EXPECTED: &str = "an array of token ids";
    let list = match fields.value(name) {
        None => return Ok(None),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(wrong_type(name, EXPECTED, other)),
    };
    let id = |value: &Value| {
        let id = whole(value).and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| wrong_type(name, EXPECTED, value))
    };
    list.iter().map(id).collect::<Result<_, _>>().map(Some)
}

fn logit_bias(fields: &Fields) -> Result<Vec<(u32, f32)>, ApiError> {
    const NAME: &str = "logit_bias";
    const EXPECTED: &str = "an object of token ids and numbers from -100 to 100";
    let map = match fields.value(NAME) {
        None => return Ok(Vec::new()),
        Some(Value::Object(map)) if map.len() <= IDS_MAX => map,
        Some(Value::Object(_)) => {
            return Err(ApiError::param(
                NAME,
                format!("{NAME} takes at most {IDS_MAX} tokens"),
            ));
        }
        Some(other) => return Err(wrong_type(NAME, EXPECTED, other)),
    };
    let (mut entries, mut wrong) = (Vec::with_capacity(map.len()), Vec::new());
    for (key, value) in map {
        let bias = value.as_f64().filter(|bias| bias.abs() <= 100.0);
        match (key.parse::<u32>(), bias) {
            (Ok(id), Some(bias)) => entries.push((id, bias as f32)),
            (Ok(id), None) => wrong.push(format!("that of token {id} is not")),
            (Err(_), _) => {
                let shown: String = key.chars().take(WRONG_KEY_CHARS_MAX).collect();
                wrong.push(format!("{shown:?} is no token id"));
            }
        }
    }
    if wrong.is_empty() {
        return Ok(entries);
    }
    let more = wrong.len().saturating_sub(WRONG_ENTRIES_MAX);
    wrong.truncate(WRONG_ENTRIES_MAX);
    let more = match more {
        0 => String::new(),
        more => format!(", and {more} more"),
    };
    let message = format!("{NAME} must be {EXPECTED}: {}{more}", wrong.join(", "));
    Err(ApiError::param(NAME, message))
}

/// Wrong entries of `logit_bias` that an error names, and the longest part of each that it quotes.
const WRONG_ENTRIES_MAX: usize = 8;
const WRONG_KEY_CHARS_MAX: usize = 40;

/// A number of alternatives to report, up to what the workers report.
pub fn alternatives(fields: &Fields, name: &str) -> Result<Option<u8>, ApiError> {
    let most = i64::from(TOP_LOGPROBS_MAX);
    Ok(fields.integer(name, 0, most)?.map(|n| n as u8))
}

/// Alternatives to report with each token of the prompt. They come before the output, in an answer of one piece.
fn prompt_logprobs(fields: &Fields, stream: bool) -> Result<Option<u8>, ApiError> {
    const NAME: &str = "prompt_logprobs";
    let top = alternatives(fields, NAME)?;
    if top.is_some() && stream {
        let message = "prompt_logprobs are not there with stream: ask for an answer in one piece";
        return Err(ApiError::param(NAME, message));
    }
    Ok(top)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(body: Value) -> Result<Params, ApiError> {
        let fields = Fields::parse(Door::Text, body.to_string().as_bytes())?;
        let (defaults, limits) = (GenerationDefaults::default(), Limits::default());
        Params::read(Door::Text, &fields, 1, &defaults, &limits)
    }

    #[test]
    fn equal_salts_and_no_others_share() {
        let salt = |text: &str| read(json!({"cache_salt": text})).unwrap().cache_salt;
        assert_eq!(salt("anna"), salt("anna"));
        assert_ne!(salt("anna"), salt("bert"));
        assert!(!salt("anna").is_none());
        assert!(read(json!({})).unwrap().cache_salt.is_none());
        for wrong in [json!(""), json!(7), json!(["a"])] {
            let error = read(json!({"cache_salt": wrong})).unwrap_err();
            assert_eq!(error.param.as_deref(), Some("cache_salt"));
        }
    }

    #[test]
    fn wrong_values_name_their_parameter() {
        let cases = [
            (json!({"max_tokens": 0}), "max_tokens"),
            (json!({"max_tokens": -1}), "max_tokens"),
            (
                json!({"max_completion_tokens": "many"}),
                "max_completion_tokens",
            ),
            (json!({"temperature": 3}), "temperature"),
            (json!({"top_p": 0}), "top_p"),
            (json!({"repetition_penalty": 1e-40}), "repetition_penalty"),
            (json!({"n": 0}), "n"),
            (json!({"n": 1.5}), "n"),
            (json!({"stop": [1]}), "stop"),
            (json!({"stop": ""}), "stop"),
            (json!({"stream": "yes"}), "stream"),
            (
                json!({"stream": true, "stream_options": {"include_usage": 1}}),
                "stream_options.include_usage",
            ),
            (json!({"stream_options": {}}), "stream_options"),
            (
                json!({"truncate_prompt_tokens": 0}),
                "truncate_prompt_tokens",
            ),
            (json!({"truncation_side": "top"}), "truncation_side"),
            (json!({"logit_bias": {"x": 1}}), "logit_bias"),
            (json!({"logit_bias": {"1": 101}}), "logit_bias"),
            (json!({"stop_token_ids": [-1]}), "stop_token_ids"),
            (json!({"stop_token_ids": vec![1; 1025]}), "stop_token_ids"),
            (json!({"prompt_logprobs": -1}), "prompt_logprobs"),
            (json!({"prompt_logprobs": 21}), "prompt_logprobs"),
            (
                json!({"prompt_logprobs": 0, "stream": true}),
                "prompt_logprobs",
            ),
            (json!({"presence_penalty": -2.5}), "presence_penalty"),
            (json!({"seed": "a"}), "seed"),
            (json!({"model": 1}), "model"),
        ];
        for (body, name) in cases {
            let error = read(body.clone()).expect_err(&body.to_string());
            assert_eq!(error.param.as_deref(), Some(name), "{body}");
            assert_eq!(error.kind, ErrorKind::InvalidRequest);
        }
    }

    #[test]
    fn the_wrong_entries_of_a_logit_bias_are_named() {
        let error = |bias: Value| read(json!({"logit_bias": bias})).unwrap_err().message;
        let wrong = error(json!({"5": 1, "fish": 1}));
        assert!(wrong.ends_with("\"fish\" is no token id"), "{wrong}");
        let wrong = error(json!({"5": 1, "7": 1000}));
        assert!(wrong.ends_with("that of token 7 is not"), "{wrong}");
        let several = error(json!({"fish": 1, "5": 1, "7": 1000, "cat": 0}));
        let said = "\"fish\" is no token id, that of token 7 is not, \"cat\" is no token id";
        assert!(several.ends_with(said), "{several}");
        let many: serde_json::Map<String, Value> = (0..1_000)
            .map(|i| (format!("{}{i}", "x".repeat(10_000)), 1.into()))
            .collect();
        let long = error(Value::Object(many));
        assert!(long.ends_with(", and 992 more"), "{long}");
        assert!(long.len() < 800, "{long}");
    }

    #[test]
    fn a_seed_has_64_bits() {
        for (given, seed) in [
            (json!(-1), u64::MAX),
            (json!(u64::MAX), u64::MAX),
            (json!(i64::MIN), 1 << 63),
            (json!(7.0), 7),
        ] {
            let params = read(json!({"seed": given})).unwrap();
            assert_eq!((params.sampling.seed, params.seeded), (seed, true));
        }
        for text in ["1e30", "18446744073709551616", "1.5"] {
            let given: Value = serde_json::from_str(text).unwrap();
            let error = read(json!({"seed": given})).unwrap_err();
            let range = "must be an integer from -9223372036854775808 to 18446744073709551615";
            assert!(error.message.contains(range), "{error}");
        }
    }

    #[test]
    fn right_values_are_read() {
        let params = read(json!({
            "model": "m", "n": 2, "stop": "x", "max_tokens": 5, "max_completion_tokens": 7,
            "seed": -1, "top_k": -1, "temperature": 0, "logit_bias": {"5": -3.5}, "metadata": [],
            "stream": true, "stream_options": {"include_usage": true}, "user": "me",
            "truncate_prompt_tokens": -1, "truncation_side": "right", "skip_special_tokens": false,
        }))
        .unwrap();
        assert_eq!(params.max_tokens, Some(7));
        assert_eq!(params.sampling.seed, u64::MAX);
        assert_eq!(params.sampling.top_k, 0);
        assert_eq!(params.sampling.temperature, 0.0);
        assert_eq!(params.sampling.logit_bias, [(5, -3.5)]);
        assert!(params.include_usage && params.stream && params.seeded);
        assert_eq!(params.truncation, Some((None, Side::Right)));
        assert!(params.special_tokens && !params.include_stop && !params.continuous_usage);
    }
}
