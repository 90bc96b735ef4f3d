//! The endpoints that generate: from the body to prompts in tokens.

use std::sync::Arc;

use actix_web::{HttpRequest, HttpResponse, web};
use baton_protocol::PrefillReply;
use tokio::time::Instant;

use super::answer::{Answer, Prepared, answer};
use super::presence::Presence;
use crate::admission::Place;
use crate::error::{ApiError, Dialect, ErrorKind};
use crate::http::authorize::Caller;
use crate::http::body::{self, Body};
use crate::http::name::Named;
use crate::http::respond::refuse;
use crate::http::status::check_model;
use crate::http::trace;
use crate::keys::Key;
use crate::openai::{ApiKind, ChatRequest, CompletionRequest, Params, Prompt, grammar};
use crate::request::inbox::Mailbox;
use crate::server::Server;
use crate::text::echo::Echo;
use crate::text::reader::Reading;
use crate::text::texts::{INLINE_BYTES_MAX, Until};
use crate::text::tokenizer::TextError;

/// Output tokens of a text completion that names none: OpenAI's.
const COMPLETION_TOKENS: u32 = 16;

/// Who sent a body.
pub struct Asker {
    /// The request's name and id, which is also the answer's.
    pub named: Named,
    /// The key, where there are keys.
    pub key: Option<Arc<Key>>,
}

/// A request for a chat, as a door has read it: all doors for chats come down to this.
pub struct Asked {
    /// What is asked for.
    pub chat: ChatRequest,
    /// How the answer is written. One that a door writes itself has one choice.
    pub answer: Answer,
}

/// Reads the body of a request that came to a door.
pub type Read = fn(&Server, &Asker, &[u8]) -> Result<Asked, ApiError>;

/// `POST /v1/chat/completions`.
pub async fn chat(
    server: web::Data<Server>,
    mailbox: web::Data<Mailbox>,
    request: HttpRequest,
    payload: web::Payload,
) -> HttpResponse {
    chat_through(read_chat, server, mailbox, request, payload).await
}

fn read_chat(server: &Server, _: &Asker, body: &[u8]) -> Result<Asked, ApiError> {
    Ok(Asked {
        chat: ChatRequest::parse(body, &server.model.defaults, &server.limits)?,
        answer: Answer::Choices(ApiKind::Chat),
    })
}

/// A chat whose body this door reads.
pub async fn chat_through(
    read: Read,
    server: web::Data<Server>,
    mailbox: web::Data<Mailbox>,
    request: HttpRequest,
    payload: web::Payload,
) -> HttpResponse {
    let server = server.into_inner();
    let dialect = Dialect::of(request.path());
    let outcome = try_chat(
        read,
        Arc::clone(&server),
        mailbox.into_inner(),
        request,
        payload,
    );
    let outcome = outcome.await;
    outcome.unwrap_or_else(|error| refuse(&server, dialect, &error))
}

/// `POST /v1/completions`.
pub async fn text(
    server: web::Data<Server>,
    mailbox: web::Data<Mailbox>,
    request: HttpRequest,
    payload: web::Payload,
) -> HttpResponse {
    let server = server.into_inner();
    let outcome = try_text(Arc::clone(&server), mailbox.into_inner(), request, payload);
    let outcome = outcome.await;
    outcome.unwrap_or_else(|error| refuse(&server, Dialect::OpenAi, &error))
}

/// A request gets no further than here without a place: not even its body is read.
fn admit(server: &Server, request: &HttpRequest) -> Result<Presence, ApiError> {
    if let Some(fault) = server.bus.gone(Instant::now()) {
        let message = format!("{fault}: no worker can be asked; try again");
        return Err(ApiError::new(ErrorKind::Bus, message));
    }
    let Caller(key) = Caller::of(request);
    let place = Place::take(&server.in_flight, key)?;
    let level = server.promises.level.of(request.headers())?;
    let client = Presence::new(Named::of(request)?, place);
    Ok(client.promised(level).traced(trace::of(request)))
}

