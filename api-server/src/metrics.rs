//! Every metric of the API server, by name.

use std::fmt::Write as _;

use baton_protocol::{PrefixPull, PullParts};
use baton_traces::Tracer;
use prometheus::{
    Encoder, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts,
    Registry, TextEncoder,
};
use tokio::time::Instant;

use crate::fleet::membership::Membership;

#[cfg(test)]
mod dashboard;

/// Counters and histograms.
pub struct Metrics {
    registry: Registry,
    /// From a request's arrival to its first token.
    pub ttft_seconds: Histogram,
    /// Between tokens of one generation.
    pub inter_token_seconds: Histogram,
    /// A prompt's wait on its context worker.
    pub queue_seconds: Histogram,
    /// A pull, release included.
    pub kv_pull_seconds: Histogram,
    /// From a prompt's end to its release.
    pub kv_handover_seconds: Histogram,
    /// The parts of a hand-over: room, turn, progress, read, release.
    pub kv_handover_part_seconds: HistogramVec,
    /// Bytes of a pull.
    pub kv_pull_bytes: Histogram,
    /// Generations in flight.
    pub requests_in_flight: IntGauge,
    /// Generations that ended, by outcome.
    pub requests_total: IntCounterVec,
    /// Errors told to clients, by reason.
    pub errors_total: IntCounterVec,
    /// Generations retried, by reason.
    pub retries_total: IntCounterVec,
    /// Waits for a place on a decode worker that ended because one became free.
    pub decode_room_total: IntCounter,
    /// Faults of the bus, by kind.
    pub bus_faults_total: IntCounterVec,
    /// Blocks of which it is known what prefix they hold, and where.
    pub known_prefixes: IntGauge,
    /// Tokens, by kind: prompt, cached, output.
    pub tokens_total: IntCounterVec,
    /// Tokens of prompts' beginnings that were pulled before their prompts ran.
    pub prefix_pull_tokens_total: IntCounter,
    /// Beginnings that were to be pulled and were not, by cause.
    pub prefix_pull_failures_total: IntCounterVec,
    /// Requests that were promised something, by class and by what became of them.
    pub service_level_total: IntCounterVec,
    /// Those that missed it, by class and by what took the time.
    pub service_level_missed_total: IntCounterVec,
}

