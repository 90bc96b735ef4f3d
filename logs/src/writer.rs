//! Where the log library writes its lines to.

use std::io;
use std::time::Instant;

use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;

use crate::QUEUE;
use crate::rate::Rates;

/// Makes a [`Line`] for each event.
#[derive(Debug)]
pub(crate) struct Lines {
    json: bool,
    rates: Rates,
}

impl Lines {
    pub(crate) fn new(json: bool, rates: Rates) -> Self {
        Self { json, rates }
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line {
            bytes: Some(Vec::new()),
            left_out: 0,
            json: self.json,
        }
    }

    fn make_writer_for(&'a self, metadata: &Metadata<'_>) -> Line {
        // Whoever asks for more than INFO wants to see all of it.
        let passed = match *metadata.level() <= Level::INFO {
            true => self.rates.pass(metadata.callsite(), Instant::now()),
            false => Some(0),
        };
        Line {
            bytes: passed.map(|_| Vec::new()),
            left_out: passed.unwrap_or_default(),
            json: self.json,
        }
    }
}

/// One line, handed on when it is dropped. Taking it never fails.
pub(crate) struct Line {
    /// None if it is left out.
    bytes: Option<Vec<u8>>,
    /// Lines of its kind that were left out before it.
    left_out: u64,
    json: bool,
}

impl io::Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(line) = &mut self.bytes {
            line.extend_from_slice(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if let Some(line) = self.bytes.take() {
            QUEUE.push(with_left_out(line, self.left_out, self.json));
        }
    }
}

/// The line, and how many of its kind were left out before it.
fn with_left_out(mut line: Vec<u8>, left_out: u64, json: bool) -> Vec<u8> {
    if left_out == 0 {
        return line;
    }
    let (end, note) = match json {
        true => ("}\n", format!(",\"left_out\":{left_out}}}\n")),
        false => ("\n", format!(" ({left_out} such lines were left out)\n")),
    };
    if line.ends_with(end.as_bytes()) {
        line.truncate(line.len() - end.len());
        line.extend_from_slice(note.as_bytes());
    }
    line
}

#[cfg(test)]
mod tests {
    use super::with_left_out;

    #[test]
    fn a_line_says_how_many_of_its_kind_were_left_out() {
        let text = with_left_out(b"WARN no\n".to_vec(), 3, false);
        assert_eq!(text, b"WARN no (3 such lines were left out)\n");
        let json = with_left_out(b"{\"level\":\"WARN\"}\n".to_vec(), 3, true);
        assert_eq!(json, b"{\"level\":\"WARN\",\"left_out\":3}\n");
        assert_eq!(with_left_out(b"WARN no\n".to_vec(), 0, false), b"WARN no\n");
    }
}
