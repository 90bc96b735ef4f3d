//! What real schemas cost, and whether what is valid by them is what may come.
//!
//!     cargo bench -p baton-grammar --bench schemas -- TOKENIZER_JSON VOCAB DIRECTORY [EVERY]
//!
//! The directory holds files of JSON Schema Bench's `maskbench/data` (github.com/guidance-ai/jsonschemabench): a `schema`, and
//! `tests` with `data` that is `valid` or not. Of each `EVERY`-th schema the time to compile it is taken, and of its valid texts, cut into
//! the longest tokens of the vocabulary, the time of each mask. Nothing is sampled: a text follows the schema or it does not.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::time::Instant;

use baton_grammar::Compiler;
use baton_protocol::Grammar;
use serde_json::Value;

/// Tokens of a text whose masks are made.
const TOKENS_MAX: usize = 500;
/// An id that may end a text, which no text has.
const END: u32 = 0;

fn main() {
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| a != "--bench")
        .collect();
    let [tokenizer, vocab, directory, rest @ ..] = &arguments[..] else {
        println!(
            "nothing to measure: name a tokenizer.json, its vocabulary's size and a directory of schemas"
        );
        return;
    };
    let every = rest
        .first()
        .map_or(1, |every| every.parse().expect("a number"));
    let json = std::fs::read(tokenizer).expect("a tokenizer.json");
    let began = Instant::now();
    let compiler = Compiler::new(&json, vocab.parse().expect("a number")).expect("a tokenizer");
    println!(
        "vocabulary of {vocab}: ready in {:.0} ms",
        began.elapsed().as_secs_f64() * 1e3
    );
    let longest = Longest::new(&json);

    let mut files: Vec<PathBuf> = std::fs::read_dir(directory)
        .expect("a directory")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    files.sort();
    let mut sets: BTreeMap<String, Figures> = BTreeMap::new();
    for file in files.iter().step_by(every) {
        let name = file
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        let set = name.split("---").next().unwrap_or_default();
        let set = set.split('_').take(2).collect::<Vec<_>>().join("_");
        let figures = sets.entry(set).or_default();
        figures.take(&compiler, &longest, file);
    }
    let mut all = Figures::default();
    println!(
        "set | schemas | compiled | valid texts followed | invalid texts refused | compile ms p50, p99, max | mask µs p50, p99, max"
    );
    for (name, figures) in sets {
        println!("{name} | {}", figures.line());
        all.add(figures);
    }
    println!("all | {}", all.line());
    let mut refusals: Vec<(usize, String)> =
        all.refusals.into_iter().map(|(k, v)| (v, k)).collect();
    refusals.sort();
    for (count, why) in refusals.iter().rev().take(12) {
        println!("{count} schemas: {why}");
    }
}

#[derive(Default)]
struct Figures {
    schemas: usize,
    compiled: usize,
    /// Texts, and how many of them came out as they should.
    valid: (usize, usize),
    invalid: (usize, usize),
    compile_ms: Vec<f64>,
    mask_us: Vec<f64>,
    refusals: HashMap<String, usize>,
}

