//! Which trace a request belongs to: W3C Trace Context, as the headers `traceparent` and `tracestate` and the `trace` of jobs have it.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{SpanId, TraceId};

/// Longest `tracestate` that is passed on, in bytes: the standard's least. A longer one is left out, as the standard allows.
pub const TRACE_STATE_BYTES_MAX: usize = 512;

/// Most members of a `tracestate`, as the standard has it.
const TRACE_STATE_MEMBERS_MAX: usize = 32;

/// The bit of a `traceparent`'s flags that says that its sender records the trace.
const SAMPLED: u8 = 1;

/// A place in a trace: who gets it makes spans below that span.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceContext {
    /// The trace; never 0.
    pub trace: TraceId,
    /// The span that caused what follows; never 0.
    pub span: SpanId,
    /// Whether spans are recorded.
    pub sampled: bool,
    /// What tracing systems on the way have added, as `tracestate` has it; empty if nothing.
    pub state: Arc<str>,
}

impl TraceContext {
    /// Of the two headers. `None` for a `traceparent` that the standard has receivers ignore; a `tracestate` that is no such thing, or
    /// too long, is ignored by itself.
    pub fn parse(traceparent: &str, tracestate: &str) -> Option<Self> {
        let text = traceparent.trim_matches([' ', '\t']);
        let bytes = text.as_bytes();
        let is_hex = |part: &[u8]| part.iter().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let (head, rest) = bytes.split_at_checked(55)?;
        let (version, trace) = (head.get(..2)?, head.get(3..35)?);
        let (span, flags) = (head.get(36..52)?, head.get(53..55)?);
        let dashes = [2, 35, 52].iter().all(|at| head.get(*at) == Some(&b'-'));
        if !dashes || ![version, trace, span, flags].into_iter().all(is_hex) {
            return None;
        }
        // Version ff is none; later ones may have more behind a dash, version 00 has nothing.
        let has_end = match version {
            b"ff" => return None,
            b"00" => rest.is_empty(),
            _ => rest.is_empty() || rest.starts_with(b"-"),
        };
        let trace = TraceId::from_str(text.get(3..35)?).ok()?;
        let span = SpanId::from_str(text.get(36..52)?).ok()?;
        let flags = u8::from_str_radix(text.get(53..55)?, 16).ok()?;
        (has_end && trace.0 != 0 && span.0 != 0).then(|| Self {
            trace,
            span,
            sampled: flags & SAMPLED != 0,
            state: state(tracestate).into(),
        })
    }

    /// As the header `traceparent`: version 00.
    pub fn traceparent(&self) -> String {
        self.to_string()
    }
}

/// What of a `tracestate` is passed on: all of it or nothing.
fn state(text: &str) -> &str {
    let text = text.trim_matches([' ', '\t', ',']);
    let members = text
        .split(',')
        .map(str::trim)
        .filter(|member| !member.is_empty());
    let is_printable = text
        .bytes()
        .all(|b| (b' '..=b'~').contains(&b) || b == b'\t');
    let is_fine = text.len() <= TRACE_STATE_BYTES_MAX
        && is_printable
        && members.clone().count() <= TRACE_STATE_MEMBERS_MAX
        && members
            .clone()
            .all(|member| member.find('=').is_some_and(|at| at > 0));
    if is_fine { text } else { "" }
}

impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let flags = u8::from(self.sampled);
        write!(f, "00-{}-{}-{flags:02x}", self.trace, self.span)
    }
}

/// As jobs have it: the two headers.
#[derive(Serialize, Deserialize)]
struct Headers {
    traceparent: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    tracestate: String,
}

impl Serialize for TraceContext {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let headers = Headers {
            traceparent: self.traceparent(),
            tracestate: self.state.to_string(),
        };
        headers.serialize(serializer)
    }
}