async fn try_chat(
    read: Read,
    server: Arc<Server>,
    mailbox: Arc<Mailbox>,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse, ApiError> {
    let arrived = Instant::now();
    let client = admit(&server, &request)?;
    let deadline = arrived + server.request_budget;
    let Body { bytes, room } = body::read(&request, payload, &server, deadline).await?;
    let (on_server, place) = (Arc::clone(&server), client.place());
    let size = size(&bytes);
    let Caller(key) = Caller::of(&request);
    let asker = Asker {
        named: client.named(),
        key,
    };
    let work = move |until: &Until| {
        let _room = room;
        let model = &on_server.model;
        let Asked {
            mut chat,
            answer: written,
        } = read(&on_server, &asker, &bytes)?;
        drop(bytes);
        check_model(&on_server, chat.params.model.as_deref())?;
        chat.params.know(model, until)?;
        let format = chat.offer.format(model.formats.format, model.shows_tools)?;
        chat.suit(model.formats.format)?;
        let ChatRequest {
            mut params,
            messages,
            rendering,
            offer,
            include_reasoning,
        } = chat;
        place.grow(params.n as usize - 1)?;
        let refused = |error: TextError| error.of("messages", model);
        let default_max_tokens = on_server.default_max_tokens;
        let keep = params.keep(model, default_max_tokens);
        let prompt = model.render_chat_as(messages, rendering, keep, until);
        let prompt = prompt.map_err(refused)?;
        // Where no tool may be called, all of an output that follows a grammar is the answer, from its first token on.
        let reasoning = model.formats.reasoning.after_prompt(&prompt.text());
        let is_read = params.hold_calls(&offer, format, reasoning, model)?;
        let is_forced = offer.is_forced();
        let reading = is_read.then(|| Reading {
            format,
            reasoning,
            is_forced,
            tools: offer.tools,
            include_reasoning,
            parallel: offer.parallel,
        });
        let special = params.add_special_tokens.unwrap_or(false);
        let tokens = model.encode_chat_as(&prompt, special, keep, until);
        let tokens = tokens.map_err(refused)?;
        drop(prompt);
        let generation = params.generation(model, "messages", tokens.len(), default_max_tokens)?;
        if let Some(top) = params.prompt_logprobs {
            fits_the_bus(&on_server, tokens.len(), "prompt_logprobs", top)?;
        }
        let prepared = Prepared {
            tokens: tokens.into(),
            generation,
            echo: None,
            reading: reading.filter(|reading| !reading.is_plain()),
        };
        Ok((params, prepared, written))
    };
    let until = client.until(deadline);
    let (params, prepared, written) = server.texts.run(size, until, work).await?;
    answer(
        server,
        &mailbox,
        written,
        params,
        vec![prepared],
        arrived,
        client,
    )
    .await
}

async fn try_text(
    server: Arc<Server>,
    mailbox: Arc<Mailbox>,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse, ApiError> {
    let arrived = Instant::now();
    let client = admit(&server, &request)?;
    let deadline = arrived + server.request_budget;
    let Body { bytes, room } = body::read(&request, payload, &server, deadline).await?;
    let (on_server, place) = (Arc::clone(&server), client.place());
    let size = size(&bytes);
    let work = move |until: &Until| {
        let _room = room;
        let CompletionRequest {
            mut params,
            prompts,
            echo,
        } = CompletionRequest::parse(&bytes, &on_server.model.defaults, &on_server.limits)?;
        drop(bytes);
        check_model(&on_server, params.model.as_deref())?;
        params.know(&on_server.model, until)?;
        place.grow(prompts.len() * params.n as usize - 1)?;
        let prepared = prompts
            .into_iter()
            .map(|prompt| prepare(&on_server, &params, prompt, echo, until))
            .collect::<Result<Vec<_>, _>>()?;
        Ok((params, prepared))
    };
    let until = client.until(deadline);
    let (params, prepared) = server.texts.run(size, until, work).await?;
    answer(
        server,
        &mailbox,
        Answer::Choices(ApiKind::Completion),
        params,
        prepared,
        arrived,
        client,
    )
    .await
}

fn prepare(
    server: &Server,
    params: &Params,
    prompt: Prompt,
    echo: bool,
    until: &Until,
) -> Result<Prepared, ApiError> {
    let model = &server.model;
    let keep = params.keep(model, Some(COMPLETION_TOKENS));
    let (tokens, text) = match prompt {
        Prompt::Text(text) => {
            let special = params.add_special_tokens.unwrap_or(true);
            let tokens = model.encode_kept(&text, special, keep, until);
            // What is repeated is what is left of it.
            let text = keep.is_none().then_some(text);
            (tokens.map_err(|e| e.of("prompt", model))?, text)
        }
        Prompt::Tokens(mut tokens) => {
            keep.iter().for_each(|keep| keep.cut(&mut tokens));
            (tokens, None)
        }
    };
    if tokens.is_empty() {
        return Err(ApiError::param("prompt", "prompt has no tokens"));
    }
    let vocabulary = model.vocabulary.count();
    if let Some(token) = tokens.iter().find(|token| **token as usize >= vocabulary) {
        let message = format!("prompt names token {token}; the vocabulary has {vocabulary}");
        return Err(ApiError::param("prompt", message));
    }
    let generation = params.generation(model, "prompt", tokens.len(), Some(COMPLETION_TOKENS))?;
    let tokens: Arc<[u32]> = tokens.into();
    let logprobs = params.sampling.logprobs;
    let echoed = logprobs.filter(|_| echo);
    for (param, top) in [
        ("logprobs", echoed),
        ("prompt_logprobs", params.prompt_logprobs),
    ] {
        if let Some(top) = top {
            fits_the_bus(server, tokens.len(), param, top)?;
        }
    }
    let echo = echo.then(|| match text {
        Some(text) => {
            let with_offsets = logprobs.is_some();
            Echo::of_text(&model.vocabulary, text, Arc::clone(&tokens), with_offsets)
        }
        None => Echo::of_tokens(&model.vocabulary, Arc::clone(&tokens)),
    });
    Ok(Prepared {
        tokens,
        generation,
        echo: echo.map(Arc::new),
        reading: None,
    })
}

/// Whether the log-probabilities of a prompt can come back over the bus. Those of a prompt that is repeated are asked for with
/// `logprobs`.
fn fits_the_bus(server: &Server, tokens: usize, param: &str, top: u8) -> Result<(), ApiError> {
    let vocabulary = server.model.vocabulary.count() as u32;
    let bytes = PrefillReply::bytes_max(tokens, top, vocabulary);
    let bytes_max = server.bus.bytes_max();
    if bytes <= bytes_max {
        return Ok(());
    }
    let (with, without) = match param {
        "logprobs" => (
            "echo with ",
            "repeat a shorter prompt, or leave echo or logprobs out",
        ),
        _ => ("", "send a shorter prompt, or leave prompt_logprobs out"),
    };
    let message = format!(
        "{with}the log-probabilities of {tokens} prompt tokens and {top} alternatives each make an answer of up to {bytes} bytes, \
         and the bus carries {bytes_max}: ask for fewer alternatives, {without}"
    );
    let param = Some(param.to_owned());
    Err(ApiError {
        param,
        ..ApiError::new(ErrorKind::AnswerTooLarge, message)
    })
}

/// What a body counts as among texts: one that may ask for a grammar is as much work as a large one.
fn size(body: &[u8]) -> usize {
    match body.len() <= INLINE_BYTES_MAX && grammar::is_likely(body) {
        true => INLINE_BYTES_MAX + 1,
        false => body.len(),
    }
}
