//! The load of a seed: what is asked, when, and how the client behaves.

use std::time::Duration;

use serde_json::{Value, json};

use super::draw::Draw;

/// Different requests of one load. Each is asked several times, so prefixes are met again, and its answer has to be
/// found out only once.
const ASKS: usize = 20;

/// One request, without what says how it is delivered.
#[derive(Clone, Debug, PartialEq)]
pub struct Ask {
    /// `/v1/completions` or `/v1/chat/completions`.
    pub path: &'static str,
    /// The body, without `model`, `stream` and `stream_options`.
    pub body: Value,
    /// Headers, in which it asks for other times than are promised.
    pub headers: Vec<(&'static str, String)>,
}

/// What the client does with the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    /// Wants it in one piece.
    Whole,
    /// Reads a stream to its end, with usage or without.
    Stream {
        /// `stream_options.include_usage`.
        usage: bool,
    },
    /// Reads a stream, and sleeps after each piece.
    Slow {
        /// How long.
        pause: Duration,
    },
    /// Closes the connection after so many events of a stream.
    LeavesAfter {
        /// How many.
        events: usize,
    },
    /// Closes the connection after this time, whatever came.
    LeavesAt {
        /// Counted from the request.
        after: Duration,
        /// Whether it asked for a stream.
        stream: bool,
    },
}

impl Reader {
    /// Whether it asks for a stream.
    pub fn streams(self) -> bool {
        match self {
            Self::Whole => false,
            Self::LeavesAt { stream, .. } => stream,
            Self::Stream { .. } | Self::Slow { .. } | Self::LeavesAfter { .. } => true,
        }
    }

    /// Whether it asks for the usage at the end of a stream.
    pub fn wants_usage(self) -> bool {
        matches!(self, Self::Stream { usage: true } | Self::Slow { .. })
    }
}

/// One request in its time.
#[derive(Clone, Debug, PartialEq)]
pub struct Arrival {
    /// When, from the beginning of the load.
    pub at: Duration,
    /// Which of [`Load::asks`].
    pub ask: usize,
    /// What the client does.
    pub reader: Reader,
    /// Which API server, by its number.
    pub server: usize,
}

/// All that is asked under one seed.
#[derive(Clone, Debug, PartialEq)]
pub struct Load {
    /// The different requests.
    pub asks: Vec<Ask>,
    /// When each is asked, in order.
    pub arrivals: Vec<Arrival>,
}

impl Load {
    /// The load of this seed: some `rate` requests a second for `span`, spread over `servers` API servers.
    pub fn of(seed: u64, span: Duration, rate: f64, servers: usize) -> Self {
        let mut draw = Draw::new(seed, "asks");
        let asks = (0..ASKS).map(|number| ask(&mut draw, number)).collect();
        let mut draw = Draw::new(seed, "arrivals");
        let mean = Duration::from_secs_f64(1.0 / rate);
        let mut arrivals = Vec::new();
        let mut at = Duration::ZERO;
        loop {
            // now and then several come at once
            if !draw.percent(20) {
                at += draw.time(Duration::ZERO, mean.mul_f64(2.5));
            }
            if at >= span {
                return Self { asks, arrivals };
            }
            arrivals.push(Arrival {
                at,
                ask: draw.index(ASKS),
                reader: reader(&mut draw),
                server: draw.index(servers),
            });
        }
    }
}

fn reader(draw: &mut Draw) -> Reader {
    let ms = Duration::from_millis;
    match draw.number(0, 99) {
        0..30 => Reader::Whole,
        30..75 => Reader::Stream {
            usage: draw.percent(60),
        },
        75..80 => Reader::Slow {
            pause: draw.time(ms(50), ms(400)),
        },
        80..90 => Reader::LeavesAfter {
            events: draw.number(1, 12) as usize,
        },
        _ => Reader::LeavesAt {
            after: draw.time(ms(0), ms(3000)),
            stream: draw.percent(50),
        },
    }
}

