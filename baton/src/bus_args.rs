//! Where the bus is, and who we are there: the same for every role.

use std::path::PathBuf;
use std::time::Duration;

use baton_bus::BusConfig;
use clap::Args;

/// Where one is looked for that was not named.
const URL_DEFAULT: &str = "nats://127.0.0.1:4222";

#[derive(Args, Clone, Debug)]
pub struct BusArgs {
    /// NATS server: nats://HOST:PORT or tls://HOST:PORT, several of one cluster divided by commas. USER:PASSWORD@ or TOKEN@
    /// may stand before HOST; give it by the variable then, since others see a process's arguments
    #[arg(
        long,
        default_value = URL_DEFAULT,
        env = "BATON_REQUEST_PLANE_URI",
        hide_env_values = true
    )]
    request_plane_uri: String,
    /// File with NATS credentials (JWT and key)
    #[arg(long, env = "BATON_REQUEST_PLANE_CREDENTIALS")]
    request_plane_credentials: Option<PathBuf>,
    /// File with the seed of a NATS NKey
    #[arg(long, env = "BATON_REQUEST_PLANE_NKEY")]
    request_plane_nkey: Option<PathBuf>,
    /// Certificates (PEM) that the NATS server's must come from; TLS is required then [default: the system's]
    #[arg(long, env = "BATON_REQUEST_PLANE_CA")]
    request_plane_ca: Option<PathBuf>,
    /// This process's certificate (PEM), if the NATS server wants one
    #[arg(
        long,
        env = "BATON_REQUEST_PLANE_CERTIFICATE",
        requires = "request_plane_certificate_key"
    )]
    request_plane_certificate: Option<PathBuf>,
    /// Its key (PEM)
    #[arg(
        long,
        env = "BATON_REQUEST_PLANE_CERTIFICATE_KEY",
        requires = "request_plane_certificate"
    )]
    request_plane_certificate_key: Option<PathBuf>,
    /// Give up when the NATS server was not reached in so many seconds; a connection that is lost later is always made again
    #[arg(long, default_value_t = 60)]
    request_plane_wait_s: u64,
}

impl BusArgs {
    /// Whether another server than the usual one is meant.
    pub fn is_named(&self) -> bool {
        self.request_plane_uri != URL_DEFAULT
    }

    /// As the roles take it.
    pub fn config(self) -> BusConfig {
        BusConfig {
            url: self.request_plane_uri,
            credentials: self.request_plane_credentials,
            nkey: self.request_plane_nkey,
            ca: self.request_plane_ca,
            certificate: self
                .request_plane_certificate
                .zip(self.request_plane_certificate_key),
            connect_wait: Some(Duration::from_secs(self.request_plane_wait_s)),
        }
    }
}
