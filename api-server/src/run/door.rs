//! Whether the HTTP server still waits for connections at a listener.
//!
//! Its `pause` is answered before the thread that accepts has taken it up, and a listener that is shut down under that thread's
//! eyes is two errors in the log. When it has looked away can be seen in one place: the kernel's list of what each epoll
//! instance watches, proc(5), `fdinfo`.

use std::fs;
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use tokio::time::{sleep, timeout};

/// The thread looks away within microseconds once it runs. Beyond this the listener is shut down all the same.
const WAIT_MAX: Duration = Duration::from_millis(500);

/// How often it is looked.
const LOOK_INTERVAL: Duration = Duration::from_millis(1);

/// Waits until no epoll instance of this process watches the listener.
pub async fn unwatched(listener: &TcpListener) {
    let path = format!("/proc/self/fd/{}", listener.as_raw_fd());
    let Ok(socket) = fs::metadata(path) else {
        return;
    };
    let line = format!(" ino:{:x} ", socket.ino());
    let looked_away = async {
        while is_watched(&line) {
            sleep(LOOK_INTERVAL).await;
        }
    };
    let _ = timeout(WAIT_MAX, looked_away).await;
}

/// Whether a line of any epoll instance holds this.
fn is_watched(part: &str) -> bool {
    let Ok(entries) = fs::read_dir("/proc/self/fdinfo") else {
        return false;
    };
    entries.flatten().any(|entry| {
        let text = fs::read_to_string(entry.path()).unwrap_or_default();
        text.lines()
            .any(|line| line.starts_with("tfd:") && format!("{line} ").contains(part))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_listener_is_watched_as_long_as_somebody_waits_at_it() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let door = listener.try_clone().unwrap();
        let ino = fs::metadata(format!("/proc/self/fd/{}", door.as_raw_fd()))
            .unwrap()
            .ino();
        let line = format!(" ino:{ino:x} ");
        assert!(!is_watched(&line));
        let waits = tokio::net::TcpListener::from_std(listener).unwrap();
        assert!(is_watched(&line));
        tokio::spawn(async move {
            sleep(20 * LOOK_INTERVAL).await;
            drop(waits);
        });
        unwatched(&door).await;
        assert!(!is_watched(&line));
    }
}
