//! What systemd hands a service and wants to hear of it: sockets, and that it serves, lives and leaves.
//!
//! Everything comes by environment variables (sd_listen_fds(3), sd_notify(3), sd_watchdog_enabled(3)); without them nothing is said.

use std::env;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;
use std::time::Duration;

use baton_api_server::Inherited;
use listenfd::ListenFd;
use tokio::time::{MissedTickBehavior, interval};

use crate::Failure;

/// What is for this process alone, and not for those that it starts.
pub const VARIABLES: [&str; 6] = [
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_FDNAMES",
];

/// Who is told how this process does; nobody, where nobody wants to know.
#[derive(Clone)]
pub struct ServiceManager(Option<Arc<Told>>);

struct Told {
    socket: UnixDatagram,
    /// A sign of life is due within this time.
    watchdog: Option<Duration>,
}

impl ServiceManager {
    /// The one that the environment names.
    pub fn from_env() -> Self {
        let text = |name| env::var(name).ok();
        let Some(address) = text("NOTIFY_SOCKET").filter(|address| !address.is_empty()) else {
            return Self(None);
        };
        let own = |pid: String| pid.parse() == Ok(std::process::id());
        let watchdog = text("WATCHDOG_USEC").filter(|_| text("WATCHDOG_PID").is_none_or(own));
        Self::new(&address, watchdog.as_deref()).unwrap_or_else(|error| {
            tracing::warn!(
                "NOTIFY_SOCKET {address}: {error}. systemd is not told that this process serves"
            );
            Self(None)
        })
    }

    fn new(address: &str, watchdog_us: Option<&str>) -> io::Result<Self> {
        let address = match address.strip_prefix('@') {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(address)?,
        };
        let socket = UnixDatagram::unbound()?;
        socket.connect_addr(&address)?;
        // Nobody waits for a manager that does not read.
        socket.set_nonblocking(true)?;
        let watchdog = watchdog_us.and_then(|text| text.parse().ok());
        let watchdog = watchdog.filter(|us| *us > 0).map(Duration::from_micros);
        Ok(Self(Some(Arc::new(Told { socket, watchdog }))))
    }

    /// It serves, and this is what it serves.
    pub fn ready(&self, status: &str) {
        self.say(&format!("READY=1\nSTATUS={}", status.replace('\n', " ")));
    }

    /// It was asked to leave.
    pub fn stopping(&self) {
        self.say("STOPPING=1\nSTATUS=finishing what is under way");
    }

    /// Shows for ever that the loop this runs on goes round. Ends at once where nobody wants to know.
    pub async fn show_life(self) {
        let Some(within) = self.0.as_ref().and_then(|told| told.watchdog) else {
            return;
        };
        // One that is late is made up for by the next.
        let mut tick = interval(within / 2);
        tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            tick.tick().await;
            self.say("WATCHDOG=1");
        }
    }

    fn say(&self, text: &str) {
        if let Some(told) = &self.0
            && let Err(error) = told.socket.send(text.as_bytes())
        {
            tracing::debug!(%error, text, "systemd was not told");
        }
    }
}

/// The listening socket that this process inherited, if any: from systemd (`LISTEN_FDS`), which keeps its own copy, or from `baton up`
/// (standard input), which does not.
///
/// # Errors
/// If there are several, or it is no TCP socket that listens.
pub fn inherited_listener() -> Result<Option<Inherited>, Failure> {
    let mut sockets = ListenFd::from_env();
    match sockets.len() {
        0 => Ok(listening_input(io::stdin().as_fd())?.map(|socket| Inherited {
            socket,
            is_kept: false,
        })),
        1 => {
            let socket = sockets.take_tcp_listener(0).map_err(|error| {
                format!("the socket of LISTEN_FDS is no TCP socket that listens: {error}")
            })?;
            Ok(socket.map(|socket| Inherited {
                socket,
                is_kept: true,
            }))
        }
        many => Err(format!(
            "LISTEN_FDS hands over {many} sockets, and an API server listens on one: give the .socket unit one ListenStream"
        )
        .into()),
    }
}

/// Standard input, if it is a socket that listens: what [`crate::up`] starts an API server with.
fn listening_input(input: BorrowedFd<'_>) -> io::Result<Option<TcpListener>> {
    // An error says that it is no socket.
    match rustix::net::sockopt::socket_acceptconn(input) {
        Ok(true) => Ok(Some(input.try_clone_to_owned()?.into())),
        _ => Ok(None),
    }
}

/// Refuses sockets where nothing is done with them.
///
/// # Errors
/// If there are any.
pub fn refuse_listeners() -> Result<(), Failure> {
    match ListenFd::from_env().len() {
        0 => Ok(()),
        _ => Err(
            "LISTEN_FDS hands over sockets, which `baton api-server` takes and this does not"
                .into(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::net::TcpStream;

    use tokio::net::UnixDatagram as Listens;
    use tokio::time::timeout;

    use super::*;

    async fn heard(listens: &Listens) -> String {
        let mut bytes = [0; 256];
        let said = timeout(Duration::from_secs(20), listens.recv(&mut bytes)).await;
        let count = said.expect("a message").unwrap();
        String::from_utf8_lossy(&bytes[..count]).into_owned()
    }

    #[test]
    fn only_an_input_that_listens_is_taken_for_a_listener() {
        let listens = TcpListener::bind("127.0.0.1:0").unwrap();
        let taken = listening_input(listens.as_fd()).unwrap().unwrap();
        assert_eq!(taken.local_addr().unwrap(), listens.local_addr().unwrap());
        let connected = TcpStream::connect(listens.local_addr().unwrap()).unwrap();
        assert!(listening_input(connected.as_fd()).unwrap().is_none());
        let null = File::open("/dev/null").unwrap();
        assert!(listening_input(null.as_fd()).unwrap().is_none());
    }

    #[tokio::test]
    async fn a_manager_hears_of_readiness_life_and_the_end() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let listens = Listens::bind(&path).unwrap();
        let manager = ServiceManager::new(path.to_str().unwrap(), Some("20000")).unwrap();
        manager.ready("serving\nhere");
        assert_eq!(heard(&listens).await, "READY=1\nSTATUS=serving here");
        let shows = tokio::spawn(manager.clone().show_life());
        for _ in 0..3 {
            assert_eq!(heard(&listens).await, "WATCHDOG=1");
        }
        shows.abort();
        let _ = shows.await;
        manager.stopping();
        let mut said = heard(&listens).await;
        while said == "WATCHDOG=1" {
            said = heard(&listens).await;
        }
        assert!(said.starts_with("STOPPING=1\n"), "{said}");
    }

    #[tokio::test]
    async fn a_manager_may_have_an_abstract_address_and_no_watchdog() {
        let name = format!("baton-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let listens = UnixDatagram::bind_addr(&address).unwrap();
        listens.set_nonblocking(true).unwrap();
        let listens = Listens::from_std(listens).unwrap();
        for watchdog in [None, Some("0"), Some("soon")] {
            let manager = ServiceManager::new(&format!("@{name}"), watchdog).unwrap();
            manager.clone().show_life().await;
            manager.ready("x");
            assert!(heard(&listens).await.starts_with("READY=1\n"));
        }
        assert!(ServiceManager::new("/nowhere/notify", None).is_err());
        ServiceManager(None).ready("to nobody");
    }
}
