use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};

use super::*;
use crate::{Sampler, Tracer};

/// One HTTP request: its head, and the spans in it.
fn taken(stream: &TcpStream) -> (String, Vec<otlp::Span>) {
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        let read = reader.read_line(&mut head).unwrap();
        assert!(read > 0, "{head}");
    }
    let length = head.lines().find_map(|line| {
        line.to_lowercase()
            .strip_prefix("content-length: ")?
            .parse()
            .ok()
    });
    let mut body = vec![0; length.unwrap()];
    reader.read_exact(&mut body).unwrap();
    let request = ExportTraceServiceRequest::decode(&*body).unwrap();
    let of_scopes = request
        .resource_spans
        .into_iter()
        .flat_map(|r| r.scope_spans);
    (head, of_scopes.flat_map(|scope| scope.spans).collect())
}

fn answer(mut stream: &TcpStream, status: &str, body: &[u8]) {
    let head = format!(
        "HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(&[head.as_bytes(), body].concat()).unwrap();
}

fn started(listener: &TcpListener) -> (Tracer, Exporter) {
    let port = listener.local_addr().unwrap().port();
    let config = TraceConfig {
        endpoint: format!("http://127.0.0.1:{port}").parse().unwrap(),
        headers: "api-key=secret".parse().unwrap(),
        sampler: Sampler::new(1.0).unwrap(),
        service: "s".to_owned(),
        instance: "i".to_owned(),
        cluster: "c".to_owned(),
    };
    Tracer::start(config).unwrap()
}

fn make(tracer: &Tracer, count: usize) {
    for _ in 0..count {
        let span = tracer.request((None, ""), "r", std::time::Instant::now());
        span.unwrap().end();
    }
}

#[test]
fn what_waits_is_sent_at_the_end() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (tracer, exporter) = started(&listener);
    let collector = std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let (head, spans) = taken(&stream);
        answer(&stream, "200 OK", b"");
        (head, spans.len())
    });
    make(&tracer, 3);
    drop(exporter);
    let (head, count) = collector.join().unwrap();
    assert_eq!(count, 3);
    assert!(head.starts_with("POST /v1/traces "), "{head}");
    assert!(
        head.contains("application/x-protobuf") && head.contains("api-key: secret"),
        "{head}"
    );
    assert_eq!(tracer.dropped(), [("queue_full", 0), ("export", 0)]);
    // Nobody takes them any more, and nobody is held up.
    make(&tracer, 1);
    assert_eq!(tracer.dropped()[0].1, 1);
}

#[test]
fn what_is_refused_is_counted() {
    let partly = ExportTraceServiceResponse {
        partial_success: Some(
            opentelemetry_proto::tonic::collector::trace::v1::ExportTracePartialSuccess {
                rejected_spans: 2,
                error_message: "too old".to_owned(),
            },
        ),
    };
    let partly = partly.encode_to_vec();
    for (status, body, lost) in [
        ("503 Service Unavailable", &b""[..], 3),
        ("307 Temporary Redirect", b"", 3),
        ("200 OK", &partly, 2),
        ("200 OK", b"{\"partialSuccess\":{}}", 0),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (tracer, exporter) = started(&listener);
        let body = body.to_vec();
        let collector = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            taken(&stream);
            answer(&stream, status, &body);
        });
        make(&tracer, 3);
        drop(exporter);
        collector.join().unwrap();
        assert_eq!(tracer.dropped()[1], ("export", lost), "{status}");
    }
}

#[test]
fn a_collector_that_is_not_there_costs_the_spans_alone() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (tracer, exporter) = started(&listener);
    drop(listener);
    make(&tracer, 3);
    drop(exporter);
    assert_eq!(tracer.dropped()[1], ("export", 3));
}

#[test]
fn one_that_does_not_answer_keeps_nobody_for_long() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (tracer, exporter) = started(&listener);
    make(&tracer, 3);
    let begun = std::time::Instant::now();
    drop(exporter);
    assert!(begun.elapsed() < 3 * FLUSH_WAIT, "{:?}", begun.elapsed());
    drop(listener);
}