impl Metrics {
    /// A registry with all of them.
    ///
    /// # Errors
    /// If a name or a label is not one Prometheus takes.
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let histogram = |name: &str, help: &str, buckets: Vec<f64>| {
            let metric = Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets))?;
            registry.register(Box::new(metric.clone()))?;
            Ok::<_, prometheus::Error>(metric)
        };
        let counters_by = |name: &str, help: &str, labels: &[&str]| {
            let metric = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(metric.clone()))?;
            Ok::<_, prometheus::Error>(metric)
        };
        let counters = |name: &str, help: &str, label: &str| counters_by(name, help, &[label]);
        let seconds = |start: f64, count| prometheus::exponential_buckets(start, 2.0, count);
        let in_flight = IntGauge::new("baton_requests_in_flight", "Generations in flight.")?;
        registry.register(Box::new(in_flight.clone()))?;
        let decode_room = IntCounter::new(
            "baton_decode_room_total",
            "Waits for a decode worker that ended because a place became free.",
        )?;
        registry.register(Box::new(decode_room.clone()))?;
        let prefix_pull_tokens = IntCounter::new(
            "baton_prefix_pull_tokens_total",
            "Tokens of prompts' beginnings whose KV was pulled from another worker before the prompt ran.",
        )?;
        registry.register(Box::new(prefix_pull_tokens.clone()))?;
        let known_prefixes = IntGauge::new(
            "baton_known_prefixes",
            "Blocks of the workers' prefix indexes that are known here, each counted once.",
        )?;
        registry.register(Box::new(known_prefixes.clone()))?;
        let handover_parts = HistogramVec::new(
            HistogramOpts::new(
                "baton_kv_handover_part_seconds",
                "What a hand-over is made of: the KV's wait for a decode worker with room, and the parts of its pull.",
            )
            .buckets(seconds(0.000_01, 20)?),
            &["part"],
        )?;
        registry.register(Box::new(handover_parts.clone()))?;
        Ok(Self {
            ttft_seconds: histogram(
                "baton_ttft_seconds",
                "From a request's arrival to its first token.",
                seconds(0.001, 17)?,
            )?,
            inter_token_seconds: histogram(
                "baton_inter_token_seconds",
                "Between tokens of one generation.",
                seconds(0.000_1, 16)?,
            )?,
            queue_seconds: histogram(
                "baton_queue_seconds",
                "A prompt's wait on its context worker.",
                seconds(0.000_5, 17)?,
            )?,
            kv_pull_seconds: histogram(
                "baton_kv_pull_seconds",
                "A KV pull, from the first read to the release answered.",
                seconds(0.000_1, 17)?,
            )?,
            kv_handover_seconds: histogram(
                "baton_kv_handover_seconds",
                "From a prompt's last step to the release of its KV, on the context worker's clock.",
                seconds(0.000_1, 17)?,
            )?,
            kv_handover_part_seconds: handover_parts,
            kv_pull_bytes: histogram(
                "baton_kv_pull_bytes",
                "Bytes of a KV pull.",
                prometheus::exponential_buckets(65_536.0, 4.0, 10)?,
            )?,
            requests_in_flight: in_flight,
            requests_total: counters(
                "baton_requests_total",
                "Generations that ended, by outcome.",
                "outcome",
            )?,
            errors_total: counters("baton_errors_total", "Errors told to clients.", "reason")?,
            retries_total: counters(
                "baton_retries_total",
                "Generations retried, by reason.",
                "reason",
            )?,
            decode_room_total: decode_room,
            known_prefixes,
            bus_faults_total: counters("baton_bus_faults_total", "Faults of the bus.", "kind")?,
            tokens_total: counters("baton_tokens_total", "Tokens, by kind.", "kind")?,
            prefix_pull_tokens_total: prefix_pull_tokens,
            prefix_pull_failures_total: counters(
                "baton_prefix_pull_failures_total",
                "Beginnings of prompts that were to be pulled and were computed instead, by cause.",
                "cause",
            )?,
            service_level_total: counters_by(
                "baton_service_level_total",
                "Requests that were promised a service level, by what became of it.",
                &["tier", "outcome"],
            )?,
            service_level_missed_total: counters_by(
                "baton_service_level_missed_total",
                "Requests that missed it, by what took the time.",
                &["tier", "cause"],
            )?,
            registry,
        })
    }

    /// A pull was made of these parts.
    pub fn observe_pull(&self, parts: PullParts) {
        let PullParts {
            turn,
            progress,
            read,
            release,
        } = parts;
        for (part, seconds) in [
            ("turn", turn),
            ("progress", progress),
            ("read", read),
            ("release", release),
        ] {
            let histogram = self.kv_handover_part_seconds.with_label_values(&[part]);
            histogram.observe(f64::from(seconds));
        }
    }

    /// What became of pulling a prompt's beginning.
    pub fn observe_prefix_pull(&self, pull: PrefixPull) {
        self.prefix_pull_tokens_total.inc_by(pull.tokens.into());
        if let Some(failure) = pull.failure {
            self.prefix_pull_failures_total
                .with_label_values(&[failure.label()])
                .inc();
        }
    }

    /// Prometheus' text format, with the load of every worker as it last told, how many responses are kept, of how many bytes, and the
    /// spans that were dropped.
    ///
    /// # Errors
    /// If the registry cannot be written.
    pub fn render(
        &self,
        members: &Membership,
        kept: (usize, usize),
        tracer: &Tracer,
        now: Instant,
    ) -> Result<String, prometheus::Error> {
        let mut bytes = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut bytes)?;
        let mut text = String::from_utf8_lossy(&bytes).into_owned();
        log_counters(&mut text);
        response_gauges(kept, &mut text);
        trace_counters(tracer, &mut text);
        worker_gauges(members, now, &mut text);
        Ok(text)
    }
}

/// Counters that the logging library keeps for the process.
fn log_counters(out: &mut String) {
    // Writing to memory cannot fail.
    let _ = writeln!(
        out,
        "# HELP baton_log_lines_dropped_total Log lines that were not written, by reason.\n\
         # TYPE baton_log_lines_dropped_total counter"
    );
    for (reason, lines) in baton_logs::dropped() {
        let _ = writeln!(
            out,
            "baton_log_lines_dropped_total{{reason=\"{reason}\"}} {lines}"
        );
    }
    let _ = writeln!(
        out,
        "# HELP baton_http_malformed_total Requests that were no HTTP, answered with 400.\n\
         # TYPE baton_http_malformed_total counter\nbaton_http_malformed_total {}",
        baton_logs::malformed_http_requests()
    );
}

