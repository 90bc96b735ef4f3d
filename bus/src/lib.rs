//! How Baton reaches its NATS server: where it is, who we are there, over TLS or not, the first connection, and
//! how much of what comes may wait.
//!
//! What is said on the bus is in `baton-protocol`; who says it, in `baton-api-server` and `baton-worker`.
#![forbid(unsafe_code)]
#![warn(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::disallowed_methods
)]

mod answers;
mod intake;
mod presence;
mod seldom;
mod wire;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use async_nats::{Client, ConnectErrorKind, ConnectOptions, Event, ServerAddr};
use percent_encoding::percent_decode_str;
use tokio::time::{Instant, timeout};

pub use intake::Intake;
pub use presence::{BusFault, Presence};
pub use seldom::Seldom;
pub use wire::{Carrier, RequestError, Subscription, Wire, WireError};

/// First pause between tries to connect; doubled each time.
const RETRY_MIN: Duration = Duration::from_millis(100);

/// Longest pause between tries to connect.
const RETRY_MAX: Duration = Duration::from_secs(5);

/// Longest pause between tries to mend a connection that was lost: requests under way wait for it.
const MEND_MAX: Duration = Duration::from_secs(1);

/// How long one try may take.
const TRY_WAIT: Duration = Duration::from_secs(10);

/// However little time is left, one try has this much: a server that is there answers within it.
const TRY_WAIT_MIN: Duration = Duration::from_secs(1);

/// The pause before the try of this number to mend a lost connection.
pub fn mend_pause(attempts: usize) -> Duration {
    let attempts = u32::try_from(attempts).unwrap_or(u32::MAX);
    Duration::from_millis(50)
        .saturating_mul(attempts)
        .min(MEND_MAX)
}

/// How to reach the NATS server.
#[derive(Clone)]
pub struct BusConfig {
    /// `nats://host:port`, or `tls://…`; several addresses of one cluster divided by commas. `user:password@` or `token@`
    /// before the host say who we are (percent-encoded, as in any URL), if nothing below does.
    pub url: String,
    /// Credentials file: a JWT and its key.
    pub credentials: Option<PathBuf>,
    /// File with the seed of an NKey.
    pub nkey: Option<PathBuf>,
    /// Certificates that the server's must come from; `None` takes the system's.
    pub ca: Option<PathBuf>,
    /// Our own certificate and its key.
    pub certificate: Option<(PathBuf, PathBuf)>,
    /// Give up when the first connection has not come about after this; `None` tries for ever. Later
    /// losses are always repaired.
    pub connect_wait: Option<Duration>,
}

/// What is logged of a connection: that it was lost, why it does not come back, once and not at each try, and that it
/// is back.
#[derive(Debug)]
pub struct ConnectionLog {
    url: String,
    told: Mutex<String>,
}

impl ConnectionLog {
    /// For the connection that this configuration makes.
    pub fn new(config: &BusConfig) -> Self {
        Self {
            url: config.url_without_secrets(),
            told: Mutex::default(),
        }
    }

    /// Logs what the client tells.
    pub fn note(&self, event: &Event) {
        let url = &self.url;
        match event {
            Event::Connected => {
                self.is_new(String::new());
                tracing::info!("bus connected");
            }
            Event::Disconnected | Event::Closed => tracing::warn!("bus lost, reconnecting"),
            Event::ClientError(error) if self.is_new(error.to_string()) => {
                tracing::warn!("the NATS server at {url} is not reached: {error}. Trying again");
            }
            Event::ServerError(error) if self.is_new(error.to_string()) => {
                tracing::warn!("the NATS server at {url} says: {error}");
            }
            Event::ClientError(_) | Event::ServerError(_) => {}
            other => tracing::warn!(event = %other, "bus"),
        }
    }

    fn is_new(&self, sentence: String) -> bool {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let is_new = *told != sentence;
        *told = sentence;
        is_new
    }
}

/// Why there is no connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BusError {
    /// A setting cannot be used.
    Setting {
        /// Which, and what is wrong with it.
        detail: String,
    },
    /// The server was not reached, or did not let us in.
    Unreachable {
        /// Without secrets.
        url: String,
        /// How long it was tried.
        waited: Duration,
        /// What went wrong the last time, and what to do.
        detail: String,
    },
}

impl Default for BusConfig {
    fn default() -> Self {
        Self {
            url: "nats://127.0.0.1:4222".to_owned(),
            credentials: None,
            nkey: None,
            ca: None,
            certificate: None,
            connect_wait: Some(Duration::from_secs(60)),
        }
    }
}

impl BusConfig {
    /// The addresses without `user:password@`.
    pub fn url_without_secrets(&self) -> String {
        let plain = |url: &str| {
            let (scheme, rest) = match url.split_once("://") {
                Some((scheme, rest)) => (format!("{scheme}://"), rest),
                None => (String::new(), url),
            };
            match rest.rsplit_once('@') {
                Some((_, host)) => format!("{scheme}{host}"),
                // A password with a comma in it is cut in two here, and its first half looks like a port.
                None if is_place(rest) => url.to_owned(),
                None => format!("{scheme}…"),
            }
        };
        let urls = self.url.split(',').map(|url| plain(url.trim()));
        urls.collect::<Vec<_>>().join(",")
    }

