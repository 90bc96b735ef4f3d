//! How large an answer may become, as far as the request tells.

use super::Params;
use crate::error::ApiError;

/// What one log-probability takes in an answer, nearly: a token's text, its bytes and a number.
pub const LOGPROB_BYTES: usize = 64;

/// Text of one token, escaped: some more than the four bytes that it has on average.
const TEXT_BYTES: usize = 8;

/// A token's id and the comma after it.
pub const ID_BYTES: usize = 8;

/// Most bytes of log-probabilities in an answer that is made at once, or repeated at the end of its stream.
const REPEATED_BYTES_MAX: usize = 16 << 20;

/// What a stream writes at once is a part of what may be gathered.
const AT_ONCE: usize = 4;

/// What is known of the answers to one prompt.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// Bytes of the prompt's text, if it is repeated.
    pub echo_bytes: usize,
    /// Tokens of the prompt, if it is repeated.
    pub echo_tokens: usize,
    /// Its tokens.
    pub prompt_tokens: usize,
    /// Most tokens that follow it.
    pub max_tokens: usize,
}

impl Params {
    /// Refuses an answer that may become too large, before anything is done for it. A stream holds nothing but the prompts that it
    /// repeats.
    ///
    /// # Errors
    /// 400 that names what makes it large.
    pub fn check_size(
        &self,
        prompts: impl IntoIterator<Item = Extent>,
        bytes_max: usize,
    ) -> Result<(), ApiError> {
        let alternatives = self.sampling.logprobs.map(usize::from);
        let logprobs = alternatives.map_or(0, |top| (1 + top) * LOGPROB_BYTES);
        let of_prompt = self.prompt_logprobs.map(usize::from);
        let prompt_logprobs = of_prompt.map_or(0, |top| (1 + top) * LOGPROB_BYTES);
        let (mut bytes, mut choices, mut tokens, mut echoed) = (0_usize, 0, 0, false);
        for prompt in prompts {
            let Extent {
                echo_bytes,
                echo_tokens,
                prompt_tokens,
                max_tokens,
            } = prompt;
            let generated = if self.stream { 0 } else { max_tokens };
            let id_bytes = if self.token_ids { ID_BYTES } else { 0 };
            let each = echo_bytes
                + echo_tokens * logprobs
                + prompt_tokens * (id_bytes + prompt_logprobs)
                + generated * (TEXT_BYTES + logprobs + id_bytes);
            bytes = bytes.saturating_add(each.saturating_mul(self.n as usize));
            choices += self.n as usize;
            tokens = tokens.max(max_tokens);
            echoed |= echo_bytes > 0;
        }
        let most = if self.stream {
            bytes_max / AT_ONCE
        } else {
            bytes_max
        };
        if bytes <= most {
            return Ok(());
        }
        let mut what = format!("{choices} choices of up to {tokens} tokens");
        if let Some(top) = alternatives {
            what += &format!(", each with logprobs of {top} alternatives");
        }
        if let Some(top) = of_prompt {
            what += &format!(", with prompt_logprobs of {top} alternatives");
        }
        if echoed {
            what += ", with the prompt repeated";
        }
        let stream = if self.stream { "" } else { ", or for a stream" };
        let message = format!(
            "{what}, may make an answer of {bytes} bytes; this server makes such of up to {most}: ask for a smaller n, \
             max_tokens or logprobs{stream}"
        );
        Err(ApiError::param("max_tokens", message))
    }

    /// Refuses log-probabilities of a response that may have too many of them: its last events repeat all, and a response is kept.
    ///
    /// # Errors
    /// 400 that says which are too many.
    pub fn check_repeated(&self, max_tokens: usize) -> Result<(), ApiError> {
        let Some(top) = self.sampling.logprobs.map(usize::from) else {
            return Ok(());
        };
        let tokens_max = REPEATED_BYTES_MAX / ((1 + top) * LOGPROB_BYTES);
        if max_tokens <= tokens_max {
            return Ok(());
        }
        let message = format!(
            "with {top} top_logprobs an answer has up to {tokens_max} tokens, and this one may have {max_tokens}: ask for fewer \
             top_logprobs, or set max_output_tokens"
        );
        Err(ApiError::param("max_output_tokens", message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Limits;
    use crate::openai::ChatRequest;
    use crate::text::tokenizer::GenerationDefaults;
    use serde_json::json;

    fn check(more: serde_json::Value, prompt: Extent) -> Result<(), ApiError> {
        let mut body = json!({"messages": [{"role": "user", "content": "hi"}]});
        for (name, value) in more.as_object().unwrap() {
            body[name] = value.clone();
        }
        let limits = Limits::default();
        let body = body.to_string();
        let request =
            ChatRequest::parse(body.as_bytes(), &GenerationDefaults::default(), &limits).unwrap();
        request.params.check_size([prompt], limits.answer_bytes_max)
    }

    #[test]
    fn log_probabilities_that_are_repeated_have_a_bound_of_their_own() {
        let body = |top: u8| {
            let body = json!({"messages": [{"role": "user", "content": "hi"}], "logprobs": true, "top_logprobs": top});
            let (defaults, limits) = (GenerationDefaults::default(), Limits::default());
            ChatRequest::parse(body.to_string().as_bytes(), &defaults, &limits)
                .unwrap()
                .params
        };
        assert!(body(0).check_repeated(131_072).is_ok());
        assert!(body(20).check_repeated(12_000).is_ok());
        let error = body(20).check_repeated(13_000).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("max_output_tokens"));
        assert!(error.message.contains("20 top_logprobs"), "{error}");
    }

    #[test]
    fn an_answer_that_would_be_too_large_is_refused_with_what_makes_it_so() {
        let plain = |max_tokens| Extent {
            echo_bytes: 0,
            echo_tokens: 0,
            prompt_tokens: 0,
            max_tokens,
        };
        let all = json!({"n": 128, "logprobs": true, "top_logprobs": 20});
        let error = check(all.clone(), plain(20_000)).unwrap_err().message;
        assert!(
            error.contains("128 choices of up to 20000 tokens"),
            "{error}"
        );
        assert!(error.contains("logprobs of 20 alternatives"), "{error}");
        let mut stream = all;
        stream["stream"] = true.into();
        assert!(check(stream.clone(), plain(20_000)).is_ok());
        let echo = Extent {
            echo_bytes: 1 << 20,
            ..plain(1)
        };
        assert!(check(stream, echo).is_err(), "128 copies");
        let prompt = Extent {
            prompt_tokens: 20_000,
            ..plain(1)
        };
        let of_prompt = json!({"n": 128, "prompt_logprobs": 20});
        let error = check(of_prompt, prompt).unwrap_err().message;
        assert!(error.contains("prompt_logprobs of 20"), "{error}");
        assert!(check(json!({"n": 128}), prompt).is_ok());
        let long = json!({"logprobs": true, "top_logprobs": 20});
        assert!(check(long, plain(131_072)).is_ok());
        assert!(check(json!({"n": 128}), plain(131_072)).is_ok());
    }
}
