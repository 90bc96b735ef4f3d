//! Gzip: of answers that are no streams of events, where the client takes it, and of request bodies.

use std::io::Write;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use actix_web::body::{BodySize, BoxBody, MessageBody};
use actix_web::dev::ServiceResponse;
use actix_web::http::header::{self, HeaderMap, HeaderValue};
use bytes::Bytes;
use flate2::Compression;
use flate2::write::{GzDecoder, GzEncoder};

use super::front::vary;
use crate::error::{ApiError, ErrorKind};

/// Shorter answers are sent as they are: they fit a few packets.
const WORTH_BYTES: u64 = 4 << 10;

/// What is compressed at once: about a millisecond.
const PIECE_BYTES: usize = 64 << 10;

/// Whether the client takes gzip.
pub fn is_taken(headers: &HeaderMap) -> bool {
    let lists = headers.get_all(header::ACCEPT_ENCODING);
    let mut codings = lists
        .filter_map(|list| list.to_str().ok())
        .flat_map(|list| list.split(','));
    codings.any(|coding| {
        let mut parts = coding.split(';').map(str::trim);
        let is_gzip = parts
            .next()
            .is_some_and(|name| name.eq_ignore_ascii_case("gzip"));
        let quality = parts.find_map(|part| part.strip_prefix("q="));
        is_gzip && quality.is_none_or(|q| q.parse::<f32>().is_ok_and(|q| q > 0.0))
    })
}

/// Whether this answer is to be compressed: it is large, and no stream of events, of which each is to leave when it is there.
pub fn is_worth_it(response: &ServiceResponse<BoxBody>) -> bool {
    let headers = response.headers();
    let kind = headers.get(header::CONTENT_TYPE);
    let is_events = kind.is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"));
    let is_large = match response.response().body().size() {
        BodySize::Sized(bytes) => bytes >= WORTH_BYTES,
        BodySize::Stream => true,
        BodySize::None => false,
    };
    is_large && !is_events && !headers.contains_key(header::CONTENT_ENCODING)
}

/// Says that the answer is compressed.
pub fn announce(headers: &mut HeaderMap) {
    headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    headers.remove(header::CONTENT_LENGTH);
    vary(headers, header::ACCEPT_ENCODING);
}

/// A body, compressed piece by piece. Between pieces it is everybody's turn.
pub struct Gzipped {
    body: BoxBody,
    /// None after the end.
    encoder: Option<GzEncoder<Vec<u8>>>,
    /// Came, and is not compressed yet.
    rest: Bytes,
}

impl Gzipped {
    /// This body, compressed.
    pub fn new(body: BoxBody) -> Self {
        let encoder = GzEncoder::new(Vec::new(), Compression::fast());
        Self {
            body,
            encoder: Some(encoder),
            rest: Bytes::new(),
        }
    }
}

impl MessageBody for Gzipped {
    type Error = Box<dyn std::error::Error>;

    fn size(&self) -> BodySize {
        BodySize::Stream
    }

