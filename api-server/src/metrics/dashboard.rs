//! What the dashboard, the rules, the page and the docs say of metrics, against what is exposed.

use std::collections::{BTreeMap, BTreeSet};

use baton_protocol::Role;
use baton_traces::Tracer;
use serde_json::Value;
use tokio::time::Instant;

use super::Metrics;
use crate::fleet::membership::Membership;
use crate::fleet::membership::tests::beat;

const DASHBOARD: &str = include_str!("../../../container/dashboard/baton.json");
const RULES: [&str; 2] = [
    include_str!("../../../container/dashboard/baton.rules.yml"),
    include_str!("../../../container/dashboard/baton.rules.test.yml"),
];
const OPERATING: &str = include_str!("../../../docs/operating.md");

/// What the page at `/` reads, in series written as Prometheus writes them.
const PAGE: &str = include_str!("../../../page/src/load/charts.ts");

/// Labels that Prometheus adds, and the one that says which alert is meant.
const ADDED: [&str; 3] = ["job", "instance", "alertname"];

type Exposed = BTreeMap<String, BTreeSet<String>>;

/// Every sample's name that `/metrics` may have, with its labels' names.
fn exposed() -> Exposed {
    let metrics = Metrics::new().unwrap();
    // What was never counted is not written.
    for counters in [
        &metrics.requests_total,
        &metrics.errors_total,
        &metrics.retries_total,
        &metrics.bus_faults_total,
        &metrics.tokens_total,
        &metrics.prefix_pull_failures_total,
    ] {
        counters.with_label_values(&["x"]).inc();
    }
    for counters in [
        &metrics.service_level_total,
        &metrics.service_level_missed_total,
    ] {
        counters.with_label_values(&["x", "y"]).inc();
    }
    let parts = &metrics.kv_handover_part_seconds;
    parts.with_label_values(&["x"]).observe(1.0);
    let (mut members, now) = (Membership::default(), Instant::now());
    let mut told = beat("d", Role::Decode, &["c"]);
    // What was never measured is not written either.
    told.cost_error = Some(0.05);
    members.beat(told, now);
    let text = metrics
        .render(&members, (1, 1), &Tracer::off(), now)
        .unwrap();
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    let mut exposed = Exposed::new();
    for sample in samples {
        let (series, _value) = sample.rsplit_once(' ').unwrap();
        let (name, labels) = series.split_once('{').unwrap_or((series, ""));
        exposed
            .entry(name.to_owned())
            .or_default()
            .extend(matched(labels));
    }
    exposed
}

/// Names of the labels in what stands between braces.
fn matched(inside: &str) -> Vec<String> {
    let parts: Vec<_> = inside.split('"').collect();
    // Every second part is a value; what is not in quotes, only in the end.
    let names = parts.iter().step_by(2).filter_map(|part| {
        let name = part.trim_end_matches(['=', '~', '!']);
        (name.len() < part.len()).then(|| name.trim_matches([',', ' ']).to_owned())
    });
    names.collect()
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == ':'
}

/// What of a text is not as it is exposed, or recorded by the rules.
fn wrong(text: &str, exposed: &Exposed) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut rest = text;
    while let Some(at) = ["baton_", "baton:"]
        .iter()
        .filter_map(|it| rest.find(it))
        .min()
    {
        let from = &rest[at..];
        let end = from.find(|c| !is_word(c)).unwrap_or(from.len());
        let name = &from[..end];
        rest = &from[end..];
        let recorded = name.contains(':');
        let labels = exposed.get(name);
        let known = match recorded {
            true => RULES[0].contains(&format!("record: {name}\n")),
            false => labels.is_some(),
        };
        if !known {
            wrong.push(format!("{name} is not exposed"));
        }
        let inside = rest.strip_prefix('{').and_then(|it| it.split_once('}'));
        for label in inside
            .map(|(inside, _)| matched(inside))
            .unwrap_or_default()
        {
            let has = ADDED.contains(&label.as_str())
                || recorded
                || labels.is_some_and(|labels| labels.contains(&label));
            if !has {
                wrong.push(format!("{name} has no label {label}"));
            }
        }
    }
    // What is summed by is a label of something.
    for by in text.split("by (").skip(1) {
        let (names, _) = by.split_once(')').unwrap();
        for name in names.split(',').map(str::trim) {
            let has = ADDED.contains(&name) || exposed.values().any(|labels| labels.contains(name));
            if !has {
                wrong.push(format!("there is no label {name}"));
            }
        }
    }
    wrong
}

