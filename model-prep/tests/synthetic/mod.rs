//! A GGUF file made by hand: a Llama of one layer with a weight in every number format.

use half::{bf16, f16};

/// A metadata value.
#[derive(Clone)]
pub enum Meta {
    U32(u32),
    F32(f32),
    Text(&'static str),
    Texts(Vec<&'static str>),
    I32s(Vec<i32>),
    /// Type number and bytes as they are.
    Raw(u32, Vec<u8>),
}

/// A tensor of the table; `dims` has the fastest dimension first.
#[derive(Clone)]
pub struct Entry {
    pub name: &'static str,
    pub dims: Vec<u64>,
    pub format: u32,
    pub offset: u64,
}

/// A file in parts, to be spoilt before it is put together.
#[derive(Clone)]
pub struct Gguf {
    pub metadata: Vec<(&'static str, Meta)>,
    pub entries: Vec<Entry>,
    pub data: Vec<u8>,
}

pub const HIDDEN: usize = 32;
pub const INTERMEDIATE: usize = 256;
pub const VOCAB: usize = 12;
/// Two query heads and one key/value head of this size.
pub const HEAD_DIM: usize = 16;

impl Gguf {
    /// Row `r` of a matrix holds `r % 16` or, in Q6_K, 5; queries and keys are in the converter's order.
    pub fn tiny() -> Self {
        let metadata = vec![
            ("general.architecture", Meta::Text("llama")),
            ("llama.block_count", Meta::U32(1)),
            ("llama.context_length", Meta::U32(64)),
            ("llama.embedding_length", Meta::U32(HIDDEN as u32)),
            ("llama.feed_forward_length", Meta::U32(INTERMEDIATE as u32)),
            ("llama.attention.head_count", Meta::U32(2)),
            ("llama.attention.head_count_kv", Meta::U32(1)),
            ("llama.attention.layer_norm_rms_epsilon", Meta::F32(1e-5)),
            ("tokenizer.ggml.model", Meta::Text("gpt2")),
            ("tokenizer.ggml.pre", Meta::Text("gpt-2")),
            (
                "tokenizer.ggml.tokens",
                Meta::Texts(vec!["a", "b", "c", "ab", "abc", "</s>"]),
            ),
            (
                "tokenizer.ggml.token_type",
                Meta::I32s(vec![1, 1, 1, 1, 1, 3]),
            ),
            ("tokenizer.ggml.merges", Meta::Texts(vec!["a b", "ab c"])),
            ("tokenizer.ggml.eos_token_id", Meta::U32(5)),
            ("tokenizer.chat_template", Meta::Text("{{ messages }}")),
        ];
        let mut gguf = Gguf {
            metadata,
            entries: Vec::new(),
            data: Vec::new(),
        };
        let ones = |n: usize| 1f32.to_le_bytes().repeat(n);
        gguf.add("token_embd.weight", &[HIDDEN, VOCAB], 8, rows(VOCAB, q8_0));
        gguf.add("blk.0.attn_norm.weight", &[HIDDEN], 0, ones(HIDDEN));
        gguf.add(
            "blk.0.attn_q.weight",
            &[HIDDEN, 32],
            1,
            permuted_rows(2, |v| f16::from_f32(v).to_le_bytes()),
        );
        gguf.add(
            "blk.0.attn_k.weight",
            &[HIDDEN, 16],
            30,
            permuted_rows(1, |v| bf16::from_f32(v).to_le_bytes()),
        );
        gguf.add("blk.0.attn_v.weight", &[HIDDEN, 16], 8, rows(16, q8_0));
        gguf.add(
            "blk.0.attn_output.weight",
            &[HIDDEN, HIDDEN],
            2,
            rows(HIDDEN, q4_0),
        );
        gguf.add("blk.0.ffn_norm.weight", &[HIDDEN], 0, ones(HIDDEN));
        gguf.add(
            "blk.0.ffn_gate.weight",
            &[HIDDEN, INTERMEDIATE],
            2,
            rows(INTERMEDIATE, q4_0),
        );
        gguf.add(
            "blk.0.ffn_up.weight",
            &[HIDDEN, INTERMEDIATE],
            3,
            rows(INTERMEDIATE, q4_1),
        );
        gguf.add(
            "blk.0.ffn_down.weight",
            &[INTERMEDIATE, HIDDEN],
            14,
            rows(HIDDEN, q6_k),
        );
        gguf.add("output_norm.weight", &[HIDDEN], 0, ones(HIDDEN));
        gguf
    }

    fn add(&mut self, name: &'static str, dims: &[usize], format: u32, bytes: Vec<u8>) {
        let dims = dims.iter().map(|&n| n as u64).collect();
        self.entries.push(Entry {
            name,
            dims,
            format,
            offset: self.data.len() as u64,
        });
        self.data.extend(bytes);
        self.data.resize(self.data.len().next_multiple_of(32), 0);
    }

    pub fn set(&mut self, key: &'static str, value: Meta) {
        self.metadata.retain(|(k, _)| *k != key);
        self.metadata.push((key, value));
    }

    pub fn entry(&mut self, name: &str) -> &mut Entry {
        self.entries.iter_mut().find(|e| e.name == name).unwrap()
    }

    /// Magic, version, counts, metadata and tensor table, without padding.
    pub fn header(&self) -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend((self.entries.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            text(&mut out, key);
            let (kind, bytes) = encoded(value);
            out.extend(kind.to_le_bytes());
            out.extend(bytes);
        }
        for entry in &self.entries {
            text(&mut out, entry.name);
            out.extend((entry.dims.len() as u32).to_le_bytes());
            entry.dims.iter().for_each(|n| out.extend(n.to_le_bytes()));
            out.extend(entry.format.to_le_bytes());
            out.extend(entry.offset.to_le_bytes());
        }
        out
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = self.header();
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(&self.data);
        out
    }
}

fn encoded(value: &Meta) -> (u32, Vec<u8>) {
    let mut out = Vec::new();
    let kind = match value {
        Meta::U32(n) => {
            out.extend(n.to_le_bytes());
            4
        }
        Meta::F32(x) => {
            out.extend(x.to_le_bytes());
            6
        }
        Meta::Text(string) => {
            text(&mut out, string);
            8
        }
        Meta::Texts(strings) => {
            out.extend(8u32.to_le_bytes());
            out.extend((strings.len() as u64).to_le_bytes());
            strings.iter().for_each(|s| text(&mut out, s));
            9
        }
        Meta::I32s(numbers) => {
            out.extend(5u32.to_le_bytes());
            out.extend((numbers.len() as u64).to_le_bytes());
            numbers.iter().for_each(|n| out.extend(n.to_le_bytes()));
            9
        }
        Meta::Raw(kind, bytes) => {
            out.extend(bytes);
            *kind
        }
    };
    (kind, out)
}

fn text(out: &mut Vec<u8>, string: &str) {
    out.extend((string.len() as u64).to_le_bytes());
    out.extend(string.as_bytes());
}

fn rows(count: usize, block: impl Fn(u8) -> Vec<u8>) -> Vec<u8> {
    (0..count).flat_map(|row| block((row % 16) as u8)).collect()
}

/// Rows of whole heads as the converter stores them: 0, d/2, 1, d/2 + 1, … of each.
fn permuted_rows(heads: usize, number: impl Fn(f32) -> [u8; 2]) -> Vec<u8> {
    let order = [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15];
    let stored = (0..heads).flat_map(|head| order.map(|row| head * HEAD_DIM + row));
    stored
        .flat_map(|row| number(row as f32).repeat(HIDDEN))
        .collect()
}

fn half(value: f32) -> [u8; 2] {
    f16::from_f32(value).to_le_bytes()
}

fn q8_0(value: u8) -> Vec<u8> {
    half(1.0).into_iter().chain([value; 32]).collect()
}

/// `(q - 8) * 1`, so a row of `value` holds `value - 8`.
fn q4_0(value: u8) -> Vec<u8> {
    half(1.0)
        .into_iter()
        .chain([value | (value << 4); 16])
        .collect()
}

fn q4_1(value: u8) -> Vec<u8> {
    [half(1.0), half(0.0)]
        .concat()
        .into_iter()
        .chain([value | (value << 4); 16])
        .collect()
}

/// 37 - 32 everywhere.
fn q6_k(_: u8) -> Vec<u8> {
    let parts = [
        vec![0x55; 128],
        vec![0b10_10_10_10; 64],
        vec![1; 16],
        half(1.0).to_vec(),
    ];
    parts.concat()
}
