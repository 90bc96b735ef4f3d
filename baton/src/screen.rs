//! A view that is drawn again and again.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

/// Clears a terminal and begins at its top.
const CLEAR: &str = "\x1b[2J\x1b[H";

/// Between two looks, unless somebody says otherwise.
pub const EVERY: Duration = Duration::from_secs(2);

/// Shows what `look` gives, again and again until standard output takes no more.
pub async fn redraw(every: Duration, mut look: impl AsyncFnMut() -> String) -> io::Result<()> {
    let mut tick = tokio::time::interval(every);
    loop {
        tick.tick().await;
        let text = look().await;
        let before = match io::stdout().is_terminal() {
            true => CLEAR,
            false => "",
        };
        let mut out = io::stdout().lock();
        out.write_all(format!("{before}{text}").as_bytes())?;
        out.flush()?;
    }
}

/// Lines that fit on the terminal, if standard output is one that says so.
pub fn lines() -> Option<usize> {
    let size = rustix::termios::tcgetwinsize(io::stdout()).ok()?;
    (size.ws_row > 0).then_some(size.ws_row.into())
}
