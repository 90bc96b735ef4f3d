//! What is read line by line: server-sent events, files of API keys, addresses of NATS servers.

use baton_api_server::ApiKeys;
use baton_bus::BusConfig;

#[path = "../../../baton/src/sse.rs"]
mod sse;

/// Reads the bytes as each of the three.
pub fn lines(data: &[u8]) {
    events(data);
    let text = String::from_utf8_lossy(data);
    keys(&text);
    address(&text);
}

/// Wherever a stream of events is cut, the events are the same.
fn events(data: &[u8]) {
    let read = |pieces: &mut dyn Iterator<Item = &[u8]>| {
        let mut reader = sse::SseReader::default();
        let mut events = Vec::new();
        pieces.for_each(|piece| reader.push(piece, |event| events.push(event.to_vec())));
        events
    };
    let whole = read(&mut std::iter::once(data));
    for bytes in [1, 3] {
        assert_eq!(read(&mut data.chunks(bytes)), whole);
    }
}

/// Whatever is wrong with a file of keys, no key is told; a key that was taken opens.
fn keys(text: &str) {
    match ApiKeys::parse(text) {
        Err(error) => {
            let long = text.split_whitespace().filter(|word| word.len() >= 16);
            for word in long {
                assert!(!error.contains(word), "{error}");
            }
        }
        Ok(keys) => {
            let line = text
                .lines()
                .map(str::trim)
                .find(|line| !line.is_empty() && !line.starts_with('#'));
            let key = line.and_then(|line| line.split_whitespace().last());
            let header = format!("Bearer {}", key.expect("there is a key"));
            keys.check(Some(header.as_bytes()), None)
                .expect("the first key opens");
        }
    }
}

/// The secrets of an address stay out of logs and errors, whatever is wrong with it.
fn address(text: &str) {
    const SECRET: &str = "s3cr3t-of-16-bytes";
    let shown = |url: String| {
        let config = BusConfig {
            url,
            ..BusConfig::default()
        };
        let servers = config.servers().map(|servers| servers.len());
        format!("{config:?} {servers:?} {}", config.url_without_secrets())
    };
    let _ = shown(text.to_owned());
    // The text as a user's name, as a password and as a host.
    for url in [
        format!("nats://{text}:{SECRET}@host:4222"),
        format!("nats://user:{SECRET}{text}@host:4222"),
        format!("nats://user:{text}{SECRET}@host:4222"),
        format!("nats://user:{SECRET}@{text}"),
    ] {
        let shown = shown(url);
        assert!(!shown.contains(SECRET), "{shown}");
    }
}
