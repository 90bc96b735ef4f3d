//! HTTP/1.1 answers taken apart: head, and body out of its wrapping.

/// The head of an answer.
#[derive(Debug, PartialEq, Eq)]
pub struct Head {
    /// Status.
    pub status: u16,
    /// Length of the body; `None`: chunked.
    pub length: Option<u64>,
    /// Whether the connection may carry another request.
    pub keep: bool,
}

impl Head {
    /// From the bytes before the empty line.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let text = String::from_utf8_lossy(bytes);
        let mut lines = text.split("\r\n");
        let status = lines
            .next()
            .and_then(|line| line.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok());
        let mut head = Self {
            status: status.ok_or("an answer that is not HTTP/1.1")?,
            length: None,
            keep: true,
        };
        let mut chunked = false;
        for line in lines {
            let Some((name, value)) = line.split_once(':') else {
                continue;
            };
            let value = value.trim();
            match name.to_ascii_lowercase().as_str() {
                "content-length" => head.length = value.parse().ok(),
                "transfer-encoding" => chunked = value.eq_ignore_ascii_case("chunked"),
                "connection" => head.keep = !value.eq_ignore_ascii_case("close"),
                _ => {}
            }
        }
        if !chunked && head.length.is_none() {
            return Err("an answer of unknown length".to_owned());
        }
        Ok(head)
    }
}

/// Takes a body out of its wrapping: RFC 9112, sections 6 and 7.1.
pub enum Body {
    /// So many bytes to come.
    Plain(u64),
    /// Within a chunk's size line, so far this.
    Size(Vec<u8>),
    /// So many bytes of the chunk to come, its closing CRLF included.
    Chunk(u64),
    /// After the last chunk: trailer lines, so many bytes since the last line end.
    Trailer(u64),
    /// All of it was there.
    Ended,
}

impl Body {
    /// A body of this length, or a chunked one.
    pub fn new(length: Option<u64>) -> Self {
        match length {
            Some(0) => Self::Ended,
            Some(length) => Self::Plain(length),
            None => Self::Size(Vec::new()),
        }
    }

    /// Whether all of it was there.
    pub fn ended(&self) -> bool {
        matches!(self, Self::Ended)
    }

    /// Takes in what was read and hands its payload on.
    ///
    /// # Errors
    /// What breaks the format.
    pub fn push(&mut self, mut bytes: &[u8], mut part: impl FnMut(&[u8])) -> Result<(), String> {
        while let Some(&byte) = bytes.first() {
            match self {
                Self::Ended => return Err("bytes after the end of the answer".to_owned()),
                Self::Plain(left) => {
                    let take = usize::try_from(*left)
                        .unwrap_or(usize::MAX)
                        .min(bytes.len());
                    part(&bytes[..take]);
                    bytes = &bytes[take..];
                    *left -= take as u64;
                    if *left == 0 {
                        *self = Self::Ended;
                    }
                }
                Self::Size(line) => {
                    bytes = &bytes[1..];
                    if byte != b'\n' {
                        line.push(byte);
                        if line.len() > 256 {
                            return Err("a chunk size without end".to_owned());
                        }
                        continue;
                    }
                    let digits = line
                        .split(|byte| b";\r".contains(byte))
                        .next()
                        .unwrap_or_default();
                    let digits = std::str::from_utf8(digits).unwrap_or_default().trim();
                    match u64::from_str_radix(digits, 16) {
                        Ok(0) => *self = Self::Trailer(0),
                        Ok(size) if size < 1 << 32 => *self = Self::Chunk(size + 2),
                        _ => return Err("a chunk size that is none".to_owned()),
                    }
                }
                Self::Chunk(left) => {
                    // The last two bytes are the CRLF.
                    let data = usize::try_from(left.saturating_sub(2))
                        .unwrap_or(usize::MAX)
                        .min(bytes.len());
                    if data > 0 {
                        part(&bytes[..data]);
                    }
                    let take = usize::try_from(*left)
                        .unwrap_or(usize::MAX)
                        .min(bytes.len());
                    bytes = &bytes[take..];
                    *left -= take as u64;
                    if *left == 0 {
                        *self = Self::Size(Vec::new());
                    }
                }
                Self::Trailer(since) => {
                    bytes = &bytes[1..];
                    match byte {
                        b'\n' if *since == 0 => *self = Self::Ended,
                        b'\n' => *since = 0,
                        b'\r' => {}
                        _ => *since += 1,
                    }
                }
            }
        }
        Ok(())
    }
}

/// Where `what` begins in `bytes`.
pub fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    let (&first, rest) = what.split_first()?;
    let mut from = 0;
    while let Some(at) = bytes[from..].iter().position(|&byte| byte == first) {
        let after = from + at + 1;
        if bytes[after..].starts_with(rest) {
            return Some(after - 1);
        }
        from = after;
    }
    None
}
