//! Reading server-sent events: bytes in, the `data:` of each event out.

/// Splits a byte stream into lines and hands out what follows `data:`. Comments and other fields are passed over.
#[derive(Default)]
pub struct SseReader {
    rest: Vec<u8>,
}

impl SseReader {
    /// Takes the next bytes, wherever they were cut, and calls `event` for each whole `data:` line in them.
    pub fn push(&mut self, mut bytes: &[u8], mut event: impl FnMut(&[u8])) {
        while let Some(end) = bytes.iter().position(|&byte| byte == b'\n') {
            let (line, next) = bytes.split_at(end);
            bytes = &next[1..];
            if self.rest.is_empty() {
                data(line, &mut event);
            } else {
                self.rest.extend_from_slice(line);
                data(&self.rest, &mut event);
                self.rest.clear();
            }
        }
        self.rest.extend_from_slice(bytes);
    }
}

fn data(line: &[u8], event: &mut impl FnMut(&[u8])) {
    if let Some(data) = line.strip_prefix(b"data:") {
        event(data.trim_ascii());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_survive_any_cut() {
        let stream =
            b": keep-alive\n\ndata: {\"a\":1}\r\n\r\nevent: x\ndata:two\n\ndata: [DONE]\n\n";
        for cut in 0..stream.len() {
            let mut reader = SseReader::default();
            let mut events = Vec::new();
            for part in [&stream[..cut], &stream[cut..]] {
                reader.push(part, |data| {
                    events.push(String::from_utf8(data.to_vec()).unwrap())
                });
            }
            assert_eq!(events, ["{\"a\":1}", "two", "[DONE]"], "cut at {cut}");
        }
    }
}