impl Figures {
    fn take(&mut self, compiler: &Compiler, longest: &Longest, file: &Path) {
        let Ok(text) = std::fs::read(file) else {
            return;
        };
        let Ok(json) = serde_json::from_slice::<Value>(&text) else {
            return;
        };
        self.schemas += 1;
        let grammar = Grammar::JsonSchema(json["schema"].to_string());
        let began = Instant::now();
        let compiled = compiler.compile(&grammar, &[END]);
        self.compile_ms.push(began.elapsed().as_secs_f64() * 1e3);
        let start = match compiled {
            Ok(matcher) => matcher,
            Err(error) => {
                let why: String = error.to_string().chars().take(110).collect();
                *self.refusals.entry(why).or_default() += 1;
                return;
            }
        };
        self.compiled += 1;
        for test in json["tests"].as_array().into_iter().flatten() {
            let is_valid = test["valid"] == true;
            let text = test["data"].to_string();
            let tokens = longest.cut(text.as_bytes());
            let mut matcher = start.branch();
            let mut follows = true;
            for token in tokens.iter().take(TOKENS_MAX) {
                let began = Instant::now();
                let Ok(mask) = matcher.mask() else {
                    follows = false;
                    break;
                };
                if is_valid {
                    self.mask_us.push(began.elapsed().as_secs_f64() * 1e6);
                }
                let allowed = mask[*token as usize / 32] >> (token % 32) & 1 == 1;
                if !allowed || matcher.accept(*token).is_err() {
                    follows = false;
                    break;
                }
            }
            if follows && tokens.len() <= TOKENS_MAX && !matcher.is_whole() {
                follows = matcher.mask().is_ok_and(|mask| mask[0] & 1 == 1);
            }
            let counts = if is_valid {
                &mut self.valid
            } else {
                &mut self.invalid
            };
            counts.0 += 1;
            counts.1 += usize::from(follows == is_valid);
        }
    }

    fn add(&mut self, other: Self) {
        self.schemas += other.schemas;
        self.compiled += other.compiled;
        for (mine, theirs) in [
            (&mut self.valid, other.valid),
            (&mut self.invalid, other.invalid),
        ] {
            mine.0 += theirs.0;
            mine.1 += theirs.1;
        }
        self.compile_ms.extend(other.compile_ms);
        self.mask_us.extend(other.mask_us);
        for (why, count) in other.refusals {
            *self.refusals.entry(why).or_default() += count;
        }
    }

    fn line(&self) -> String {
        let share = |part: usize, of: usize| 100.0 * part as f64 / of.max(1) as f64;
        format!(
            "{} | {:.1}% | {:.1}% of {} | {:.1}% of {} | {} | {}",
            self.schemas,
            share(self.compiled, self.schemas),
            share(self.valid.1, self.valid.0),
            self.valid.0,
            share(self.invalid.1, self.invalid.0),
            self.invalid.0,
            percentiles(&self.compile_ms),
            percentiles(&self.mask_us),
        )
    }
}

fn percentiles(values: &[f64]) -> String {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let at = |share: f64| {
        let last = values.len().saturating_sub(1);
        values
            .get((last as f64 * share) as usize)
            .copied()
            .unwrap_or(0.0)
    };
    format!("{:.2}, {:.2}, {:.2}", at(0.5), at(0.99), at(1.0))
}

/// The vocabulary, to cut texts into tokens: the longest that fits, again and again.
struct Longest {
    ids: HashMap<Vec<u8>, u32>,
    bytes_max: usize,
}

impl Longest {
    fn new(tokenizer_json: &[u8]) -> Self {
        let json: Value = serde_json::from_slice(tokenizer_json).expect("JSON");
        let tokens = llguidance::token_bytes_from_tokenizer_json(&json).expect("a tokenizer");
        let plain = (0..)
            .zip(tokens)
            .filter(|(_, bytes)| !bytes.is_empty() && bytes[0] != 0xff);
        let ids: HashMap<Vec<u8>, u32> = plain
            .map(|(id, bytes)| (bytes, id))
            .filter(|(_, id)| *id != END)
            .collect();
        let bytes_max = ids.keys().map(Vec::len).max().unwrap_or(1);
        Self { ids, bytes_max }
    }

    fn cut(&self, mut text: &[u8]) -> Vec<u32> {
        let mut tokens = Vec::new();
        while !text.is_empty() {
            let lengths = (1..=self.bytes_max.min(text.len())).rev();
            let found = lengths
                .filter_map(|len| Some((*self.ids.get(&text[..len])?, len)))
                .next();
            let (token, len) = found.unwrap_or((1, 1));
            tokens.push(token);
            text = &text[len..];
        }
        tokens
    }
}
