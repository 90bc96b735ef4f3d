//! What a process says to systemd, and the socket that it takes from it. systemd is played by the test.

use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;

use baton_tests::{
    Api, Nats, PATIENCE, Process, Signal, Turn, baton, eventually, model_dir, within,
};
use tempfile::TempDir;
use tokio::net::UnixDatagram;

/// Puts the descriptor that the first argument names where systemd would, says so as it would, and becomes the rest.
const HAND_OVER: &str = "import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ['LISTEN_PID'], os.environ['LISTEN_FDS'] = str(os.getpid()), sys.argv[2]
os.execv(sys.argv[3], sys.argv[3:])";

/// The next message that is no sign of life.
async fn said(listens: &UnixDatagram) -> String {
    loop {
        let mut bytes = [0; 512];
        let count = within("a message to systemd", PATIENCE, listens.recv(&mut bytes)).await;
        let text = String::from_utf8_lossy(&bytes[..count.expect("a socket")]).into_owned();
        if text != "WATCHDOG=1" {
            return text;
        }
    }
}

async fn alive(listens: &UnixDatagram) {
    let mut bytes = [0; 512];
    loop {
        let count = within("a sign of life", PATIENCE, listens.recv(&mut bytes)).await;
        if &bytes[..count.expect("a socket")] == b"WATCHDOG=1" {
            return;
        }
    }
}

fn told(command: &mut Command, socket: &Path) {
    command.env("NOTIFY_SOCKET", socket);
    command.env("WATCHDOG_USEC", "200000");
}

#[tokio::test]
async fn a_worker_says_when_it_serves_lives_and_leaves() {
    let _turn = Turn::take();
    let dir = TempDir::new().expect("a temporary directory");
    let nats = Nats::start(dir.path(), "").await;
    let socket = dir.path().join("notify");
    let listens = UnixDatagram::bind(&socket).expect("a socket");
    let mut command = Command::new(baton());
    command.args([
        "worker",
        "--role",
        "both",
        "--worker-name",
        "w",
        "--device",
        "fake",
    ]);
    command.args([
        "--kv-mib",
        "16",
        "--request-plane-uri",
        &nats.uri(),
        "--model",
    ]);
    told(command.arg(model_dir()), &socket);
    let mut process = Process::start("w", &command, dir.path());
    assert_eq!(said(&listens).await, "READY=1\nSTATUS=serving as w");
    for _ in 0..3 {
        alive(&listens).await;
    }
    process.signal(Signal::Terminate);
    assert!(said(&listens).await.starts_with("STOPPING=1\n"));
    assert!(process.end(PATIENCE).await.success());
}

#[tokio::test]
async fn an_api_server_takes_its_socket_and_leaves_it_for_the_next() {
    let _turn = Turn::take();
    let dir = TempDir::new().expect("a temporary directory");
    let nats = Nats::start(dir.path(), "").await;
    let socket = dir.path().join("notify");
    let listens = UnixDatagram::bind(&socket).expect("a socket");
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let port = listener.local_addr().expect("an address").port();
    // What Rust opens is closed by exec otherwise.
    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).expect("a descriptor");
    let descriptor = listener.as_raw_fd().to_string();
    let server = |sockets: &str| {
        let mut command = Command::new("python3");
        command
            .args(["-c", HAND_OVER, &descriptor, sockets])
            .arg(baton());
        command.args([
            "api-server",
            "--request-plane-uri",
            &nats.uri(),
            "--tokenizer",
        ]);
        told(command.arg(model_dir()), &socket);
        command
    };
    for _ in 0..2 {
        let mut process = Process::start("api", &server("1"), dir.path());
        let ready = said(&listens).await;
        assert_eq!(
            ready,
            format!("READY=1\nSTATUS=serving at 127.0.0.1:{port}")
        );
        let api = Api::new(port);
        eventually("an answer", PATIENCE, async || {
            api.look("/live").await.map(drop)
        })
        .await;
        alive(&listens).await;
        process.signal(Signal::Terminate);
        assert!(said(&listens).await.starts_with("STOPPING=1\n"));
        assert!(process.end(PATIENCE).await.success(), "{}", process.log());
        // The socket still listens: who comes now waits for the next server.
        std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("a place in the queue");
    }
    let mut process = Process::start("two", &server("2"), dir.path());
    assert!(!process.end(PATIENCE).await.success());
    assert!(
        process.log().contains("hands over 2 sockets"),
        "{}",
        process.log()
    );
}
