//! `POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's doors.

use actix_web::{HttpRequest, HttpResponse, web};

use super::generate::{Answer, Asked, Asker, chat_through};
use super::status::check_model;
use super::tokenize::{chat_tokens, respond};
use crate::anthropic::{self, CountRequest, MessageWriter};
use crate::error::ApiError;
use crate::request::inbox::Mailbox;
use crate::server::Server;
use crate::text::texts::Until;

/// `POST /v1/messages`.
pub async fn messages(
    server: web::Data<Server>,
    mailbox: web::Data<Mailbox>,
    request: HttpRequest,
    payload: web::Payload,
) -> HttpResponse {
    chat_through(read, server, mailbox, request, payload).await
}

fn read(server: &Server, asker: &Asker, body: &[u8]) -> Result<Asked, ApiError> {
    let chat = anthropic::read(body, &server.model.defaults, &server.limits)?;
    let writer = MessageWriter::new(
        &asker.named.id.to_string(),
        server.model_names.first(),
        &asker.named.name,
        chat.params.max_tokens.unwrap_or(u32::MAX),
    );
    Ok(Asked {
        chat,
        answer: Answer::Own(Box::new(writer)),
    })
}

/// `POST /v1/messages/count_tokens`.
pub async fn count_tokens(
    server: web::Data<Server>,
    request: HttpRequest,
    payload: web::Payload,
) -> HttpResponse {
    respond(server.into_inner(), request, payload, count).await
}

fn count(server: &Server, body: &[u8], until: &Until) -> Result<String, ApiError> {
    let CountRequest {
        model,
        messages,
        rendering,
        offer,
    } = CountRequest::parse(body)?;
    check_model(server, model.as_deref())?;
    // What would be refused there is refused here.
    offer.format(server.model.formats.format, server.model.shows_tools)?;
    let tokens = chat_tokens(server, messages, rendering, false, until)?;
    Ok(format!("{{\"input_tokens\":{}}}", tokens.len()))
}