/// Spans that reached no collector.
fn trace_counters(tracer: &Tracer, out: &mut String) {
    // Writing to memory cannot fail.
    let _ = writeln!(
        out,
        "# HELP baton_trace_spans_dropped_total Spans that reached no collector, by reason.\n\
         # TYPE baton_trace_spans_dropped_total counter"
    );
    for (reason, spans) in tracer.dropped() {
        let _ = writeln!(
            out,
            "baton_trace_spans_dropped_total{{reason=\"{reason}\"}} {spans}"
        );
    }
}

/// What responses that are kept hold.
fn response_gauges((responses, bytes): (usize, usize), out: &mut String) {
    // Writing to memory cannot fail.
    let _ = writeln!(
        out,
        "# HELP baton_response_store_bytes Bytes of responses that are kept.\n\
         # TYPE baton_response_store_bytes gauge\nbaton_response_store_bytes {bytes}\n\
         # HELP baton_response_store_responses Responses that are kept.\n\
         # TYPE baton_response_store_responses gauge\nbaton_response_store_responses {responses}"
    );
}

/// One gauge per number of a beat. They come from membership as it is, so a worker that left leaves none.
fn worker_gauges(members: &Membership, now: Instant, out: &mut String) {
    // Nothing where a worker has not measured it.
    type Read = fn(&baton_protocol::Beat) -> Option<f64>;
    let gauges: [(&str, &str, Read); 14] = [
        ("waiting", "Sequences waiting for their first step.", |b| {
            Some(b.load.waiting.into())
        }),
        ("running", "Sequences in the running batch.", |b| {
            Some(b.load.running.into())
        }),
        ("waiting_tokens", "Prompt tokens not yet run.", |b| {
            Some(b.load.waiting_tokens.into())
        }),
        ("decoding", "Generating sequences.", |b| {
            Some(b.load.decoding.into())
        }),
        (
            "step_cost_error",
            "Nine of ten of the last steps took as long as predicted within this part.",
            |b| b.cost_error.map(f64::from),
        ),
        ("leased", "Staged handles.", |b| Some(b.load.leased.into())),
        ("pulling", "Pulls under way.", |b| {
            Some(b.load.pulling.into())
        }),
        ("blocks_used", "Blocks held.", |b| {
            Some(b.load.blocks_used.into())
        }),
        ("blocks_cached", "Blocks kept for their prefix.", |b| {
            Some(b.load.blocks_cached.into())
        }),
        ("blocks_quarantined", "Blocks of broken transfers.", |b| {
            Some(b.load.blocks_quarantined.into())
        }),
        (
            "plans_refused",
            "Steps that its executor has refused since it started.",
            |b| Some(b.load.plans_refused.into()),
        ),
        ("blocks_capacity", "Blocks of the arena.", |b| {
            Some(b.capacity.blocks.into())
        }),
        ("batch_capacity", "Sequences in one batch.", |b| {
            Some(b.capacity.batch.into())
        }),
        ("queue_capacity", "Jobs that may wait.", |b| {
            Some(b.capacity.queue.into())
        }),
    ];
    // Writing to memory cannot fail.
    for (name, help, read) in gauges {
        let _ = writeln!(
            out,
            "# HELP baton_worker_{name} {help}\n# TYPE baton_worker_{name} gauge"
        );
        for member in members.workers() {
            let (worker, role) = (&member.beat.worker, member.beat.role.label());
            let Some(value) = read(&member.beat) else {
                continue;
            };
            let _ = writeln!(
                out,
                "baton_worker_{name}{{worker=\"{worker}\",role=\"{role}\"}} {value}"
            );
        }
    }
    let _ = writeln!(
        out,
        "# HELP baton_worker_peers_ready Context workers that KV can be pulled from.\n\
         # TYPE baton_worker_peers_ready gauge"
    );
    for member in members.workers() {
        let (worker, role) = (&member.beat.worker, member.beat.role.label());
        let ready = member.ready().count();
        let _ = writeln!(
            out,
            "baton_worker_peers_ready{{worker=\"{worker}\",role=\"{role}\"}} {ready}"
        );
    }
    let _ = writeln!(
        out,
        "# HELP baton_worker_up Whether it serves.\n# TYPE baton_worker_up gauge"
    );
    for member in members.workers() {
        let (worker, role) = (&member.beat.worker, member.beat.role.label());
        let up = u8::from(member.state(now) == "serving");
        let _ = writeln!(
            out,
            "baton_worker_up{{worker=\"{worker}\",role=\"{role}\"}} {up}"
        );
    }
}
