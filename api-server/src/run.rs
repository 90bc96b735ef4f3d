//! How an API server starts, serves and stops.

mod door;

use std::future::Future;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use actix_web::dev::ServerHandle;
use baton_protocol::Incarnation;
use futures::future::select_all;
use tokio::net::TcpSocket;
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinError, JoinHandle};
use tokio::time::Instant;

use crate::bound::Bound;
use crate::bus::Bus;
use crate::config::{ApiServerConfig, Inherited};
use crate::error::ApiServerError;
use crate::http;
use crate::metrics::Metrics;
use crate::model_names::ModelNames;
use crate::openai::responses::ResponseStore;
use crate::request::inbox::{Event, Registry, lock};
use crate::server::{Name, Server};
use crate::text::texts::TextPool;
use crate::text::tokenizer::ModelText;
use crate::tls::Tls;
use crate::watch::LoopWatch;

/// Serves until `shutdown` is ready: then refuses new connections, lets requests in flight finish for a
/// while, and returns. Runs inside a tokio runtime.
///
/// # Errors
/// [`ApiServerError`] if the model directory, the bus or the address cannot be used.
pub async fn run(
    config: ApiServerConfig,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ApiServerError> {
    let mut shutdown = std::pin::pin!(shutdown);
    // The bus may be long in coming; nobody who asks to end waits for it.
    let prepared = tokio::select! {
        prepared = prepare(&config) => prepared?,
        () = &mut shutdown => return Ok(()),
    };
    let Prepared {
        model,
        model_names,
        metrics,
        registry,
        incarnation,
        bus,
        listener,
        tls,
    } = prepared;
    let address = listener
        .local_addr()
        .map_err(|error| ApiServerError::Listen(format!("no local address: {error}")))?;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let own_name = Name::new(
        config.name.clone(),
        incarnation,
        config.name_is_shared,
        Instant::now(),
    );
    let server = Arc::new(Server {
        model_names,
        default_max_tokens: config.default_max_tokens,
        name: config.name,
        incarnation,
        cluster: config.cluster.name().to_owned(),
        model,
        bus,
        registry,
        metrics,
        tracer: config.tracer,
        in_flight: Arc::new(Bound::new(config.limits.in_flight_max)),
        answers: Arc::new(Bound::new(config.limits.answers_bytes_max)),
        responses: Arc::new(ResponseStore::new(config.limits.responses_bytes_max)),
        texts: TextPool::new(config.limits.text_threads),
        body_room: Arc::new(Semaphore::new(config.limits.bodies_bytes_max >> 10)),
        running: Arc::default(),
        last_spent: Default::default(),
        limits: config.limits,
        keys: config.api_keys,
        wants_certificates: tls.as_ref().is_some_and(Tls::asks_for_certificates),
        origins: config.origins,
        request_budget: config.request_budget,
        promises: config.promises,
        started_unix: now.map_or(0, |since| since.as_secs()),
        decode_room: Arc::default(),
        leaving: AtomicBool::new(false),
        connections_end: watch::Sender::new(false),
        fleet: Mutex::default(),
        own_name: Mutex::new(own_name),
    });
    let watch = LoopWatch::start()?;
    let mut tasks = server
        .bus
        .serve(Arc::clone(&server.registry), Arc::clone(&server))
        .await?;
    meet_workers(&server).await;
    let fault = |error: std::io::Error| ApiServerError::Http(format!("HTTP server: {error}"));
    let door = match config.listener {
        Some(Inherited { is_kept: true, .. }) => None,
        _ => Some(listener.try_clone().map_err(fault)?),
    };
    tasks.push(tokio::spawn(watch.show("bus loop")));
    let handshake = tls.as_ref().map(Tls::config).transpose();
    let handshake = handshake.map_err(ApiServerError::Http)?.map(Arc::new);
    let scheme = if tls.is_some() { "https" } else { "http" };
    let http = http::serve(Arc::clone(&server), listener, watch, handshake).map_err(fault)?;
    let handle = http.handle();
    if let Some(tls) = tls {
        tasks.push(tokio::spawn(tls.keep_up()));
    }
    tracing::info!(%address, scheme, model = %server.model_names, cluster = server.cluster, "serving");
    if let Some(on_ready) = config.on_ready {
        // Whoever asked may have gone.
        let _ = on_ready.send(address);
    }
    let mut http = tokio::spawn(http);
    let outcome = |ended: Result<std::io::Result<()>, JoinError>| match ended {
        Ok(ended) => ended.map_err(fault),
        Err(error) => Err(ApiServerError::Http(format!("HTTP server: {error}"))),
    };
    let outcome = tokio::select! {
        ended = &mut http => outcome(ended),
        error = broken(&mut tasks) => {
            handle.stop(false).await;
            Err(error)
        }
        () = &mut shutdown => {
            leave(&server, &handle, door.as_ref()).await;
            outcome(http.await)
        }
    };
    for task in tasks {
        task.abort();
    }
    server.bus.close().await;
    outcome
}

/// What has to be there before anything is served.
struct Prepared {
    model: ModelText,
    model_names: ModelNames,
    metrics: Metrics,
    registry: Arc<Registry>,
    incarnation: Incarnation,
    bus: Bus,
    listener: TcpListener,
    tls: Option<Tls>,
}

async fn prepare(config: &ApiServerConfig) -> Result<Prepared, ApiServerError> {
    let bus = config.bus.check();
    bus.map_err(|error| ApiServerError::Bus(error.to_string()))?;
    let tls = config.tls.clone().map(Tls::open).transpose();
    let tls = tls.map_err(ApiServerError::Http)?;
    let directory = config.tokenizer.clone();
    let model = tokio::task::spawn_blocking(move || ModelText::open(&directory))
        .await
        .map_err(|error| ApiServerError::Model(format!("loading the tokenizer: {error}")))??
        .with_formats(config.tool_format, config.reasoning_format)
        .with_special_tokens_in_content(config.special_tokens_in_content)
        .with_generation_config(config.generation_config);
    tracing::info!(defaults = %model.defaults, "where requests say nothing");
    // A name that cannot be is said before anything is waited for.
    let model_names = ModelNames::new(config.model_names.clone(), &model.name)?;
    let metrics =
        Metrics::new().map_err(|error| ApiServerError::Http(format!("metrics: {error}")))?;
    let registry = Arc::new(Registry::default());
    let incarnation = draw_incarnation()?;
    let bus = Bus::connect(
        &config.bus,
        config.cluster.clone(),
        config.name.clone(),
        incarnation,
        Arc::clone(&registry),
    )
    .await?;
    let (host, port) = (config.host.as_str(), config.port);
    let listener = match &config.listener {
        Some(inherited) => take_over(inherited)
            .map_err(|error| format!("cannot use the inherited listener: {error}")),
        None => listen(host, port)
            .await
            .map_err(|error| format!("cannot listen on {host}:{port}: {error}")),
    };
    let listener = listener.map_err(ApiServerError::Listen)?;
    Ok(Prepared {
        model,
        model_names,
        metrics,
        registry,
        incarnation,
        bus,
        listener,
        tls,
    })
}

/// Waits for the first of these to end, which is none's to do: without it nothing would be heard any more, and nobody would
/// know. Better an end that a supervisor sees.
async fn broken(tasks: &mut [JoinHandle<()>]) -> ApiServerError {
    let (ended, ..) = select_all(tasks).await;
    let why = ended.map_or_else(|error| error.to_string(), |()| "it ended".to_owned());
    ApiServerError::System(format!("a loop of the API server broke: {why}"))
}

fn draw_incarnation() -> Result<Incarnation, ApiServerError> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes)
        .map_err(|error| ApiServerError::System(format!("no random numbers: {error}")))?;
    Ok(Incarnation(u64::from_le_bytes(bytes)))
}