/// Reads the `trace` of a job. One that is not understood is none: a job is not refused for what changes no answer.
///
/// # Errors
/// If it is no object with two texts.
pub(crate) fn taken<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<TraceContext>, D::Error> {
    let headers = Option::<Headers>::deserialize(deserializer)?;
    Ok(headers.and_then(|headers| TraceContext::parse(&headers.traceparent, &headers.tracestate)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    const SPAN: &str = "00f067aa0ba902b7";

    fn parse(traceparent: &str) -> Option<TraceContext> {
        TraceContext::parse(traceparent, "")
    }

    #[test]
    fn what_the_standard_takes_is_taken() {
        for (text, sampled) in [
            (format!("00-{TRACE}-{SPAN}-01"), true),
            (format!("00-{TRACE}-{SPAN}-00"), false),
            // Only the last bit counts.
            (format!("00-{TRACE}-{SPAN}-fe"), false),
            (format!("00-{TRACE}-{SPAN}-03"), true),
            (format!(" 00-{TRACE}-{SPAN}-01\t"), true),
            // A later version may have more.
            (format!("01-{TRACE}-{SPAN}-01"), true),
            (format!("cc-{TRACE}-{SPAN}-01-what-is-this"), true),
        ] {
            let context = parse(&text).unwrap_or_else(|| panic!("{text}"));
            assert_eq!(context.sampled, sampled, "{text}");
            assert_eq!(context.trace.to_string(), TRACE);
            assert_eq!(context.span.to_string(), SPAN);
        }
    }

    #[test]
    fn what_the_standard_refuses_is_ignored() {
        let zero = "0".repeat(32);
        for text in [
            String::new(),
            "00".to_owned(),
            format!("00-{TRACE}-{SPAN}"),
            format!("00-{TRACE}-{SPAN}-1"),
            format!("ff-{TRACE}-{SPAN}-01"),
            format!("0-{TRACE}-{SPAN}-01"),
            format!("00-{zero}-{SPAN}-01"),
            format!("00-{TRACE}-{}-01", &zero[..16]),
            format!("00-{}-{SPAN}-01", TRACE.to_uppercase()),
            format!("00-{TRACE}-{SPAN}-0G"),
            format!("00-{TRACE}-{SPAN}-+1"),
            format!("00_{TRACE}-{SPAN}-01"),
            format!("00-{TRACE}-{SPAN}-01-more"),
            format!("00-{TRACE}-{SPAN}-01-"),
            format!("01-{TRACE}-{SPAN}-01.more"),
            format!("00-{TRACE}{SPAN}-01"),
            format!("00-{}é-{SPAN}-01", &TRACE[2..]),
        ] {
            assert_eq!(parse(&text), None, "{text}");
        }
    }

    #[test]
    fn a_tracestate_is_passed_on_whole_or_not_at_all() {
        let state = |text: &str| {
            let context = TraceContext::parse(&format!("00-{TRACE}-{SPAN}-01"), text);
            context.expect("a traceparent").state.to_string()
        };
        assert_eq!(state("a=1,b@c=x y"), "a=1,b@c=x y");
        assert_eq!(state(" a=1, "), "a=1");
        let many = |count| vec!["a=1"; count].join(",");
        assert_eq!(state(&many(32)), many(32));
        for wrong in ["a", "=1", "a=1\n", "a=é", &many(33), &"a=".repeat(300)] {
            assert_eq!(state(wrong), "", "{wrong}");
        }
    }

    #[test]
    fn a_job_has_the_headers_and_one_that_is_not_understood_is_none() {
        #[derive(Debug, Deserialize)]
        struct Job {
            #[serde(default, deserialize_with = "taken")]
            trace: Option<TraceContext>,
        }
        let job = |text: &str| serde_json::from_str::<Job>(text).map(|job| job.trace);
        let whole = format!(r#"{{"traceparent":"00-{TRACE}-{SPAN}-01","tracestate":"a=1"}}"#);
        let context = job(&format!(r#"{{"trace":{whole}}}"#)).unwrap().unwrap();
        assert_eq!(serde_json::to_string(&context).unwrap(), whole);
        for none in [
            "{}",
            r#"{"trace":null}"#,
            r#"{"trace":{"traceparent":"x"}}"#,
        ] {
            assert_eq!(job(none).unwrap(), None, "{none}");
        }
        assert!(job(r#"{"trace":7}"#).is_err());
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(trace in 1..u128::MAX, span in 1..u64::MAX, sampled: bool) {
            let context = TraceContext { trace: TraceId(trace), span: SpanId(span), sampled, state: "a=1".into() };
            prop_assert_eq!(TraceContext::parse(&context.traceparent(), "a=1"), Some(context));
        }

        #[test]
        fn no_header_harms(parent in "[0-9a-f-]{0,60}|\\PC*", state in "\\PC*") {
            if let Some(context) = TraceContext::parse(&parent, &state) {
                prop_assert!(context.trace.0 != 0 && context.span.0 != 0);
                prop_assert!(context.state.len() <= TRACE_STATE_BYTES_MAX);
            }
        }
    }
}
