//! A nats-server of the test's own.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;

use baton_protocol::limits::MESSAGE_BYTES_MAX;
use bytes::Bytes;
use futures::StreamExt;
use serde_json::Value;

use crate::fixture::command;
use crate::process::{Process, Signal};
use crate::wait::{PATIENCE, eventually, within};

/// Waits until the server has taken what this client said so far, subscriptions above all. `flush` alone only hands it to
/// the network: another client may still be heard first.
///
/// # Panics
/// If the server does not answer.
pub async fn settled(client: &async_nats::Client) {
    let inbox = client.new_inbox();
    let mut answers = client.subscribe(inbox.clone()).await.expect("a bus");
    // The server forgets the subscription as it delivers the message.
    answers.unsubscribe_after(1).await.expect("a bus");
    client.publish(inbox, Bytes::new()).await.expect("a bus");
    let answer = within("the server's answer", PATIENCE, answers.next()).await;
    assert!(answer.is_some(), "the connection was closed");
}

/// A nats-server on a port that it chose itself.
pub struct Nats {
    process: Process,
    address: Ipv4Addr,
    port: u16,
    dir: PathBuf,
    more: String,
}

impl Nats {
    /// Starts it and waits until it listens. `more` are lines of its configuration.
    pub async fn start(dir: &Path, more: &str) -> Self {
        Self::start_at(Ipv4Addr::LOCALHOST, dir, more).await
    }

    /// The same at another address of this machine.
    pub async fn start_at(address: Ipv4Addr, dir: &Path, more: &str) -> Self {
        let ports = dir.join("ports");
        fs::create_dir_all(&ports).expect("a directory below a temporary one");
        let process = spawn(dir, address, -1, more);
        let file = ports.join(format!("nats-server_{}.ports", process.id()));
        let port = eventually("nats-server to write its port", PATIENCE, async || {
            let text = fs::read_to_string(&file).map_err(|e| format!("{}: {e}", file.display()))?;
            let value: Value = serde_json::from_str(&text).map_err(|e| e.to_string())?;
            let uri = value["nats"][0].as_str().ok_or("no uri")?;
            let port = uri.rsplit(':').next().ok_or("no port")?;
            port.parse::<u16>().map_err(|e| format!("{uri}: {e}"))
        })
        .await;
        Self {
            process,
            address,
            port,
            dir: dir.to_owned(),
            more: more.to_owned(),
        }
    }

    /// Where it is.
    pub fn uri(&self) -> String {
        format!("nats://{}:{}", self.address, self.port)
    }

    /// The same for a user, whose password is its name.
    pub fn uri_of(&self, user: &str) -> String {
        format!("nats://{user}:{user}@{}:{}", self.address, self.port)
    }

    /// What its configuration says from its next start on, beyond where it listens.
    pub fn configure(&mut self, more: &str) {
        more.clone_into(&mut self.more);
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// The process.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// kill -9.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Starts it again on the same port.
    pub fn restart(&mut self) {
        self.process.kill();
        self.process = spawn(&self.dir, self.address, i32::from(self.port), &self.more);
    }
}

fn spawn(dir: &Path, address: Ipv4Addr, port: i32, more: &str) -> Process {
    let config = dir.join("nats.conf");
    let text = format!(
        "listen: \"{address}:{port}\"\nmax_payload: {MESSAGE_BYTES_MAX}\nports_file_dir: {:?}\n{more}\n",
        dir.join("ports")
    );
    fs::write(&config, text).expect("a file below a temporary directory");
    let mut server = Command::new(command("nats-server"));
    server.arg("-c").arg(&config);
    Process::start("nats-server", &server, dir)
}