    /// Connects, trying again with growing pauses until it works or `connect_wait` is over. `options` are made again for
    /// each try; what this configuration says comes on top of them.
    ///
    /// # Errors
    /// [`BusError`].
    pub async fn connect(
        &self,
        mut options: impl FnMut() -> ConnectOptions,
    ) -> Result<Client, BusError> {
        let servers = self.servers()?;
        let begun = Instant::now();
        let url = self.url_without_secrets();
        let mut pause = RETRY_MIN;
        let mut told = String::new();
        loop {
            let left = |wait: Duration| wait.saturating_sub(begun.elapsed());
            let left = self.connect_wait.map(left).unwrap_or(Duration::MAX);
            let one_try = left.clamp(TRY_WAIT_MIN, TRY_WAIT);
            let options = self.authorize(options(), &servers)?;
            let detail = match timeout(one_try, options.connect(&servers[..])).await {
                Ok(Ok(client)) => return Ok(client),
                Ok(Err(error)) => advise(error.kind(), &error),
                Err(_) => format!("no answer within {} s", seconds(one_try)),
            };
            let waited = begun.elapsed();
            if self.connect_wait.is_some_and(|wait| waited >= wait) {
                return Err(BusError::Unreachable {
                    url,
                    waited,
                    detail,
                });
            }
            // The same sentence once, not every few seconds.
            if detail != told {
                let limit = match self.connect_wait {
                    Some(wait) => format!(" for up to {} s", seconds(wait)),
                    None => String::new(),
                };
                tracing::warn!(
                    "the NATS server at {url} is not reached, trying again{limit}: {detail}"
                );
                told = detail;
            }
            // What is left of the time is used, so that the last try is at its end.
            let left = self.connect_wait.map(|wait| wait.saturating_sub(waited));
            tokio::time::sleep(pause.min(left.unwrap_or(pause))).await;
            pause = (pause * 2).min(RETRY_MAX);
        }
    }

    /// Whether these settings can be used: addresses are some, and files are there and hold what they should. Connects to nobody.
    ///
    /// # Errors
    /// [`BusError::Setting`] with the first that cannot.
    pub fn check(&self) -> Result<(), BusError> {
        let servers = self.servers()?;
        self.authorize(ConnectOptions::new(), &servers).map(drop)
    }

    /// The addresses, each on its own.
    ///
    /// # Errors
    /// [`BusError::Setting`] if one is none; without secrets.
    pub fn servers(&self) -> Result<Vec<ServerAddr>, BusError> {
        let parse = |url: &str| {
            url.trim().parse().map_err(|error| BusError::Setting {
                detail: format!(
                    "the NATS address {} is not of the form nats://HOST:PORT: {error}",
                    self.url_without_secrets()
                ),
            })
        };
        self.url.split(',').map(parse).collect()
    }

    /// Who we are, and what makes the connection safe.
    fn authorize(
        &self,
        mut options: ConnectOptions,
        servers: &[ServerAddr],
    ) -> Result<ConnectOptions, BusError> {
        let named = servers.iter().find(|server| server.has_user_pass());
        let plain = |text| percent_decode_str(text).decode_utf8_lossy().into_owned();
        let user = named.and_then(ServerAddr::username).map(plain);
        let password = named.and_then(ServerAddr::password).map(plain);
        options = match (&self.credentials, &self.nkey, user, password) {
            (Some(path), None, ..) => {
                let text = read("NATS credentials", path)?;
                options
                    .credentials(&text)
                    .map_err(|error| unusable("NATS credentials", path, &error))?
            }
            (None, Some(path), ..) => {
                let seed = read("NKey", path)?;
                let seed = seed
                    .lines()
                    .map(str::trim)
                    .find(|line| line.starts_with('S'));
                let seed = seed.ok_or_else(|| unusable("NKey", path, &"it holds no seed"))?;
                options.nkey(seed.to_owned())
            }
            (Some(_), Some(_), ..) => {
                let detail = "both NATS credentials and an NKey are given: which of them holds?";
                return Err(BusError::Setting {
                    detail: detail.to_owned(),
                });
            }
            (None, None, Some(user), Some(password)) => options.user_and_password(user, password),
            (None, None, Some(token), None) => options.token(token),
            (None, None, None, _) => options,
        };
        if let Some(ca) = &self.ca {
            read("NATS CA certificates", ca)?;
            options = options.add_root_certificates(ca.clone()).require_tls(true);
        }
        if let Some((certificate, key)) = &self.certificate {
            read("NATS certificate", certificate)?;
            read("key of the NATS certificate", key)?;
            options = options.add_client_certificate(certificate.clone(), key.clone());
        }
        Ok(options)
    }
}

