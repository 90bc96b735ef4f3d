//! FP8 as another implementation makes it: rows quantized and dequantized by ml_dtypes 0.6.0 and NumPy.
//!
//! `data/e4m3.json` holds rows of normal, heavy-tailed, even, tiny, huge and zero numbers, little-endian in hexadecimal
//! digits: `w` in bfloat16, `scale = max|w| / float32(448)` (1 for zeros), `codes = float8_e4m3fn(float32(w) / scale)`
//! and `back = bfloat16(float32(codes) * scale)`.

use baton_model::{dequantize_row, quantize_row};
use serde::Deserialize;

#[derive(Deserialize)]
struct Row {
    bf16: String,
    scale: String,
    codes: String,
    back: String,
}

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
        .collect()
}

#[test]
fn rows_are_quantized_as_ml_dtypes_does() {
    let rows: Vec<Row> = serde_json::from_str(include_str!("data/e4m3.json")).unwrap();
    assert_eq!(rows.len(), 17);
    for row in rows {
        let mut codes = Vec::new();
        let scale = quantize_row(&bytes(&row.bf16), &mut codes);
        assert_eq!(scale.to_le_bytes(), *bytes(&row.scale));
        assert_eq!(codes, bytes(&row.codes));
        let mut back = Vec::new();
        dequantize_row(&codes, |_| scale, &mut back);
        assert_eq!(back, bytes(&row.back));
    }
}