/// Prompts of one sentence, and long ones that begin alike: a block of KV has 32 tokens.
fn prompt(draw: &mut Draw, number: usize) -> String {
    let subject = draw.pick(&[
        "the tide",
        "a lamp",
        "the bread",
        "my uncle",
        "a winter",
        "the harbour",
    ]);
    match draw.number(0, 9) {
        0..4 => format!("Story {number} of {subject}:"),
        4..8 => {
            let paragraphs = draw.number(1, 4) as usize;
            format!(
                "{}Now write about {subject} ({number}):",
                SHARED.repeat(paragraphs)
            )
        }
        _ => format!(
            "{number} and {subject} {}",
            "and the sea ".repeat(draw.number(30, 90) as usize)
        ),
    }
}

/// Some sixty tokens.
const SHARED: &str = "You are a patient writer who lives in a small house by the sea. You write in short sentences, you name \
                      things by their names, you never explain a joke, and you stop when the story is over. What follows is \
                      the request of a reader, and he wants to hear of one thing only. ";

fn ask(draw: &mut Draw, number: usize) -> Ask {
    let text = prompt(draw, number);
    let chat = draw.percent(40);
    let mut body = match chat {
        true => json!({"messages": [{"role": "user", "content": text}]}),
        false => json!({"prompt": text}),
    };
    let mut set = |name: &str, value: Value| body[name] = value;
    let (least, most) = draw.weighed(&[(2, (1, 8)), (5, (8, 40)), (2, (40, 90))]);
    set("max_tokens", json!(draw.number(least, most)));
    set("ignore_eos", json!(draw.percent(70)));
    match draw.number(0, 2) {
        0 => set("temperature", json!(0)),
        1 => {
            set("temperature", json!(1));
            set("seed", json!(draw.number(0, 1 << 40)));
        }
        _ => {
            set("temperature", json!(1.3));
            set("seed", json!(draw.number(0, 1 << 40)));
            set("top_p", json!(0.9));
            set("top_k", json!(200));
        }
    }
    if draw.percent(30) {
        set("frequency_penalty", json!(0.7));
        set("presence_penalty", json!(0.3));
        set("repetition_penalty", json!(1.1));
    }
    if draw.percent(50) {
        let alternatives = draw.number(0, 4);
        match chat {
            true => {
                set("logprobs", json!(true));
                set("top_logprobs", json!(alternatives));
            }
            false => set("logprobs", json!(alternatives)),
        }
    }
    if draw.percent(30) {
        set(
            "stop",
            draw.pick(&[json!([" the"]), json!(["\n\n", " and "]), json!(["."])]),
        );
    }
    if draw.percent(20) {
        set("n", json!(draw.number(2, 3)));
    }
    let path = match chat {
        true => "/v1/chat/completions",
        false => "/v1/completions",
    };
    Ask {
        path,
        body,
        headers: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Load, Reader};

    #[test]
    fn a_seed_has_one_load_and_it_is_mixed() {
        let span = Duration::from_secs(60);
        let load = Load::of(3, span, 4.0, 2);
        assert_eq!(load, Load::of(3, span, 4.0, 2));
        assert_ne!(load, Load::of(4, span, 4.0, 2));
        assert!((120..400).contains(&load.arrivals.len()));
        assert!(load.arrivals.is_sorted_by_key(|arrival| arrival.at));
        let has = |wanted: fn(Reader) -> bool| load.arrivals.iter().any(|one| wanted(one.reader));
        assert!(has(|reader| matches!(reader, Reader::Whole)));
        assert!(has(|reader| matches!(reader, Reader::Stream { .. })));
        assert!(has(|reader| matches!(reader, Reader::Slow { .. })));
        assert!(has(|reader| matches!(reader, Reader::LeavesAfter { .. })));
        assert!(has(|reader| matches!(reader, Reader::LeavesAt { .. })));
        for field in [
            "prompt",
            "messages",
            "seed",
            "logprobs",
            "stop",
            "n",
            "frequency_penalty",
        ] {
            assert!(
                load.asks.iter().any(|ask| ask.body.get(field).is_some()),
                "{field}"
            );
        }
    }
}
