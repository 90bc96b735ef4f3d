//! Where traces of requests go: flags, and the variables that OpenTelemetry has for it.

use baton_traces::{Endpoint, Exporter, Headers, Sampler, TraceConfig, Tracer};
use clap::Args;

use crate::Failure;

/// The one protocol that is spoken.
const PROTOCOL: &str = "http/protobuf";

/// Where spans go.
#[derive(Args, Clone, Debug, Default)]
pub struct OtlpArgs {
    /// Collector of traces that takes OTLP over HTTP: http://HOST:4318 [default: no traces]
    #[arg(long, value_name = "URL", env = "OTEL_EXPORTER_OTLP_ENDPOINT", value_parser = endpoint)]
    pub otlp_endpoint: Option<String>,
}

/// Which traces are recorded.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct SampleArgs {
    /// Part of the requests that are traced, from 0 to 1, of those whose clients do not say it by `traceparent` [default: 1]
    #[arg(long, value_name = "PART", env = "OTEL_TRACES_SAMPLER_ARG", value_parser = part)]
    pub trace_sample: Option<f64>,
}

impl OtlpArgs {
    /// The collector, if there is one.
    pub fn endpoint(&self) -> Option<&str> {
        // A variable that is empty says nothing.
        self.otlp_endpoint.as_deref().filter(|url| !url.is_empty())
    }
}

fn endpoint(text: &str) -> Result<String, String> {
    match text {
        "" => Ok(String::new()),
        text => text.parse::<Endpoint>().map(|_| text.to_owned()),
    }
}

fn part(text: &str) -> Result<f64, String> {
    let part = text
        .parse()
        .map_err(|_| format!("{text:?} is no number: give one from 0 to 1"))?;
    Sampler::new(part).map(|_| part)
}

/// Starts to trace in this process's name, if there is a collector. Spans are sent until the exporter is dropped.
///
/// # Errors
/// What in the flags or the variables cannot work.
pub fn start(
    args: &OtlpArgs,
    sample: SampleArgs,
    service: &str,
    (instance, cluster): (&str, &str),
) -> Result<(Tracer, Option<Exporter>), Failure> {
    let variable = |name: &str| std::env::var(name).ok().filter(|text| !text.is_empty());
    let is_disabled = variable("OTEL_SDK_DISABLED").is_some_and(|text| text == "true");
    let Some(endpoint) = args.endpoint().filter(|_| !is_disabled) else {
        return Ok((Tracer::off(), None));
    };
    let protocol = variable("OTEL_EXPORTER_OTLP_PROTOCOL");
    if let Some(other) = protocol.filter(|protocol| protocol != PROTOCOL) {
        let why = format!(
            "OTEL_EXPORTER_OTLP_PROTOCOL is {other}, and spans go as {PROTOCOL} alone: give the collector's port for that (4318)"
        );
        return Err(why.into());
    }
    let headers = variable("OTEL_EXPORTER_OTLP_HEADERS").unwrap_or_default();
    let headers: Headers = headers
        .parse()
        .map_err(|error| format!("OTEL_EXPORTER_OTLP_HEADERS: {error}"))?;
    let config = TraceConfig {
        endpoint: endpoint
            .parse()
            .map_err(|error| format!("--otlp-endpoint: {error}"))?,
        headers,
        sampler: Sampler::new(sample.trace_sample.unwrap_or(1.0))?,
        service: variable("OTEL_SERVICE_NAME").unwrap_or_else(|| service.to_owned()),
        instance: instance.to_owned(),
        cluster: cluster.to_owned(),
    };
    tracing::info!(endpoint = %config.endpoint, service = config.service, "requests are traced");
    let (tracer, exporter) = Tracer::start(config)?;
    Ok((tracer, Some(exporter)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_work_is_refused_and_nothing_is_off() {
        assert!(endpoint("http://h:4318").is_ok() && endpoint("grpc://h").is_err());
        assert!(part("0.25").is_ok() && part("2").is_err() && part("all").is_err());
        for url in [None, Some(String::new())] {
            let args = OtlpArgs { otlp_endpoint: url };
            let started = start(&args, SampleArgs::default(), "s", ("i", "c"));
            assert!(!started.unwrap().0.is_on());
        }
    }
}
