//! `POST /tokenize` and `/detokenize`: texts and chats as the model reads them, and back.

use std::fmt::Write as _;
use std::sync::Arc;

use actix_web::http::StatusCode;
use actix_web::{HttpRequest, HttpResponse, web};
use serde_json::Value;
use tokio::time::Instant;

use super::authorize::Caller;
use super::body::{self, Body};
use super::generate::Presence;
use super::name::Named;
use super::respond::{self, refuse};
use super::status::{check_model, longest_sequence};
use crate::admission::Place;
use crate::error::{ApiError, Dialect};
use crate::openai::{DetokenizeRequest, ToTokenize, TokenizeRequest, tools};
use crate::server::Server;
use crate::text::texts::Until;
use crate::text::tokenizer::{Rendering, TextError};

/// `POST /tokenize`.
pub async fn tokenize(
    server: web::Data<Server>,
    request: HttpRequest,
    payload: web::Payload,
) -> HttpResponse {
    respond(server.into_inner(), request, payload, tokens).await
}

/// `POST /detokenize`.
pub async fn detokenize(
    server: web::Data<Server>,
    request: HttpRequest,
    payload: web::Payload,
) -> HttpResponse {
    respond(server.into_inner(), request, payload, text).await
}

/// Reads the body and has it worked on where texts are. No worker is asked, so that the bus may be away.
pub async fn respond(
    server: Arc<Server>,
    request: HttpRequest,
    payload: web::Payload,
    work: fn(&Server, &[u8], &Until) -> Result<String, ApiError>,
) -> HttpResponse {
    let dialect = Dialect::of(request.path());
    let answer = async {
        let Caller(key) = Caller::of(&request);
        let client = Presence::new(Named::of(&request)?, Place::take(&server.in_flight, key)?);
        let deadline = Instant::now() + server.request_budget;
        let Body { bytes, room } = body::read(&request, payload, &server, deadline).await?;
        let (on_server, size) = (Arc::clone(&server), bytes.len());
        let work = move |until: &Until| {
            let _room = room;
            work(&on_server, &bytes, until)
        };
        server.texts.run(size, client.until(deadline), work).await
    };
    match answer.await {
        Ok(answer) => respond::json(StatusCode::OK, answer),
        Err(error) => refuse(&server, dialect, &error),
    }
}

fn tokens(server: &Server, body: &[u8], until: &Until) -> Result<String, ApiError> {
    let request = TokenizeRequest::parse(body)?;
    check_model(server, request.model.as_deref())?;
    let (model, special) = (&server.model, request.add_special_tokens);
    let tokens = match request.what {
        ToTokenize::Text(text) => {
            let tokens = model.encode(&text, special, until);
            tokens.map_err(|error| error.of("prompt", model))?
        }
        ToTokenize::Chat(messages, rendering) => {
            chat_tokens(server, messages, rendering, special, until)?
        }
    };
    let mut out = format!(
        "{{\"count\":{},\"max_model_len\":{},\"tokens\":[",
        tokens.len(),
        longest_sequence(server)
    );
    for (i, token) in tokens.iter().enumerate() {
        let comma = if i > 0 { "," } else { "" };
        // Writing to memory cannot fail.
        let _ = write!(out, "{comma}{token}");
    }
    out.push_str("],\"token_strs\":");
    if request.token_strs {
        let names = tokens.iter().map(|token| model.token_name(*token));
        let names: Vec<String> = names.map(Option::unwrap_or_default).collect();
        out.push_str(&serde_json::json!(names).to_string());
    } else {
        out.push_str("null");
    }
    out.push('}');
    Ok(out)
}

/// The tokens of a chat.
///
/// # Errors
/// 400 that names the messages.
pub fn chat_tokens(
    server: &Server,
    mut messages: Vec<Value>,
    rendering: Rendering,
    special: bool,
    until: &Until,
) -> Result<Vec<u32>, ApiError> {
    let model = &server.model;
    tools::suit(&mut messages, model.formats.format)?;
    let refused = |error: TextError| error.of("messages", model);
    let prompt = model.render_chat_as(messages, rendering, None, until);
    let prompt = prompt.map_err(refused)?;
    let tokens = model.encode_chat_as(&prompt, special, None, until);
    tokens.map_err(refused)
}

fn text(server: &Server, body: &[u8], _: &Until) -> Result<String, ApiError> {
    let request = DetokenizeRequest::parse(body)?;
    check_model(server, request.model.as_deref())?;
    let model = &server.model;
    let vocabulary = model.vocabulary.count();
    if let Some(token) = request
        .tokens
        .iter()
        .find(|token| **token as usize >= vocabulary)
    {
        let message = format!("tokens names token {token}; the vocabulary has {vocabulary}");
        return Err(ApiError::param("tokens", message));
    }
    let text = model.whole_text(&request.tokens);
    Ok(serde_json::json!({"prompt": text}).to_string())
}