/// Whether this can be `HOST` or `HOST:PORT` and no more.
fn is_place(text: &str) -> bool {
    let host = match text.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        Some(_) if text.ends_with(']') => text,
        Some(_) => return false,
        None => text,
    };
    let address = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'));
    match address {
        Some(address) => address
            .bytes()
            .all(|byte| byte.is_ascii_hexdigit() || byte == b':' || byte == b'.'),
        None => !host.contains(':'),
    }
}

/// A file that must be there: async-nats would say so only as a failed connection.
fn read(what: &str, path: &Path) -> Result<String, BusError> {
    std::fs::read_to_string(path).map_err(|error| unusable(what, path, &error))
}

fn unusable(what: &str, path: &Path, error: &dyn fmt::Display) -> BusError {
    BusError::Setting {
        detail: format!("{what} {}: {error}", path.display()),
    }
}

/// Seconds for a person: to the tenth where there are few.
fn seconds(time: Duration) -> String {
    match time.as_secs_f64() {
        few if few < 9.95 => format!("{few:.1}"),
        many => format!("{many:.0}"),
    }
}

fn advise(kind: ConnectErrorKind, error: &dyn fmt::Display) -> String {
    match kind {
        ConnectErrorKind::AuthorizationViolation | ConnectErrorKind::Authentication => {
            format!("it does not let us in ({error}): give the credentials it wants")
        }
        ConnectErrorKind::Tls => {
            format!("{error}: does the certificate authority fit the server's certificate?")
        }
        _ => format!("{error}: is nats-server running there?"),
    }
}

/// Secrets stay out of logs.
impl fmt::Debug for BusConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BusConfig")
            .field("url", &self.url_without_secrets())
            .field("credentials", &self.credentials)
            .field("nkey", &self.nkey)
            .field("ca", &self.ca)
            .field(
                "certificate",
                &self.certificate.as_ref().map(|(path, _)| path),
            )
            .field("connect_wait", &self.connect_wait)
            .finish()
    }
}

impl fmt::Display for BusError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Setting { detail } => f.write_str(detail),
            Self::Unreachable {
                url,
                waited,
                detail,
            } => {
                let waited = seconds(*waited);
                write!(
                    f,
                    "the NATS server at {url} was not reached within {waited} s: {detail}"
                )
            }
        }
    }
}

impl std::error::Error for BusError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_stay_out_of_logs() {
        let bus = BusConfig {
            url: "nats://ann:s3cret@a:1, t0ken@b:2".to_owned(),
            ..BusConfig::default()
        };
        let text = format!("{bus:?}");
        assert!(text.contains("nats://a:1,b:2"), "{text}");
        assert!(
            !text.contains("s3cret") && !text.contains("t0ken"),
            "{text}"
        );
    }

    #[test]
    fn secrets_stay_out_of_logs_with_every_sign_in_them() {
        for (url, shown) in [
            ("nats://ann:s3,cret@a:1", "nats://…,a:1"),
            ("nats://ann:s3@/,cr3t@a:1,b", "nats:///,a:1,b"),
            (
                "nats://[::1]:4222,tls://h.example,10.0.0.1:4222",
                "nats://[::1]:4222,tls://h.example,10.0.0.1:4222",
            ),
        ] {
            let bus = BusConfig {
                url: url.to_owned(),
                ..BusConfig::default()
            };
            assert_eq!(bus.url_without_secrets(), shown);
        }
    }

    #[test]
    fn a_file_that_cannot_be_used_is_named() {
        let config = |change: fn(&mut BusConfig)| {
            let mut config = BusConfig::default();
            change(&mut config);
            config.check().err().map(|error| error.to_string())
        };
        assert_eq!(config(|_| {}), None);
        fn missing() -> Option<PathBuf> {
            Some(PathBuf::from("/nowhere/file"))
        }
        for error in [
            config(|c| c.credentials = missing()),
            config(|c| c.nkey = missing()),
            config(|c| c.ca = missing()),
            config(|c| c.certificate = missing().zip(missing())),
        ] {
            assert!(error.unwrap().contains("/nowhere/file"));
        }
        let both = config(|c| (c.credentials, c.nkey) = (missing(), missing()));
        assert!(both.unwrap().contains("which of them"));
    }

    #[tokio::test]
    async fn who_gives_up_says_how_long_it_tried() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("nats://{}", listener.local_addr().unwrap());
        drop(listener);
        let wait = Duration::from_millis(250);
        let config = BusConfig {
            url,
            connect_wait: Some(wait),
            ..BusConfig::default()
        };
        let error = config.connect(ConnectOptions::new).await.unwrap_err();
        let BusError::Unreachable { waited, .. } = &error else {
            panic!("{error}");
        };
        assert!(*waited >= wait, "{waited:?}");
        let said = format!("was not reached within {} s: ", seconds(*waited));
        assert!(error.to_string().contains(&said), "{error}");
    }

    #[test]
    fn an_address_that_is_none_is_a_sentence() {
        let config = BusConfig {
            url: "nats://a:4222, nats://ann:s3cret@:x".to_owned(),
            ..BusConfig::default()
        };
        let error = config.servers().unwrap_err().to_string();
        assert!(error.contains("nats://HOST:PORT"), "{error}");
        assert!(!error.contains("s3cret"), "{error}");
    }
}
