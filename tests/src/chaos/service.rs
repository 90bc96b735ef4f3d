//! What a cluster promises, and how requests ask to be served: by classes, and with other times.

use std::fmt;

use serde_json::{Value, json};

use super::draw::Draw;
use super::load::{Ask, Load};

/// What steps of the fake device take where something is promised: routers choose by it.
const FAKE_COST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/chaos/fake_cost.json");

/// What a deployment promises, and what becomes of requests for which that cannot be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Promised {
    /// Milliseconds to the first token.
    pub ttft_ms: u64,
    /// Milliseconds between tokens.
    pub itl_ms: u64,
    /// `refuse` or `batch`.
    pub overload: &'static str,
}

impl Promised {
    /// What the cluster of this seed promises on this device, if anything: short times and long ones.
    pub fn of(seed: u64, device: &str) -> Option<Self> {
        let mut draw = Draw::new(seed, "service");
        let fast = device == "fake";
        draw.percent(50).then(|| Self {
            ttft_ms: draw.pick(if fast {
                &[20, 100, 1_000]
            } else {
                &[300, 1_500, 10_000]
            }),
            itl_ms: draw.pick(if fast {
                &[2, 10, 100]
            } else {
                &[40, 200, 1_000]
            }),
            overload: draw.pick(&["refuse", "batch"]),
        })
    }

    /// Flags of every worker.
    pub fn worker_args(self, device: &str) -> Vec<String> {
        let mut args = vec!["--itl-ms".to_owned(), self.itl_ms.to_string()];
        if device == "fake" {
            args.extend(["--fake-cost".to_owned(), FAKE_COST.to_owned()]);
        }
        args
    }

    /// Flags of every API server.
    pub fn api_args(self) -> Vec<String> {
        let Self {
            ttft_ms,
            itl_ms,
            overload,
        } = self;
        let args = format!("--ttft-ms {ttft_ms} --itl-ms {itl_ms} --overload {overload}");
        args.split(' ').map(str::to_owned).collect()
    }

    /// Headers that ask for other times within the bounds.
    fn headers(self, draw: &mut Draw) -> Vec<(&'static str, String)> {
        let times = draw.pick(&[1, 5, 30, 100]);
        vec![
            (
                "x-baton-ttft-ms",
                (self.ttft_ms * times).div_ceil(10).to_string(),
            ),
            (
                "x-baton-itl-ms",
                (self.itl_ms * times).div_ceil(10).to_string(),
            ),
        ]
    }
}

impl fmt::Display for Promised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            ttft_ms,
            itl_ms,
            overload,
        } = self;
        write!(f, "{ttft_ms} ms and {itl_ms} ms promised, else {overload}")
    }
}

impl Load {
    /// Has requests ask for classes, and for other times where any are promised. The first asks for nothing: it is asked when all is quiet.
    pub fn with_classes(mut self, seed: u64, promised: Option<Promised>) -> Self {
        let mut draw = Draw::new(seed, "classes");
        for ask in self.asks.iter_mut().skip(1) {
            let tier = draw.weighed(&[
                (5, None),
                (2, Some("flex")),
                (1, Some("default")),
                (1, Some("priority")),
            ]);
            set(ask, "service_tier", tier.map(Value::from));
            let priority = draw.weighed(&[(3, None), (1, Some(-5)), (1, Some(5))]);
            set(ask, "priority", priority.map(|priority| json!(priority)));
            let asks_for_times = draw.percent(30);
            let headers = promised.filter(|_| asks_for_times);
            ask.headers = headers
                .map(|promised| promised.headers(&mut draw))
                .unwrap_or_default();
        }
        self
    }
}

fn set(ask: &mut Ask, field: &str, value: Option<Value>) {
    if let Some(value) = value {
        ask.body[field] = value;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::Promised;
    use crate::chaos::load::Load;
    use crate::chaos::shape::Shape;

    #[test]
    fn seeds_promise_something_or_nothing_and_requests_ask_for_all_there_is() {
        for device in ["cpu", "fake"] {
            let all: Vec<_> = (0..60).map(|seed| Promised::of(seed, device)).collect();
            let some = all.iter().flatten();
            assert!((15..45).contains(&some.clone().count()));
            for overload in ["refuse", "batch"] {
                assert!(some.clone().any(|promised| promised.overload == overload));
            }
            let several = (0..60).filter(|seed| Shape::of(*seed, device).both > 1);
            assert!((10..30).contains(&several.count()));
        }
        let promised = (0..).find_map(|seed| Promised::of(seed, "cpu"));
        let load = Load::of(3, Duration::from_secs(9), 2.0, 1).with_classes(3, promised);
        for field in ["service_tier", "priority"] {
            let has = load.asks.iter().filter(|ask| ask.body.get(field).is_some());
            assert!((3..18).contains(&has.count()), "{field}");
        }
        assert!(load.asks.iter().any(|ask| !ask.headers.is_empty()));
        assert!(load.asks[0].headers.is_empty());
    }
}
