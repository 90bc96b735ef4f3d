//! Bodies of `POST /v1/chat/completions`, `/v1/completions` and `/v1/messages`.

use baton_api_server::Limits;
use baton_api_server::fuzzing::{
    ApiError, ChatRequest, CompletionRequest, CountRequest, Params, Prompt, TextError, Until,
    read_messages,
};
use baton_protocol::{
    ApiServerId, PROTOCOL_VERSION, PrefillJob, RequestId, SequenceSpec, decode, encode,
};
use serde_json::Value;

use crate::fixture;

/// Longest sentence that a client is told.
const MESSAGE_BYTES_MAX: usize = 4 << 10;

/// Reads a body as a chat of either schema and as a text completion. One that is taken must make a job that the bus carries and a worker
/// takes; one that is not gets a short sentence.
pub fn http_body(data: &[u8]) {
    let (model, limits) = (fixture::model(), Limits::default());
    chat(ChatRequest::parse(data, &model.defaults, &limits));
    chat(read_messages(data, &model.defaults, &limits));
    if let Err(error) = CountRequest::parse(data) {
        told(&error);
    }
    match CompletionRequest::parse(data, &model.defaults, &limits) {
        Err(error) => told(&error),
        Ok(CompletionRequest {
            params, prompts, ..
        }) => {
            assert!(prompts.len() * params.n as usize <= limits.choices_max);
            for prompt in prompts {
                let tokens = match prompt {
                    Prompt::Text(text) => fits(model.encode(&text, true, &Until::forever())),
                    Prompt::Tokens(tokens) => Some(tokens),
                };
                let Some(tokens) = tokens else { continue };
                if tokens.iter().all(|token| *token < fixture::VOCAB) {
                    runs(&params, tokens, Some(16));
                }
            }
        }
    }
}

/// A chat, whatever the door through which it came.
fn chat(request: Result<ChatRequest, ApiError>) {
    let model = fixture::model();
    match request {
        Err(error) => told(&error),
        Ok(ChatRequest {
            params,
            messages,
            rendering,
            ..
        }) => {
            let until = Until::forever();
            let keep = params.keep(model, None);
            // A turn that goes on has no end yet.
            let turns = messages.len() - usize::from(rendering.continue_final_message);
            let prompt = fits(model.render_chat_as(messages, rendering, keep, &until));
            let tokens = prompt.and_then(|prompt| {
                let whole = model.encode_chat(&prompt, &until);
                match keep {
                    // What is cut may have lost ends of turns.
                    Some(keep) => {
                        let cut = fits(model.encode_chat_as(&prompt, false, Some(keep), &until))?;
                        assert!(cut.len() <= keep.tokens, "{} tokens", cut.len());
                        if let Ok(whole) = &whole {
                            assert!(whole.ends_with(&cut) || whole.starts_with(&cut));
                        }
                        runs(&params, cut, None);
                        None
                    }
                    None => fits(whole),
                }
            });
            if let Some(tokens) = tokens {
                let special = tokens
                    .iter()
                    .filter(|token| model.vocabulary.special(**token));
                assert_eq!(
                    special.count(),
                    turns,
                    "each message ends, and none ends another"
                );
                runs(&params, tokens, None);
            }
        }
    }
}

/// What came of a text. This model takes every text that is not too long for it.
fn fits<T>(outcome: Result<T, TextError>) -> Option<T> {
    match outcome {
        Ok(done) => Some(done),
        Err(TextError::TooLong(_) | TextError::Uncut) => None,
        Err(error) => panic!("{error:?}"),
    }
}

fn runs(params: &Params, tokens: Vec<u32>, max_tokens: Option<u32>) {
    let model = fixture::model();
    if tokens.is_empty() {
        return;
    }
    let generation = match params.generation(model, "prompt", tokens.len(), max_tokens) {
        Ok(generation) => generation,
        Err(error) => return told(&error),
    };
    let job = PrefillJob {
        v: PROTOCOL_VERSION,
        request: RequestId(1),
        api_server: ApiServerId::new("api").expect("a name"),
        api_incarnation: None,
        budget_ms: 1,
        model: fixture::fingerprint(),
        sequence: SequenceSpec {
            prompt_tokens: tokens.len() as u32,
            tokens: tokens.into(),
            generation,
            cache_salt: params.cache_salt,
            service: baton_protocol::Service::default(),
        },
        prompt_logprobs: None,
        stream: false,
        source: None,
        trace: None,
    };
    let bytes = encode(&job).expect("a prompt within the model's bound fits a message");
    let mut heard: PrefillJob = decode(&bytes).expect("it is read as it was written");
    assert_eq!(heard, job);
    let taken = fixture::checks().sequence(&mut heard.sequence);
    assert_eq!(
        taken,
        Ok(()),
        "taken over HTTP and refused by the worker: {job:?}"
    );
}

fn told(error: &ApiError) {
    assert!(
        error.message.len() <= MESSAGE_BYTES_MAX,
        "{} bytes",
        error.message.len()
    );
    let status = error.kind.row().status;
    assert!(
        (400..500).contains(&status),
        "{status} for what the client sent"
    );
    let body: Value = serde_json::from_str(&error.body()).expect("error bodies are JSON");
    assert!(body["error"]["message"].is_string());
}
