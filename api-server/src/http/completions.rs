//! The two endpoints that generate: from the body to prompts in tokens.

use std::sync::Arc;

use actix_web::{HttpRequest, HttpResponse, web};
use tokio::time::{Instant, timeout_at};

use super::answer::{Prepared, answer};
use super::authorize::Caller;
use super::body::{self, Body, Room};
use super::respond::refuse;
use super::status::unknown_model;
use crate::error::{ApiError, ErrorKind};
use crate::inbox::Mailbox;
use crate::openai::{ApiKind, ChatRequest, CompletionRequest, Params, Prompt};
use crate::server::Server;
use crate::tokenizer::INLINE_BYTES_MAX;

/// Output tokens of a text completion that names none: OpenAI's.
const COMPLETION_TOKENS: u32 = 16;

/// `POST /v1/chat/completions`.
pub async fn chat(
    server: web::Data<Server>,
    mailbox: web::Data<Mailbox>,
    request: HttpRequest,
    payload: web::Payload,
) -> HttpResponse {
    let server = server.into_inner();
    respond(
        &server.clone(),
        try_chat(server, mailbox.into_inner(), request, payload).await,
    )
}

/// `POST /v1/completions`.
pub async fn text(
    server: web::Data<Server>,
    mailbox: web::Data<Mailbox>,
    request: HttpRequest,
    payload: web::Payload,
) -> HttpResponse {
    let server = server.into_inner();
    respond(
        &server.clone(),
        try_text(server, mailbox.into_inner(), request, payload).await,
    )
}

fn respond(server: &Server, outcome: Result<HttpResponse, ApiError>) -> HttpResponse {
    outcome.unwrap_or_else(|error| refuse(server, &error))
}

async fn try_chat(
    server: Arc<Server>,
    mailbox: Arc<Mailbox>,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse, ApiError> {
    let arrived = Instant::now();
    let caller = Caller::of(&request);
    let deadline = arrived + server.request_budget;
    let Body { bytes, room } = body::read(&request, payload, &server, deadline).await?;
    let ChatRequest { params, messages } =
        ChatRequest::parse(&bytes, &server.model.defaults, &server.limits)?;
    check_model(&server, &params)?;
    let large = bytes.len() > INLINE_BYTES_MAX;
    drop(bytes);
    let on_server = Arc::clone(&server);
    let tokens = on_thread(room, large.then_some(deadline), move || {
        let refused = |message| ApiError::param("messages", message);
        let text = on_server.model.render_chat(&messages).map_err(refused)?;
        on_server.model.encode(&text, false).map_err(refused)
    })
    .await?;
    let generation = params.generation(&server.model, "messages", tokens.len(), None)?;
    let prepared = Prepared {
        tokens: tokens.into(),
        generation,
        echo: None,
    };
    answer(
        server,
        &mailbox,
        ApiKind::Chat,
        params,
        vec![prepared],
        arrived,
        caller,
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
    let caller = Caller::of(&request);
    let deadline = arrived + server.request_budget;
    let Body { bytes, room } = body::read(&request, payload, &server, deadline).await?;
    let CompletionRequest {
        params,
        prompts,
        echo,
    } = CompletionRequest::parse(&bytes, &server.model.defaults, &server.limits)?;
    check_model(&server, &params)?;
    let large = bytes.len() > INLINE_BYTES_MAX;
    drop(bytes);
    let (on_server, wanted) = (Arc::clone(&server), params.clone());
    let prepared = on_thread(room, large.then_some(deadline), move || {
        prompts
            .into_iter()
            .map(|prompt| prepare(&on_server, &wanted, prompt, echo))
            .collect()
    })
    .await?;
    answer(
        server,
        &mailbox,
        ApiKind::Completion,
        params,
        prepared,
        arrived,
        caller,
    )
    .await
}

fn prepare(
    server: &Server,
    params: &Params,
    prompt: Prompt,
    echo: bool,
) -> Result<Prepared, ApiError> {
    let model = &server.model;
    let tokens = match &prompt {
        Prompt::Text(text) => model
            .encode(text, true)
            .map_err(|message| ApiError::param("prompt", message))?,
        Prompt::Tokens(tokens) => tokens.clone(),
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
    let echo = echo.then(|| match prompt {
        Prompt::Text(text) => text,
        Prompt::Tokens(_) => model.text(&tokens),
    });
    Ok(Prepared {
        tokens: tokens.into(),
        generation,
        echo,
    })
}

fn check_model(server: &Server, params: &Params) -> Result<(), ApiError> {
    match &params.model {
        Some(name) if *name != server.model_name => Err(unknown_model(server, name)),
        Some(_) => Ok(()),
        None => Err(ApiError::param("model", "model is required")),
    }
}

/// Runs what takes long for a large body on a thread of its own, waiting for it until the deadline, and the rest here. The body's
/// room is free when the work is over, also where nobody waits for that any more.
async fn on_thread<T: Send + 'static>(
    room: Room,
    large: Option<Instant>,
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let work = move || {
        let done = work();
        drop(room);
        done
    };
    let Some(deadline) = large else {
        return work();
    };
    let outcome = timeout_at(deadline, web::block(work)).await;
    let late = |_| {
        let message = "the request's time ran out while its prompt was made into tokens";
        ApiError::new(ErrorKind::Deadline, message)
    };
    outcome
        .map_err(late)?
        .unwrap_or_else(|_| Err(ApiError::new(ErrorKind::Internal, "a thread was lost")))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use tokio::sync::Semaphore;

    use super::*;

    #[tokio::test]
    async fn a_body_has_its_room_until_its_thread_is_done() {
        let all = Arc::new(Semaphore::new(3));
        let taken = Arc::clone(&all).try_acquire_many_owned(2).unwrap();
        let (go_on, going) = mpsc::channel();
        let room = Room::of(taken);
        let work = on_thread(room, Some(Instant::now()), move || {
            going
                .recv()
                .map_err(|_| ApiError::new(ErrorKind::Internal, "nobody waits"))
        });
        assert_eq!(work.await.unwrap_err().kind, ErrorKind::Deadline);
        assert_eq!(all.available_permits(), 1, "the thread is still at it");
        go_on.send(()).unwrap();
        let free = Arc::clone(&all).acquire_many_owned(3);
        let free = tokio::time::timeout(std::time::Duration::from_secs(20), free).await;
        assert!(free.is_ok(), "the room comes back");
    }
}