/// Workers answer a newcomer's hello within this time, or there are none.
const FIRST_BEATS: Duration = Duration::from_millis(500);

/// Waits until this server has its name, and the cluster can serve: the first request would be told that there is no worker.
/// One that stands by answers nevertheless, and says so.
async fn meet_workers(server: &Server) {
    const LOOK: Duration = Duration::from_millis(5);
    while !server.has_its_name() && !lock(&server.own_name).stands_by() {
        tokio::time::sleep(LOOK).await;
    }
    let met = async {
        while server.has_its_name() && !server.faults().is_empty() {
            tokio::time::sleep(LOOK).await;
        }
    };
    let _ = tokio::time::timeout(FIRST_BEATS, met).await;
}

/// A request that was on its way when this server was asked to end has come within this time.
const ON_ITS_WAY: Duration = Duration::from_millis(500);

/// Takes no new connections, answers what comes on the old ones and closes each, gives what is under way its time, and
/// then ends it with an error.
async fn leave(server: &Server, http: &ServerHandle, door: Option<&TcpListener>) {
    tracing::info!(in_flight = server.registry.len(), "stopping");
    server.leaving.store(true, Ordering::Relaxed);
    let over = Instant::now() + server.limits.drain;
    // A listener that is shut down refuses at once; one that is only not listened to would keep clients waiting. The HTTP
    // server looks away first, or it would complain.
    http.pause().await;
    if let Some(door) = door {
        door::unwatched(door).await;
        if let Err(error) = rustix::net::shutdown(door, rustix::net::Shutdown::Read) {
            tracing::debug!(%error, "the listener was not shut down");
        }
    }
    // Stopped at once, it would drop connections whose request it has not read yet.
    tokio::time::sleep(ON_ITS_WAY).await;
    server.connections_end.send_replace(true);
    let mut stopped = std::pin::pin!(http.stop(true));
    if tokio::time::timeout_at(over, &mut stopped).await.is_err() {
        server.registry.broadcast(|| Event::Leaving);
        stopped.await;
    }
}

/// Connections that may wait to be accepted. The standard library's 128 are fewer than clients that begin
/// together; one that finds no place tries again after a whole second.
const BACKLOG: u32 = 4096;

/// Listens on the first of the host's addresses that can be had.
async fn listen(host: &str, port: u16) -> std::io::Result<TcpListener> {
    let mut fault = std::io::Error::other("the host has no address");
    for address in tokio::net::lookup_host((host, port)).await? {
        match listen_on(address) {
            Ok(listener) => return Ok(listener),
            Err(error) => fault = error,
        }
    }
    Err(fault)
}

/// The same socket. One that is this server's own gets its backlog.
fn take_over(inherited: &Inherited) -> std::io::Result<TcpListener> {
    if !inherited.is_kept {
        rustix::net::listen(
            &inherited.socket,
            i32::try_from(BACKLOG).unwrap_or(i32::MAX),
        )?;
    }
    inherited.socket.try_clone()
}

fn listen_on(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)?.into_std()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_loop_that_breaks_is_the_servers_end() {
        let goes_on = tokio::spawn(std::future::pending());
        let breaks = tokio::spawn(async { panic!("a frame too many") });
        let mut tasks = [goes_on, breaks];
        let error = broken(&mut tasks).await.to_string();
        assert!(error.contains("a frame too many"), "{error}");
        assert!(!tasks[0].is_finished());
        tasks[0].abort();
    }
}
