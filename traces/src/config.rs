//! Where spans go, and in whose name.

use std::fmt;
use std::str::FromStr;

use percent_encoding::percent_decode_str;
use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};

use crate::Sampler;

/// Where a collector takes traces over HTTP.
const PATH: &str = "v1/traces";

/// What a tracer is told at start.
#[derive(Clone, Debug)]
pub struct TraceConfig {
    /// The collector.
    pub endpoint: Endpoint,
    /// Sent with each export: keys of those who sell collectors.
    pub headers: Headers,
    /// Which traces that begin here are recorded.
    pub sampler: Sampler,
    /// `service.name`.
    pub service: String,
    /// `service.instance.id`: this process's name in its cluster.
    pub instance: String,
    /// `service.namespace`: the cluster.
    pub cluster: String,
}

/// The address of a collector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint(Url);

impl Endpoint {
    /// Where traces go.
    pub(crate) fn url(&self) -> Url {
        self.0.clone()
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Endpoint {
    type Err = String;

    /// An address as OTEL_EXPORTER_OTLP_ENDPOINT has it, to which the path of traces is added unless it is there.
    fn from_str(text: &str) -> Result<Self, String> {
        let url = Url::parse(text)
            .map_err(|error| format!("{text:?} is no address: {error}; give http://HOST:4318"))?;
        if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
            let why = "spans go over HTTP: give http://HOST:4318 or https://HOST";
            return Err(format!("{text:?}: {why}"));
        }
        if !url.username().is_empty() || url.password().is_some() {
            let why =
                "a command line is no place for a password: put it into OTEL_EXPORTER_OTLP_HEADERS";
            return Err(why.to_owned());
        }
        let mut url = url;
        let path = url.path().trim_end_matches('/');
        if !path.ends_with(PATH) {
            let whole = format!("{path}/{PATH}");
            url.set_path(&whole);
        }
        Ok(Self(url))
    }
}

/// Headers of exports. What they say is shown nowhere.
#[derive(Clone, Default)]
pub struct Headers(pub(crate) HeaderMap);

impl FromStr for Headers {
    type Err = String;

    /// As OTEL_EXPORTER_OTLP_HEADERS has them: `name=value,name=value`, percent-encoded.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut headers = HeaderMap::new();
        let parts = text.split(',').map(str::trim);
        for (at, part) in parts.filter(|part| !part.is_empty()).enumerate() {
            let header = part.split_once('=').and_then(|(name, value)| {
                let name = HeaderName::from_str(name.trim()).ok()?;
                let value = percent_decode_str(value.trim()).decode_utf8().ok()?;
                let mut value = HeaderValue::from_str(&value).ok()?;
                value.set_sensitive(true);
                Some((name, value))
            });
            let Some((name, value)) = header else {
                return Err(format!("its header {} is no name=value", at + 1));
            };
            headers.append(name, value);
        }
        Ok(Self(headers))
    }
}

impl fmt::Debug for Headers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_of_traces_is_added_once() {
        for (text, url) in [
            ("http://h:4318", "http://h:4318/v1/traces"),
            ("http://h:4318/", "http://h:4318/v1/traces"),
            ("https://h/otlp", "https://h/otlp/v1/traces"),
            ("http://h:4318/v1/traces", "http://h:4318/v1/traces"),
        ] {
            let endpoint: Endpoint = text.parse().unwrap();
            assert_eq!(endpoint.to_string(), url, "{text}");
        }
    }

    #[test]
    fn what_is_no_address_is_told_so() {
        for (text, part) in [
            ("", "http://HOST:4318"),
            ("h:4318", "HTTP"),
            ("grpc://h:4317", "HTTP"),
            ("http://me:secret@h", "OTEL_EXPORTER_OTLP_HEADERS"),
        ] {
            let error = text.parse::<Endpoint>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn headers_are_read_and_not_shown() {
        let headers: Headers = "api-key=a%20b, x=1,".parse().unwrap();
        assert_eq!(headers.0["api-key"], "a b");
        assert_eq!(headers.0["x"], "1");
        assert!(!format!("{headers:?}").contains("a b"));
        for wrong in ["key", "=1", "a b=1", "a=%0a"] {
            assert!(wrong.parse::<Headers>().is_err(), "{wrong}");
        }
    }
}
