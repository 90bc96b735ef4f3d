//! `/v1/responses`: OpenAI's newer door, and the responses that are kept.

use std::sync::Arc;

use actix_web::http::StatusCode;
use actix_web::{HttpRequest, HttpResponse, web};
use serde_json::{Value, json};

use super::authorize::Caller;
use super::generate::{Answer, Asked, Asker, chat_through};
use super::respond::{self, refuse};
use crate::error::{ApiError, Dialect};
use crate::openai::responses::{self, Keeping, Kept, ResponseRequest, ResponseWriter};
use crate::request::inbox::Mailbox;
use crate::server::Server;

/// `POST /v1/responses`.
pub async fn create(
    server: web::Data<Server>,
    mailbox: web::Data<Mailbox>,
    request: HttpRequest,
    payload: web::Payload,
) -> HttpResponse {
    chat_through(read, server, mailbox, request, payload).await
}

fn read(server: &Server, asker: &Asker, body: &[u8]) -> Result<Asked, ApiError> {
    let store = &server.responses;
    let owner: Option<Arc<str>> = asker.key.as_ref().map(|key| key.name.as_str().into());
    let find = |id: &str| store.get(id, owner.as_deref());
    let ResponseRequest {
        chat,
        settings,
        input,
        before,
        store: keeps,
    } = responses::read(body, &server.model.defaults, &server.limits, &find)?;
    let keeping = (keeps && store.is_on()).then(|| Keeping {
        store: Arc::clone(store),
        owner: owner.clone(),
        before,
        input,
    });
    let id = asker.named.id.to_string();
    let writer = ResponseWriter::new(&id, &server.model_name, &settings, keeping);
    Ok(Asked {
        chat,
        answer: Answer::Own(Box::new(writer)),
    })
}

/// `GET /v1/responses/{id}`.
pub async fn get(
    server: web::Data<Server>,
    request: HttpRequest,
    id: web::Path<String>,
) -> HttpResponse {
    found(&server, &request, &id, |kept| kept.response.to_string())
}

/// `GET /v1/responses/{id}/input_items`.
pub async fn input_items(
    server: web::Data<Server>,
    request: HttpRequest,
    id: web::Path<String>,
) -> HttpResponse {
    found(&server, &request, &id, |kept| {
        let input = kept.turns.last().map_or("[]", |turn| turn.input.as_str());
        let items: Vec<Value> = serde_json::from_str(input).unwrap_or_default();
        let items: Vec<Value> = items.into_iter().enumerate().map(named).collect();
        let id = |item: Option<&Value>| item.map_or(Value::from(""), |item| item["id"].clone());
        // The newest first, as OpenAI has them.
        let items: Vec<Value> = items.into_iter().rev().collect();
        json!({"object": "list", "first_id": id(items.first()), "last_id": id(items.last()), "has_more": false, "data": items})
            .to_string()
    })
}

/// An item as a list shows it: with an id, and a message's text as a part.
fn named((i, mut item): (usize, Value)) -> Value {
    if let Some(item) = item.as_object_mut() {
        item.entry("type").or_insert("message".into());
        item.entry("id")
            .or_insert_with(|| format!("item_{i}").into());
        if let Some(Value::String(text)) = item.get("content") {
            let kind = match item.get("role").and_then(Value::as_str) {
                Some("assistant") => "output_text",
                _ => "input_text",
            };
            let parts = json!([{"type": kind, "text": text}]);
            item.insert("content".to_owned(), parts);
        }
    }
    item
}

/// `DELETE /v1/responses/{id}`.
pub async fn delete(
    server: web::Data<Server>,
    request: HttpRequest,
    id: web::Path<String>,
) -> HttpResponse {
    let Caller(key) = Caller::of(&request);
    let owner = key.as_ref().map(|key| key.name.as_str());
    match server.responses.delete(&id, owner) {
        true => {
            let body = json!({"id": *id, "object": "response", "deleted": true});
            respond::json(StatusCode::OK, body.to_string())
        }
        false => refuse(
            &server,
            Dialect::OpenAi,
            &responses::not_kept("response_id", &id),
        ),
    }
}

/// `POST /v1/responses/{id}/cancel`: refused, since only responses in the background can be cancelled.
pub async fn cancel(
    server: web::Data<Server>,
    request: HttpRequest,
    id: web::Path<String>,
) -> HttpResponse {
    let Caller(key) = Caller::of(&request);
    let owner = key.as_ref().map(|key| key.name.as_str());
    let error = match server.responses.get(&id, owner) {
        Some(_) => ApiError::param(
            "response_id",
            "this response is over: only responses in the background can be cancelled, and there are none",
        ),
        None => responses::not_kept("response_id", &id),
    };
    refuse(&server, Dialect::OpenAi, &error)
}

fn found(
    server: &Server,
    request: &HttpRequest,
    id: &str,
    show: impl FnOnce(Kept) -> String,
) -> HttpResponse {
    let asks_stream = request
        .query_string()
        .split('&')
        .any(|pair| pair == "stream=true");
    if asks_stream {
        let message = "stream must be false: a response that is kept is whole";
        return refuse(server, Dialect::OpenAi, &ApiError::param("stream", message));
    }
    let Caller(key) = Caller::of(request);
    let owner = key.as_ref().map(|key| key.name.as_str());
    match server.responses.get(id, owner) {
        Some(kept) => respond::json(StatusCode::OK, show(kept)),
        None => refuse(
            server,
            Dialect::OpenAi,
            &responses::not_kept("response_id", id),
        ),
    }
}
