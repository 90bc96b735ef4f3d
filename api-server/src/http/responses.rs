//! `/v1/responses`: OpenAI's newer door, and the responses that are kept.

use std::collections::HashMap;
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

/// Input items of a page, if the client does not say, and most of them.
const PAGE: usize = 20;
const PAGE_MAX: usize = 100;

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
        reasoned,
    } = responses::read(body, &server.model.defaults, &server.limits, &find)?;
    let keeping = (keeps && store.is_on()).then(|| Keeping {
        store: Arc::clone(store),
        owner: owner.clone(),
        before,
        input,
    });
    let id = asker.named.id.to_string();
    let writer = ResponseWriter::new(&id, server.model_names.first(), &settings, keeping)
        .with_reasoned(reasoned);
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
    found(&server, &request, &id, |kept| Ok(kept.response.to_string()))
}

/// `GET /v1/responses/{id}/input_items`.
pub async fn input_items(
    server: web::Data<Server>,
    request: HttpRequest,
    id: web::Path<String>,
    query: web::Query<HashMap<String, String>>,
) -> HttpResponse {
    found(&server, &request, &id, |kept| {
        let input = kept.turns.last().map_or("[]", |turn| turn.input.as_str());
        let items: Vec<Value> = serde_json::from_str(input).unwrap_or_default();
        let items = items.into_iter().enumerate().map(named).collect();
        page(items, &query).map(|page| page.to_string())
    })
}

/// Some of these items: `limit` of them, the last first or with `order` `asc` the first, and those behind the one that `after` names.
fn page(mut items: Vec<Value>, query: &HashMap<String, String>) -> Result<Value, ApiError> {
    let field = |name: &str| query.get(name).map(String::as_str);
    let limit = field("limit").map_or(Some(PAGE), |limit| limit.parse().ok());
    let Some(limit) = limit.filter(|limit| (1..=PAGE_MAX).contains(limit)) else {
        let message = format!("limit must be from 1 to {PAGE_MAX}");
        return Err(ApiError::param("limit", message));
    };
    match field("order") {
        None | Some("desc") => items.reverse(),
        Some("asc") => {}
        Some(_) => {
            let message = "order must be \"asc\" or \"desc\"";
            return Err(ApiError::param("order", message));
        }
    }
    let skipped = match field("after") {
        None => 0,
        Some(after) => match items.iter().position(|item| item["id"] == after) {
            Some(at) => at + 1,
            None => {
                let message = "after names no item of these";
                return Err(ApiError::param("after", message));
            }
        },
    };
    let has_more = items.len() > skipped + limit;
    let data: Vec<Value> = items.into_iter().skip(skipped).take(limit).collect();
    let id = |item: Option<&Value>| item.map_or(Value::from(""), |item| item["id"].clone());
    Ok(
        json!({"object": "list", "first_id": id(data.first()), "last_id": id(data.last()), "has_more": has_more, "data": data}),
    )
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
    show: impl FnOnce(Kept) -> Result<String, ApiError>,
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
        Some(kept) => match show(kept) {
            Ok(text) => respond::json(StatusCode::OK, text),
            Err(error) => refuse(server, Dialect::OpenAi, &error),
        },
        None => refuse(
            server,
            Dialect::OpenAi,
            &responses::not_kept("response_id", id),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_come_in_pages() {
        let items =
            || -> Vec<Value> { (0..5).map(|i| json!({"id": format!("item_{i}")})).collect() };
        let ids = |query: &[(&str, &str)]| {
            let query = query
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
            let page = page(items(), &query.collect())?;
            let data = page["data"].as_array().cloned().unwrap_or_default();
            let ids: Vec<u64> = data
                .iter()
                .map(|item| item["id"].as_str().unwrap()[5..].parse().unwrap())
                .collect();
            Ok::<_, ApiError>((ids, page["has_more"] == true))
        };
        assert_eq!(ids(&[]).unwrap(), (vec![4, 3, 2, 1, 0], false));
        assert_eq!(
            ids(&[("order", "asc"), ("limit", "2")]).unwrap(),
            (vec![0, 1], true)
        );
        let next = [("order", "asc"), ("limit", "2"), ("after", "item_1")];
        assert_eq!(ids(&next).unwrap(), (vec![2, 3], true));
        assert_eq!(ids(&[("after", "item_1")]).unwrap(), (vec![0], false));
        for (name, value) in [
            ("limit", "0"),
            ("limit", "101"),
            ("limit", "x"),
            ("order", "up"),
            ("after", "item_7"),
        ] {
            assert_eq!(
                ids(&[(name, value)]).unwrap_err().param.as_deref(),
                Some(name)
            );
        }
    }
}
