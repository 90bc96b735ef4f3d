//! From a checked request to its HTTP response: starts a driver per choice, then streams or gathers.

use std::sync::Arc;
use std::time::Duration;

use actix_web::http::header;
use actix_web::{HttpResponse, rt};
use baton_protocol::{Generation, prefix_chain};
use futures::future::try_join_all;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::Instrument;

use super::choice::{Choice, Destination, Gathering};
use super::outbox::Outbox;
use super::presence::Presence;
use super::sse::SseBody;
use super::whole::{self, Held};
use crate::error::{ApiError, ErrorKind};
use crate::http::name::{Named, fill, random_id};
use crate::openai::{ApiKind, Extent, Params, Shape, Shown};
use crate::output::{AnswerWriter, StreamWriter, Tally};
use crate::request::driver::{Job, drive};
use crate::request::inbox::{Inbox, Mailbox};
use crate::server::Server;
use crate::text::echo::Echo;
use crate::text::reader::Reading;

/// How long a stream's status waits for its first token: an early failure gets a status of its own, and
/// a client that waits longer sees keep-alives.
const STATUS_PATIENCE: Duration = Duration::from_millis(500);

/// One prompt of a request, ready to go.
pub struct Prepared {
    /// Its tokens.
    pub tokens: Arc<[u32]>,
    /// Its rules of generation.
    pub generation: Generation,
    /// What is to be repeated of it, if it is.
    pub echo: Option<Arc<Echo>>,
    /// How its outputs are read; none if all of them is content.
    pub reading: Option<Reading>,
}

/// How the answer to a request is written.
pub enum Answer {
    /// As OpenAI's choices.
    Choices(ApiKind),
    /// As a door of its own does. The request has one choice.
    Own(Box<dyn AnswerWriter>),
}

/// Carries a request out.
///
/// # Errors
/// What becomes an error response.
pub async fn answer(
    server: Arc<Server>,
    mailbox: &Arc<Mailbox>,
    answer: Answer,
    params: Params,
    prompts: Vec<Prepared>,
    arrived: Instant,
    mut client: Presence,
) -> Result<HttpResponse, ApiError> {
    let choices = prompts.len() * params.n as usize;
    let extents = prompts.iter().map(|prompt| Extent {
        echo_bytes: prompt.echo.as_ref().map_or(0, |echo| echo.text.len()),
        echo_tokens: prompt.echo.as_ref().map_or(0, |_| prompt.tokens.len()),
        prompt_tokens: prompt.tokens.len(),
        max_tokens: prompt.generation.max_tokens as usize,
    });
    params.check_size(extents, server.limits.answer_bytes_max)?;
    if let (Answer::Own(_), [prompt]) = (&answer, &prompts[..]) {
        params.check_repeated(prompt.generation.max_tokens as usize)?;
    }
    let named = client.named();
    let id = named.id;
    let shape = |kind: ApiKind| {
        let token_ids = params.token_ids.then(|| {
            let prompts = prompts.iter().map(|prompt| Arc::clone(&prompt.tokens));
            (prompts.collect(), params.n as usize)
        });
        let shown = Shown {
            stream: params.stream,
            include_usage: params.include_usage,
            continuous_usage: params.continuous_usage,
            logprobs: params.sampling.logprobs.is_some(),
            prompt_logprobs: params.prompt_logprobs.is_some(),
            tokens_as_ids: params.tokens_as_ids,
            calls_only: prompts
                .iter()
                .any(|prompt| prompt.reading.as_ref().is_some_and(|it| it.is_forced)),
            token_ids,
        };
        let fingerprint = server.model.system_fingerprint();
        Shape::new(
            kind,
            &id.to_string(),
            server.model_names.first(),
            &fingerprint,
            shown,
        )
    };
    let one_prompt = matches!(answer, Answer::Choices(ApiKind::Chat));
    let writer: Writer = match answer {
        Answer::Choices(kind) => Writer::Choices(Box::new(shape(kind))),
        Answer::Own(writer) => Writer::Own(writer),
    };
    let prompt_tokens = prompts
        .iter()
        .map(|prompt| prompt.tokens.len() as u64)
        .sum();
    if let Some(trace) = client.trace() {
        trace.prompts(prompt_tokens);
    }
    let tally = Tally::new(prompt_tokens, prompts.len(), params.n as usize);
    let request = Request {
        server: &server,
        mailbox,
        params: &params,
        named: &named,
        arrived,
        one_prompt,
    };
    if params.stream {
        let writer: Box<dyn StreamWriter> = match writer {
            Writer::Choices(shape) => shape,
            Writer::Own(writer) => writer,
        };
        let outbox = Outbox::new(choices, tally, writer);
        client.reads(&outbox);
        let to = || Destination::Stream(outbox.share());
        request.start(prompts, &mut client, to)?;
        outbox.begun(STATUS_PATIENCE).await?;
        return Ok(HttpResponse::Ok()
            .insert_header((header::CONTENT_TYPE, "text/event-stream; charset=utf-8"))
            .insert_header((header::CACHE_CONTROL, "no-cache"))
            .insert_header(("X-Accel-Buffering", "no"))
            .body(SseBody::new(outbox, client)));
    }
    let mut waiting = Vec::with_capacity(choices);
    let to = || {
        let (to, receiver) = oneshot::channel();
        waiting.push(receiver);
        let held = Held::nothing(&server.answers);
        Destination::Whole(Some(Gathering { to, held }))
    };
    request.start(prompts, &mut client, to)?;
    let whole = waiting.into_iter().map(|choice| async move {
        let lost = |_| ApiError::new(ErrorKind::Internal, "a generation was dropped");
        choice.await.map_err(lost)?
    });
    // With the first that fails: the others need not come to their end for nothing.
    let whole = try_join_all(whole).await?;
    match writer {
        Writer::Choices(shape) => Ok(whole::response(server, *shape, tally, whole, client)),
        Writer::Own(writer) => match &whole[..] {
            [one] => Ok(whole::document(writer, tally, one, &server.model)),
            _ => Err(ApiError::new(
                ErrorKind::Internal,
                "an answer of one choice has several",
            )),
        },
    }
}