fn all<'a>(value: &'a Value, field: &str, found: &mut Vec<&'a Value>) {
    match value {
        Value::Object(fields) => {
            found.extend(fields.get(field));
            fields.values().for_each(|value| all(value, field, found));
        }
        Value::Array(list) => list.iter().for_each(|value| all(value, field, found)),
        _ => {}
    }
}

fn found<'a>(value: &'a Value, field: &str) -> Vec<&'a Value> {
    let mut list = Vec::new();
    all(value, field, &mut list);
    list
}

#[test]
fn the_dashboard_and_the_rules_ask_for_what_is_exposed() {
    let (exposed, dashboard) = (exposed(), serde_json::from_str(DASHBOARD).unwrap());
    let mut expressions = found(&dashboard, "expr");
    expressions.extend(found(&dashboard, "query"));
    let expressions: Vec<_> = expressions.iter().filter_map(|it| it.as_str()).collect();
    assert!(expressions.len() > 30);
    for text in expressions.into_iter().chain(RULES) {
        let wrong = wrong(text, &exposed);
        assert!(wrong.is_empty(), "{wrong:?} in {text}");
    }
}

#[test]
fn the_page_reads_what_is_exposed() {
    let names = PAGE.matches("baton_").count();
    assert!(names >= 10, "{names} names in the page's charts");
    let wrong = wrong(PAGE, &exposed());
    assert!(wrong.is_empty(), "{wrong:?} in page/src/load/charts.ts");
}

#[test]
fn what_is_not_exposed_is_found() {
    let exposed = exposed();
    for (text, said) in [
        (
            "rate(baton_requests{a=\"b\"}[5m])",
            "baton_requests is not exposed",
        ),
        (
            "baton_tokens_total{type=\"prompt\"}",
            "baton_tokens_total has no label type",
        ),
        (
            "baton_worker_up{role=~\"a\", tier!=\"b\"}",
            "baton_worker_up has no label tier",
        ),
        (
            "sum by (queue) (baton_worker_up)",
            "there is no label queue",
        ),
        ("baton:of_nothing", "baton:of_nothing is not exposed"),
    ] {
        assert!(wrong(text, &exposed).contains(&said.to_owned()), "{text}");
    }
    assert!(
        wrong(
            "sum by (le) (baton_ttft_seconds_bucket{le=\"1\"})",
            &exposed
        )
        .is_empty()
    );
}

/// Every family is on the dashboard or needs no picture, and stands in the docs.
#[test]
fn what_is_exposed_is_described() {
    for name in exposed().keys() {
        let ends = ["_bucket", "_sum", "_count"];
        let family = ends.iter().find_map(|end| name.strip_suffix(end));
        let family = family.unwrap_or(name);
        assert!(
            [format!("`{family}`"), format!("`{family}{{")]
                .iter()
                .any(|name| OPERATING.contains(name)),
            "docs/operating.md says nothing of {family}"
        );
    }
}

#[test]
fn each_panel_can_be_told_apart_and_says_what_it_shows() {
    let dashboard: Value = serde_json::from_str(DASHBOARD).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let mut ids = BTreeSet::new();
    let mut taken = BTreeSet::new();
    for panel in panels {
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{panel}");
        assert!(panel["title"].as_str().is_some_and(|it| !it.is_empty()));
        // No two lie over each other.
        let place = |field: &str| panel["gridPos"][field].as_u64().unwrap();
        for x in place("x")..place("x") + place("w") {
            assert!(x < 24, "{panel}");
            for y in place("y")..place("y") + place("h") {
                assert!(taken.insert((x, y)), "{panel}");
            }
        }
        if panel["type"] != "row" {
            let described = panel["description"].as_str();
            assert!(described.is_some_and(|it| it.len() > 10), "{panel}");
            assert!(!panel["targets"].as_array().unwrap().is_empty(), "{panel}");
        }
    }
    // Where the numbers come from is chosen above, once.
    for source in found(&dashboard, "datasource") {
        assert_eq!(source["uid"], "${datasource}", "{source}");
    }
}
