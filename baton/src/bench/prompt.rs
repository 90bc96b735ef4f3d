//! Prompts: random, repeatable, and all different from their first word on, so that no prefix cache helps.

use serde_json::json;

use super::BenchArgs;
use super::trace::Traced;

/// Makes requests.
#[derive(Clone)]
pub struct Prompts {
    kind: Kind,
    model: String,
    max_tokens: u32,
    ignore_eos: bool,
    seed: u64,
    /// Tokens of each prompt and answer, if they differ.
    sizes: Vec<(usize, u32)>,
}

#[derive(Clone, Copy)]
enum Kind {
    Words(usize),
    Tokens(usize),
}

/// A path and a body.
pub struct Request {
    /// `/v1/…`
    pub path: &'static str,
    /// JSON.
    pub body: String,
}

/// Token ids of prompts are taken from here: ordinary words in every vocabulary that matters.
const TOKEN_IDS: std::ops::Range<u64> = 1_000..20_000;

const WORDS: [&str; 64] = [
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world",
    "school", "state", "family", "student", "group", "country", "problem", "hand", "part", "place",
    "case", "week", "company", "system", "program", "question", "work", "night", "point", "home",
    "water", "room", "mother", "area", "money", "story", "fact", "month", "lot", "right", "study",
    "book", "eye", "job", "word", "business", "issue", "side", "kind", "head", "house", "service",
    "friend", "father", "power", "hour", "game", "line", "end", "member", "law", "car", "city",
];

impl Prompts {
    /// As the command line asks.
    pub fn new(args: &BenchArgs, model: &str) -> Self {
        Self {
            kind: args
                .prompt_tokens
                .map_or(Kind::Words(args.input_words), Kind::Tokens),
            model: model.to_owned(),
            max_tokens: args.max_tokens,
            ignore_eos: args.ignore_eos,
            seed: args.seed,
            sizes: Vec::new(),
        }
    }

    /// Prompts and answers of these sizes.
    #[must_use]
    pub fn sized(self, trace: &[Traced]) -> Self {
        let sizes = trace
            .iter()
            .map(|request| (request.prompt_tokens, request.max_tokens))
            .collect();
        Self { sizes, ..self }
    }

    /// Tokens that the answer to the request of this number must have; `None` if it may end before.
    pub fn wanted(&self, index: usize) -> Option<u64> {
        let (_, max_tokens) = self.size(index);
        self.ignore_eos.then_some(max_tokens.into())
    }

    /// Its kind of prompt and longest answer.
    fn size(&self, index: usize) -> (Kind, u32) {
        match self.sizes.get(index) {
            Some((prompt, max_tokens)) => (Kind::Tokens(*prompt), *max_tokens),
            None => (self.kind, self.max_tokens),
        }
    }

    /// The same kind of prompts, but others.
    pub fn warmup(&self) -> Self {
        Self {
            seed: !self.seed,
            ..self.clone()
        }
    }

    /// The request of this number.
    pub fn request(&self, index: usize) -> Request {
        let mut random = Random::new(
            self.seed
                .wrapping_mul(0x9e37_79b9)
                .wrapping_add(index as u64),
        );
        let (kind, max_tokens) = self.size(index);
        let (path, mut body) = match kind {
            Kind::Words(count) => {
                let words: Vec<_> = (0..count)
                    .map(|_| WORDS[(random.next() % WORDS.len() as u64) as usize])
                    .collect();
                let content = words.join(" ");
                (
                    "/v1/chat/completions",
                    json!({"messages": [{"role": "user", "content": content}]}),
                )
            }
            Kind::Tokens(count) => {
                let width = TOKEN_IDS.end - TOKEN_IDS.start;
                let ids: Vec<_> = (0..count)
                    .map(|_| TOKEN_IDS.start + random.next() % width)
                    .collect();
                ("/v1/completions", json!({"prompt": ids}))
            }
        };
        body["model"] = self.model.as_str().into();
        body["stream"] = true.into();
        body["stream_options"] = json!({"include_usage": true});
        body["max_tokens"] = max_tokens.into();
        body["temperature"] = 0.into();
        if self.ignore_eos {
            body["ignore_eos"] = true.into();
        }
        Request {
            path,
            body: body.to_string(),
        }
    }
}

/// SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
pub struct Random(u64);

impl Random {
    /// The sequence of this seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// 64 random bits.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// From 0 on, below 1.
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn prompts(kind: Kind) -> Prompts {
        Prompts {
            kind,
            model: "m".to_owned(),
            max_tokens: 3,
            ignore_eos: true,
            seed: 1,
            sizes: Vec::new(),
        }
    }

    #[test]
    fn prompts_have_their_size_differ_and_repeat() {
        let words = prompts(Kind::Words(50));
        let text = |prompts: &Prompts, index| {
            let body: Value = serde_json::from_str(&prompts.request(index).body).unwrap();
            body["messages"][0]["content"].as_str().unwrap().to_owned()
        };
        assert_eq!(text(&words, 0).split(' ').count(), 50);
        assert_eq!(text(&words, 0), text(&words, 0));
        assert_ne!(text(&words, 0), text(&words, 1));
        assert_ne!(text(&words, 0), text(&words.warmup(), 0));
        let body: Value = serde_json::from_str(&prompts(Kind::Tokens(7)).request(0).body).unwrap();
        assert_eq!(body["prompt"].as_array().unwrap().len(), 7);
        assert_eq!(
            (&body["max_tokens"], &body["ignore_eos"]),
            (&3.into(), &true.into())
        );
    }
}