    fn poll_next(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, Self::Error>>> {
        let this = self.get_mut();
        let Some(encoder) = &mut this.encoder else {
            return Poll::Ready(None);
        };
        if this.rest.is_empty() {
            match ready!(Pin::new(&mut this.body).poll_next(cx)) {
                Some(Ok(bytes)) => this.rest = bytes,
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => {
                    let encoder = this.encoder.take();
                    let end = encoder.map(GzEncoder::finish).transpose()?;
                    return Poll::Ready(end.map(|end| Ok(end.into())));
                }
            }
        }
        let piece = this.rest.split_to(this.rest.len().min(PIECE_BYTES));
        encoder.write_all(&piece)?;
        let out = std::mem::take(encoder.get_mut());
        if out.is_empty() {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(Some(Ok(out.into())))
    }
}

/// A request body on its way in.
pub enum Incoming<W: Write> {
    /// As it is.
    Plain(W),
    /// Compressed.
    Gzip(Box<GzDecoder<W>>),
}

impl<W: Write> Incoming<W> {
    /// A body with these headers.
    ///
    /// # Errors
    /// 415 for a coding that is not known here.
    pub fn new(headers: &HeaderMap, into: W) -> Result<Self, ApiError> {
        let mut codings = headers.get_all(header::CONTENT_ENCODING);
        let coding = codings
            .next()
            .map_or(&b"identity"[..], HeaderValue::as_bytes);
        let coding = coding.to_ascii_lowercase();
        match (&coding[..], codings.next()) {
            (b"identity", None) => Ok(Self::Plain(into)),
            (b"gzip" | b"x-gzip", None) => Ok(Self::Gzip(Box::new(GzDecoder::new(into)))),
            _ => {
                let message = "content-encoding must be gzip, or left out";
                Err(ApiError::new(ErrorKind::MediaType, message))
            }
        }
    }

    /// Where it goes.
    pub fn taken_by(&mut self) -> &mut W {
        match self {
            Self::Plain(into) => into,
            Self::Gzip(decoder) => decoder.get_mut(),
        }
    }

    /// Takes what came.
    ///
    /// # Errors
    /// What the writer says, or that it is no gzip.
    pub fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        match self {
            Self::Plain(into) => into.write_all(bytes),
            Self::Gzip(decoder) => decoder.write_all(bytes),
        }
    }

    /// Nothing more comes.
    ///
    /// # Errors
    /// As [`Self::write`], also if it is not whole.
    pub fn finish(&mut self) -> std::io::Result<()> {
        match self {
            Self::Plain(_) => Ok(()),
            Self::Gzip(decoder) => decoder.try_finish(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn gzip_is_taken_by_who_says_so() {
        for (list, expected) in [
            ("gzip, deflate", true),
            ("br;q=1.0, GZIP;q=0.5", true),
            ("gzip;q=0", false),
            ("deflate", false),
            ("", false),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static(list));
            assert_eq!(is_taken(&headers), expected, "{list}");
        }
        assert!(!is_taken(&HeaderMap::new()));
    }

    fn gzip_headers() -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        headers
    }

    #[test]
    fn other_codings_and_two_of_them_are_refused() {
        for codings in [
            &["br"][..],
            &["gzip", "gzip"],
            &["gzip, gzip"],
            &["deflate"],
        ] {
            let mut headers = HeaderMap::new();
            for coding in codings {
                headers.append(header::CONTENT_ENCODING, HeaderValue::from_static(coding));
            }
            let error = Incoming::new(&headers, Vec::new()).err().expect("refused");
            assert_eq!(error.kind, ErrorKind::MediaType);
        }
    }

    proptest! {
        /// What the one compresses the other reads, however it is cut; what is cut off or changed is no body.
        #[test]
        fn what_is_compressed_comes_back(
            data in prop::collection::vec(0u8..4, 0..200_000),
            cut in 1usize..9_000,
            lost in 1usize..8,
        ) {
            let bytes = Bytes::from(data.clone());
            let mut body = Box::pin(Gzipped::new(BoxBody::new(bytes)));
            let mut packed = Vec::new();
            let mut cx = Context::from_waker(std::task::Waker::noop());
            loop {
                match body.as_mut().poll_next(&mut cx) {
                    Poll::Ready(Some(piece)) => packed.extend(piece.unwrap()),
                    Poll::Ready(None) => break,
                    Poll::Pending => {}
                }
            }
            let read = |packed: &[u8]| {
                let mut incoming = Incoming::new(&gzip_headers(), Vec::new()).unwrap();
                for piece in packed.chunks(cut) {
                    incoming.write(piece)?;
                }
                incoming.finish()?;
                std::io::Result::Ok(std::mem::take(incoming.taken_by()))
            };
            prop_assert_eq!(read(&packed).unwrap(), data);
            prop_assert!(read(&packed[..packed.len() - lost]).is_err());
            let mut more = packed.clone();
            more.push(0);
            prop_assert!(read(&more).is_err());
        }
    }
}