/// What writes the answer.
enum Writer {
    Choices(Box<Shape>),
    Own(Box<dyn AnswerWriter>),
}

/// What all choices of a request share.
struct Request<'a> {
    server: &'a Arc<Server>,
    mailbox: &'a Arc<Mailbox>,
    params: &'a Params,
    named: &'a Named,
    arrived: Instant,
    /// What is told of the prompt is told once.
    one_prompt: bool,
}

impl Request<'_> {
    /// Starts a driver for every choice.
    fn start(
        &self,
        prompts: Vec<Prepared>,
        client: &mut Presence,
        mut to: impl FnMut() -> Destination,
    ) -> Result<(), ApiError> {
        let deadline = self.arrived + self.server.request_budget;
        // Without a seed of the client's every choice draws its own numbers.
        let seed = if self.params.seeded {
            self.params.sampling.seed
        } else {
            random_seed()?
        };
        let model = &self.server.model.fingerprint;
        let block_tokens = self.server.fleet().block_tokens(model);
        for prompt in prompts {
            let salt = self.params.cache_salt;
            let chain: Arc<[u64]> = prefix_chain(salt, block_tokens, &prompt.tokens).into();
            for i in 0..self.params.n {
                let index = client.choices();
                let request = if index == 0 {
                    self.named.id
                } else {
                    random_id()?
                };
                let mut generation = prompt.generation.clone();
                generation.sampling.seed = seed.wrapping_add(u64::from(i));
                let echo = prompt.echo.clone();
                let echoed = self.params.sampling.logprobs.filter(|_| echo.is_some());
                let of_prompt = self.params.prompt_logprobs;
                let of_prompt = of_prompt.filter(|_| i == 0 || !self.one_prompt);
                let job = Job {
                    request,
                    prompt: Arc::clone(&prompt.tokens),
                    chain: Arc::clone(&chain),
                    cache_salt: salt,
                    prompt_logprobs: echoed.max(of_prompt),
                    class: self.params.class,
                    level: client.level(),
                    arrived: self.arrived,
                    deadline,
                    trace: client.trace(),
                    generation,
                };
                let choice = Choice::new(
                    Arc::clone(self.server),
                    index,
                    to(),
                    self.params,
                    &prompt.tokens,
                    of_prompt,
                    echo,
                );
                let choice = choice.read_as(prompt.reading.clone());
                let inbox = Arc::new(Inbox::default());
                client.waits_for(&inbox);
                let registry = &self.server.registry;
                let registered =
                    registry.register(request, Arc::clone(self.mailbox), Arc::clone(&inbox));
                let span = self.named.span(request);
                let server = Arc::clone(self.server);
                rt::spawn(drive(server, job, inbox, registered, choice).instrument(span));
            }
        }
        Ok(())
    }
}

fn random_seed() -> Result<u64, ApiError> {
    let mut bytes = [0; 8];
    fill(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}
