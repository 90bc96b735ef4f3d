//! HTTP: routes, bodies, answers.

mod authorize;
mod body;
mod front;
mod generate;
mod gzip;
mod h2;
mod https;
mod messages;
mod name;
pub mod page;
mod paths;
mod respond;
mod responses;
mod status;
mod tokenize;
mod trace;
mod workers;

use std::any::Any;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use actix_web::rt::net::TcpStream;

use actix_web::dev::Server as HttpServerHandle;
use actix_web::middleware::from_fn;
use actix_web::{App, HttpServer, guard, rt, web};
use rustls::ServerConfig;

pub use self::status::worker_rows;
use crate::error::{ApiError, Dialect, ErrorKind};
use crate::request::inbox::Mailbox;
use crate::server::Server;
use crate::watch::LoopWatch;

use self::respond::error_response;

/// The head of a request, or what HTTP/2 begins with, has come within this time.
const HEAD_WAIT: Duration = Duration::from_secs(15);

/// A connection on which nothing is asked for this long is closed.
const KEEP_ALIVE: Duration = Duration::from_secs(75);

/// Time to tell whoever is still there when the time to leave is over.
const FAREWELL: Duration = Duration::from_secs(2);

/// Starts the HTTP threads on this listener; with `tls`, for HTTPS.
///
/// # Errors
/// If the listener cannot be used.
pub fn serve(
    server: Arc<Server>,
    listener: TcpListener,
    watch: LoopWatch,
    tls: Option<Arc<ServerConfig>>,
) -> std::io::Result<HttpServerHandle> {
    let threads = server.limits.http_threads;
    let drain = server.limits.drain + FAREWELL;
    let stall = server.limits.connection_stall;
    let leaving = server.connections_end.subscribe();
    let app = move || {
        // Called once on each HTTP thread.
        let mailbox = Arc::new(Mailbox::default());
        rt::spawn(Arc::clone(&mailbox).distribute());
        rt::spawn(watch.show("HTTP thread"));
        App::new()
            .wrap(from_fn(authorize::authorize))
            .wrap(from_fn(front::front))
            .app_data(web::Data::from(Arc::clone(&server)))
            .app_data(web::Data::from(mailbox))
            .service(post("/v1/chat/completions", web::post().to(generate::chat)))
            .service(post("/v1/responses", web::post().to(responses::create)))
            // Not a response's id: whoever tries whether there is compaction is told that there is none.
            .service(web::resource("/v1/responses/compact").to(paths::unknown_path))
            .service(post(
                "/v1/responses/{id}/cancel",
                web::post().to(responses::cancel),
            ))
            .service(only(
                web::resource("/v1/responses/{id}")
                    .route(web::get().to(responses::get))
                    .route(web::head().to(responses::get))
                    .route(web::delete().to(responses::delete)),
            ))
            .service(get("/v1/responses/{id}/input_items", || {
                web::route().to(responses::input_items)
            }))
            .service(post("/v1/completions", web::post().to(generate::text)))
            .service(post("/v1/messages", web::post().to(messages::messages)))
            .service(post(
                "/v1/messages/count_tokens",
                web::post().to(messages::count_tokens),
            ))
            .service(post("/tokenize", web::post().to(tokenize::tokenize)))
            .service(post("/detokenize", web::post().to(tokenize::detokenize)))
            .service(get("/v1/models", || web::route().to(status::models)))
            .service(get("/v1/models/{model:.*}", || {
                web::route().to(status::model)
            }))
            .service(get(page::PATHS[0], || web::route().to(page::page)))
            .service(get("/page/{file}", || web::route().to(page::page)))
            .service(get("/docs", || web::route().to(paths::docs)))
            .service(get("/openapi.json", || web::route().to(paths::openapi)))
            .service(get("/health", || web::route().to(status::health)))
            .service(get("/live", || web::route().to(status::live)))
            .service(get("/metrics", || web::route().to(status::metrics)))
            .service(post(
                "/workers/{name}/drain",
                web::post().to(workers::drain),
            ))
            .service(get("/requests", || web::route().to(status::requests)))
            .service(get("/cluster", || web::route().to(status::cluster)))
            .service(get("/version", || web::route().to(status::version)))
            .service(only(
                web::resource("/ping")
                    .route(web::get().to(status::health))
                    .route(web::head().to(status::health))
                    .route(web::post().to(status::health)),
            ))
            .default_service(web::to(paths::unknown_path))
    };
    if let Some(config) = tls {
        let door = https::Door {
            config,
            threads,
            shutdown: drain,
            stall,
            leaving,
        };
        return https::serve(app, listener, door);
    }
    Ok(HttpServer::new(app)
        .workers(threads)
        .tcp_nodelay(true)
        .on_connect(move |connection: &dyn Any, _| {
            if let Some(stream) = connection.downcast_ref() {
                close_when_stalled(stream, stall);
            }
        })
        // A client that closes its side has left: whatever runs for it is dropped at once.
        .h1_allow_half_closed(false)
        .keep_alive(KEEP_ALIVE)
        .client_request_timeout(HEAD_WAIT)
        .shutdown_timeout(drain.as_secs())
        .disable_signals()
        .listen(listener)?
        .run())
}

/// Has the kernel close a connection whose other end acknowledges nothing, or takes nothing, for this long. Its request
/// has ended by then, but what was rendered would wait for ever: actix bounds no write.
fn close_when_stalled(stream: &TcpStream, stall: Duration) {
    let milliseconds = u32::try_from(stall.as_millis()).unwrap_or(u32::MAX);
    if let Err(error) = rustix::net::sockopt::set_tcp_user_timeout(stream, milliseconds) {
        tracing::debug!(%error, "TCP_USER_TIMEOUT was not set");
    }
}

/// A path that takes bodies.
fn post(path: &str, route: actix_web::Route) -> actix_web::Resource {
    only(web::resource(path).route(route))
}

/// A path that is read; HEAD answers as GET does, and leaves the body out.
fn get(path: &str, route: impl Fn() -> actix_web::Route) -> actix_web::Resource {
    let resource = web::resource(path).route(route().guard(guard::Get()));
    only(resource.route(route().guard(guard::Head())))
}

/// Other methods on a known path are told so.
fn only(resource: actix_web::Resource) -> actix_web::Resource {
    resource.default_service(web::to(|request: actix_web::HttpRequest| async move {
        let message = format!("{} does not take {}", request.path(), request.method());
        error_response(
            Dialect::of(request.path()),
            &ApiError::new(ErrorKind::Method, message),
        )
    }))
}
