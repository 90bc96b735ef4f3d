//! The HTTPS door: the handshake, and then HTTP/2 or HTTP/1.1 as the client has chosen.
//!
//! It stands beside [`actix_web::HttpServer`] because HTTP/2 has a dispatcher of its own here ([`super::h2`]): actix's goes on with a
//! request whose client has given it up, has no bound on streams and never ends a connection when the server leaves.

use std::net::{SocketAddr, TcpListener};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use actix_http::{HttpService, Request};
use actix_service::{IntoServiceFactory, Service, ServiceFactory, fn_factory, fn_service};
use actix_web::HttpMessage;
use actix_web::body::BoxBody;
use actix_web::dev::{
    AppConfig, Extensions, Server as HttpServerHandle, ServiceRequest, ServiceResponse,
};
use actix_web::rt::net::TcpStream;
use futures::future::LocalBoxFuture;
use rustls::ServerConfig;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::{HEAD_WAIT, KEEP_ALIVE, close_when_stalled, h2};
use crate::tls::HTTP_2;

/// A handshake is two round trips, and some milliseconds of work.
const HANDSHAKE_WAIT: Duration = Duration::from_secs(10);

/// What the door has besides the application.
#[derive(Clone)]
pub struct Door {
    /// The handshake.
    pub config: Arc<ServerConfig>,
    /// Threads that serve.
    pub threads: usize,
    /// What leaving may take.
    pub shutdown: Duration,
    /// A client that takes nothing for this long is given up.
    pub stall: Duration,
    /// Turns true when connections are to end after what is under way on them.
    pub leaving: watch::Receiver<bool>,
}

/// On a connection, or a request of it: its client has shown a certificate that comes from an authority of ours.
struct Certified;

/// Whether a request's client has shown a certificate.
pub fn is_certified(request: &ServiceRequest) -> bool {
    let by_request = request.extensions().contains::<Certified>();
    by_request || request.request().conn_data::<Certified>().is_some()
}

type Stream = TlsStream<TcpStream>;

/// What a thread serves HTTP/1.1 with.
type Http1 = Box<dyn Fn(Stream, Option<SocketAddr>) -> LocalBoxFuture<'static, ()>>;

/// One thread's part of the door.
struct Thread<S> {
    acceptor: TlsAcceptor,
    app: Rc<S>,
    http1: Http1,
    door: Door,
}

/// Starts the HTTP threads on this listener.
///
/// # Errors
/// If the listener cannot be used.
pub fn serve<F, I, S>(
    app: F,
    listener: TcpListener,
    door: Door,
) -> std::io::Result<HttpServerHandle>
where
    F: Fn() -> I + Send + Clone + 'static,
    I: IntoServiceFactory<S, Request>,
    S: ServiceFactory<
            Request,
            Config = AppConfig,
            Response = ServiceResponse<BoxBody>,
            Error = actix_web::Error,
            InitError = (),
        > + 'static,
    S::Service: 'static,
{
    let (threads, shutdown) = (door.threads, door.shutdown);
    let on_thread = move || {
        let (app, door) = (app.clone(), door.clone());
        fn_factory(move || {
            // Called once on each HTTP thread.
            let app = app().into_factory().new_service(AppConfig::default());
            let door = door.clone();
            async move {
                let app = Rc::new(app.await?);
                let thread = Rc::new(Thread {
                    acceptor: TlsAcceptor::from(Arc::clone(&door.config)),
                    http1: http1(&app, &door).await?,
                    app,
                    door,
                });
                Ok::<_, ()>(fn_service(move |stream| {
                    connection(Rc::clone(&thread), stream)
                }))
            }
        })
    };
    let server = HttpServerHandle::build()
        .workers(threads)
        .shutdown_timeout(shutdown.as_secs())
        .disable_signals()
        .listen("https", listener, on_thread)?;
    Ok(server.run())
}

async fn connection<S>(thread: Rc<Thread<S>>, stream: TcpStream) -> Result<(), ()>
where
    S: Service<Request, Response = ServiceResponse<BoxBody>, Error = actix_web::Error> + 'static,
{
    let client = stream.peer_addr().ok();
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY was not set");
    }
    close_when_stalled(&stream, thread.door.stall);
    let stream = match timeout(HANDSHAKE_WAIT, thread.acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            tracing::debug!(?client, %error, "a TLS handshake failed");
            return Err(());
        }
        Err(_) => {
            tracing::debug!(?client, "a TLS handshake did not come to its end in time");
            return Err(());
        }
    };
    let (_, session) = stream.get_ref();
    let certified = session.peer_certificates().is_some();
    if session.alpn_protocol() != Some(HTTP_2) {
        (thread.http1)(stream, client).await;
        return Ok(());
    }
    let settings = h2::Settings {
        client,
        stall: thread.door.stall,
        mark: |request: &Request| {
            request.extensions_mut().insert(Certified);
        },
        is_marked: certified,
        leaving: thread.door.leaving.clone(),
    };
    h2::serve(stream, Rc::clone(&thread.app), settings).await;
    Ok(())
}

/// actix's HTTP/1.1, with what [`super::serve`] sets for the plain door.
async fn http1<S>(app: &Rc<S>, door: &Door) -> Result<Http1, ()>
where
    S: Service<Request, Response = ServiceResponse<BoxBody>, Error = actix_web::Error> + 'static,
{
    let app = Rc::clone(app);
    let leaving = door.leaving.clone();
    let service = HttpService::build()
        .keep_alive(KEEP_ALIVE)
        .client_request_timeout(HEAD_WAIT)
        .h1_allow_half_closed(false)
        .graceful_shutdown_signal(move || {
            let mut leaving = leaving.clone();
            async move {
                let _ = leaving.wait_for(|leaving| *leaving).await;
            }
        })
        .on_connect_ext(|stream: &Stream, data: &mut Extensions| {
            if stream.get_ref().1.peer_certificates().is_some() {
                data.insert(Certified);
            }
        })
        .h1(fn_factory(move || {
            std::future::ready(Ok::<_, ()>(Rc::clone(&app)))
        }));
    let service = Rc::new(service.new_service(()).await?);
    Ok(Box::new(move |stream, client| {
        let served = service.call((stream, client));
        Box::pin(async move {
            if let Err(error) = served.await {
                tracing::debug!(?client, %error, "an HTTPS connection ended");
            }
        })
    }))
}
