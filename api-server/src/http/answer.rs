//! From a checked request to its HTTP response: starts a driver per choice, then streams or gathers.

use std::sync::Arc;
use std::time::Duration;

use actix_web::http::{StatusCode, header};
use actix_web::{HttpResponse, rt};
use baton_protocol::{Generation, RequestId};
use futures::future::try_join_all;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::authorize::Caller;
use super::choice::{Choice, Destination, Echo, Whole};
use super::respond;
use super::sse::{Outbox, Presence, SseBody};
use crate::driver::{Job, drive};
use crate::error::{ApiError, ErrorKind};
use crate::inbox::{Inbox, Mailbox};
use crate::openai::{ApiKind, Params, Shape, Tally};
use crate::router::prefix_chain;
use crate::server::Server;

/// How long a stream's status waits for its first token: an early failure gets a status of its own, and
/// a client that waits longer sees keep-alives.
const STATUS_PATIENCE: Duration = Duration::from_millis(500);

/// One prompt of a request, ready to go.
pub struct Prepared {
    /// Its tokens.
    pub tokens: Arc<[u32]>,
    /// Its rules of generation.
    pub generation: Generation,
    /// Its text, if it is to be repeated.
    pub echo: Option<String>,
}

/// Carries a request out.
///
/// # Errors
/// What becomes an error response.
pub async fn answer(
    server: Arc<Server>,
    mailbox: &Arc<Mailbox>,
    kind: ApiKind,
    params: Params,
    prompts: Vec<Prepared>,
    arrived: Instant,
    caller: Caller,
) -> Result<HttpResponse, ApiError> {
    let choices = prompts.len() * params.n as usize;
    let in_flight_max = server.limits.in_flight_max;
    if server.registry.len() + choices > in_flight_max {
        let message = format!("this server has its bound of {in_flight_max} requests in flight");
        return Err(ApiError::new(ErrorKind::TooManyRequests, message));
    }
    if let Some(fault) = server.bus.gone(Instant::now()) {
        let message = format!("{fault}: no worker can be asked; try again");
        return Err(ApiError::new(ErrorKind::Bus, message));
    }
    let place = match caller.0 {
        Some(key) => Some(server.keys.admit(&key, choices)?),
        None => None,
    };
    let id = random_id()?;
    let shape = Arc::new(Shape::new(
        kind,
        &id.to_string(),
        &server.model_name,
        params.stream,
        params.include_usage,
        params.sampling.logprobs.is_some(),
    ));
    let prompt_tokens = prompts
        .iter()
        .map(|prompt| prompt.tokens.len() as u64)
        .sum();
    let mut tally = Tally::new(prompt_tokens, prompts.len(), params.n as usize);
    if params.stream {
        let outbox = Outbox::new(choices, tally);
        let to = || Destination::Stream(outbox.share(), Arc::clone(&shape));
        let presence = start(&server, mailbox, &params, prompts, id, arrived, to)?;
        if let Err(error) = outbox.begun(STATUS_PATIENCE).await {
            // There will be no body: the other choices need not wait for one to read.
            outbox.close();
            return Err(error);
        }
        return Ok(HttpResponse::Ok()
            .insert_header((header::CONTENT_TYPE, "text/event-stream; charset=utf-8"))
            .insert_header((header::CACHE_CONTROL, "no-cache"))
            .insert_header(("X-Accel-Buffering", "no"))
            .body(SseBody::new(outbox, presence, place)));
    }
    let mut waiting = Vec::with_capacity(choices);
    let to = || {
        let (sender, receiver) = oneshot::channel();
        waiting.push(receiver);
        Destination::Whole(Some(sender))
    };
    let presence = start(&server, mailbox, &params, prompts, id, arrived, to)?;
    let whole = waiting.into_iter().map(|choice| async move {
        let lost = |_| ApiError::new(ErrorKind::Internal, "a generation was dropped");
        choice.await.map_err(lost)?
    });
    // With the first that fails: the others need not come to their end for nothing.
    let whole = try_join_all(whole).await?;
    drop((presence, place));
    Ok(respond::json(
        StatusCode::OK,
        in_one_piece(&server, &shape, &mut tally, &whole),
    ))
}

fn in_one_piece(server: &Server, shape: &Shape, tally: &mut Tally, choices: &[Whole]) -> Vec<u8> {
    let mut out = Vec::with_capacity(1 << 10);
    shape.open_answer(&mut out);
    for (index, choice) in choices.iter().enumerate() {
        let Whole {
            text,
            logprobs,
            finish,
            usage,
        } = choice;
        tally.add(index, *usage);
        shape.choice(index, text, logprobs, *finish, &server.model, &mut out);
    }
    shape.close_answer(tally.usage(), &mut out);
    out
}

/// Starts a driver for every choice.
fn start(
    server: &Arc<Server>,
    mailbox: &Arc<Mailbox>,
    params: &Params,
    prompts: Vec<Prepared>,
    id: RequestId,
    arrived: Instant,
    mut to: impl FnMut() -> Destination,
) -> Result<Presence, ApiError> {
    let deadline = arrived + server.request_budget;
    let mut presence = Presence(Vec::new());
    let want_logprobs = params.sampling.logprobs.is_some();
    // Without a seed of the client's every choice draws its own numbers.
    let seed = if params.seeded {
        params.sampling.seed
    } else {
        random_seed()?
    };
    for prompt in prompts {
        let chain: Arc<[u64]> = prefix_chain(&prompt.tokens).into();
        for i in 0..params.n {
            let index = presence.0.len();
            let request = if index == 0 { id } else { random_id()? };
            let mut generation = prompt.generation.clone();
            generation.sampling.seed = seed.wrapping_add(u64::from(i));
            let echo = prompt.echo.clone().map(|text| Echo {
                text,
                tokens: Arc::clone(&prompt.tokens),
            });
            let job = Job {
                request,
                prompt: Arc::clone(&prompt.tokens),
                chain: Arc::clone(&chain),
                prompt_logprobs: params.sampling.logprobs.filter(|_| echo.is_some()),
                arrived,
                deadline,
                generation,
            };
            let choice = Choice::new(
                Arc::clone(server),
                index,
                to(),
                params.stops.clone(),
                params.min_tokens,
                want_logprobs,
                echo,
            );
            let inbox = Arc::new(Inbox::default());
            presence.0.push(Arc::clone(&inbox));
            // Registered at once: the bound on requests in flight counts it from here on.
            let registered =
                server
                    .registry
                    .register(request, Arc::clone(mailbox), Arc::clone(&inbox));
            rt::spawn(drive(Arc::clone(server), job, inbox, registered, choice));
        }
    }
    Ok(presence)
}

fn random_id() -> Result<RequestId, ApiError> {
    let mut bytes = [0; 16];
    fill(&mut bytes)?;
    Ok(RequestId(u128::from_le_bytes(bytes)))
}

fn random_seed() -> Result<u64, ApiError> {
    let mut bytes = [0; 8];
    fill(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

fn fill(bytes: &mut [u8]) -> Result<(), ApiError> {
    getrandom::fill(bytes)
        .map_err(|error| ApiError::new(ErrorKind::Internal, format!("no random numbers: {error}")))
}
