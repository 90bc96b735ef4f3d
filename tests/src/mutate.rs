//! Real messages, altered: what a broken or hostile sender may put on the bus.

use serde_json::{Map, Value, json};

/// Alters messages; the same seed makes the same ones.
#[derive(Debug)]
pub struct Mutator(u64);

impl Mutator {
    /// A series of its own for each seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// One of the first `count` numbers.
    pub fn below(&mut self, count: usize) -> usize {
        // SplitMix64 (Steele, Lea, Flood 2014).
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % count.max(1) as u64) as usize
    }

    /// The message with one to three fields dropped, doubled or given a value that is odd; now and then its bytes are cut
    /// or spoilt too.
    pub fn bytes(&mut self, message: &Value) -> Vec<u8> {
        let mut message = message.clone();
        for _ in 0..=self.below(3) {
            self.alter(&mut message);
        }
        let mut bytes = message.to_string().into_bytes();
        match self.below(16) {
            0 => bytes.truncate(self.below(bytes.len())),
            1 if !bytes.is_empty() => {
                let at = self.below(bytes.len());
                bytes[at] ^= 1 << self.below(8);
            }
            _ => {}
        }
        bytes
    }

    /// Goes down to a place somewhere in the value and alters it.
    fn alter(&mut self, value: &mut Value) {
        match value {
            Value::Object(fields) if !fields.is_empty() && self.below(8) > 0 => self.field(fields),
            Value::Array(items) if !items.is_empty() && self.below(4) > 0 => {
                let at = self.below(items.len());
                match self.below(4) {
                    0 => drop(items.remove(at)),
                    1 => {
                        let item = items[at].clone();
                        items.extend(std::iter::repeat_n(item, 500));
                    }
                    _ => self.alter(&mut items[at]),
                }
            }
            value => *value = self.odd(),
        }
    }

    fn field(&mut self, fields: &mut Map<String, Value>) {
        let names: Vec<String> = fields.keys().cloned().collect();
        let name = &names[self.below(names.len())];
        match self.below(8) {
            0 => drop(fields.remove(name)),
            1 => {
                let other = fields[&names[self.below(names.len())]].clone();
                fields.insert(name.clone(), other);
            }
            2 => drop(fields.insert("unknown".to_owned(), self.odd())),
            _ => self.alter(&mut fields[name]),
        }
    }

    fn odd(&mut self) -> Value {
        let values = [
            json!(null),
            json!(true),
            json!(0),
            json!(-1),
            json!(1),
            json!(u32::MAX),
            json!(u64::from(u32::MAX) + 1),
            json!(u64::MAX),
            json!(i64::MIN),
            json!(1e300),
            json!(-0.5),
            json!(""),
            json!("x".repeat(5_000)),
            json!("../*.>"),
            json!("0".repeat(16)),
            json!("f".repeat(32)),
            json!("AAAAAP////8="),
            json!("ready"),
            json!([]),
            json!([[[]]]),
            json!({}),
            json!({"first": u32::MAX, "count": u32::MAX}),
        ];
        values[self.below(values.len())].clone()
    }
}
