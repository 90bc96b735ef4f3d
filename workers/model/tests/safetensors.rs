//! Safetensors files: what the reference implementation writes is read and the other way round; what is
//! cut off, changed or hostile is refused in a sentence that names the file and, where known, the tensor.

use std::fs;
use std::path::PathBuf;

use baton_model::{Dtype, SafetensorsFile, header_bytes};
use proptest::prelude::*;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype as ReferenceDtype, TensorView};
use tempfile::TempDir;

struct Bench {
    _directory: TempDir,
    file: PathBuf,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("weights.safetensors");
        Bench {
            _directory: directory,
            file,
        }
    }

    fn open(&self, bytes: &[u8]) -> Result<SafetensorsFile, String> {
        fs::write(&self.file, bytes).unwrap();
        SafetensorsFile::open(&self.file).map_err(|error| {
            let error = error.to_string();
            assert!(
                error.contains("weights.safetensors"),
                "no file is named: {error}"
            );
            error
        })
    }
}

/// Three tensors, one of each format; returns the file and the length of its header.
fn small() -> (Vec<u8>, usize) {
    let tensors = [
        ("first".to_owned(), Dtype::Bf16, vec![3, 4]),
        ("second".to_owned(), Dtype::F32, vec![5]),
        ("third".to_owned(), Dtype::F16, vec![2, 2]),
    ];
    let mut bytes = header_bytes(&tensors);
    let header = bytes.len();
    bytes.extend((0..24 + 20 + 8).map(|n| n as u8));
    (bytes, header)
}

fn raw(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

#[test]
fn the_reference_reads_what_we_write() {
    let (bytes, header) = small();
    assert_eq!(header % 64, 0);
    let reference = SafeTensors::deserialize(&bytes).unwrap();
    let first = reference.tensor("first").unwrap();
    assert_eq!(
        (first.dtype(), first.shape()),
        (ReferenceDtype::BF16, &[3, 4][..])
    );
    assert_eq!(first.data(), &bytes[header..header + 24]);
    assert_eq!(
        reference.tensor("third").unwrap().data(),
        &bytes[header + 44..]
    );
}

#[test]
fn we_read_what_the_reference_writes() {
    let data: Vec<u8> = (0..24).collect();
    let view =
        |dtype, shape: &[usize], bytes| TensorView::new(dtype, shape.to_vec(), bytes).unwrap();
    let tensors = vec![
        ("a", view(ReferenceDtype::F32, &[2, 3], &data)),
        ("b", view(ReferenceDtype::BF16, &[4], &data[..8])),
        ("c", view(ReferenceDtype::I64, &[3], &data)),
        ("empty", view(ReferenceDtype::F16, &[0, 7], &[])),
    ];
    let bytes = safetensors::serialize(tensors, None).unwrap();
    let bench = Bench::new();
    let file = bench.open(&bytes).unwrap();
    let a = file.tensor("a").unwrap();
    assert_eq!(
        (a.dtype, a.shape.as_slice(), a.bytes),
        (Dtype::F32, &[2, 3][..], &data[..])
    );
    assert_eq!(file.tensor("b").unwrap().bytes, &data[..8]);
    assert_eq!(file.tensor("empty").unwrap().shape, [0, 7]);
    let error = file.tensor("c").unwrap_err().to_string();
    assert!(error.contains("tensor `c` is I64"), "{error}");
    let error = file.tensor("d").unwrap_err().to_string();
    assert!(
        error.contains("weights.safetensors: tensor `d` is missing"),
        "{error}"
    );
}

#[test]
fn a_file_cut_off_anywhere_is_refused() {
    let bench = Bench::new();
    let (bytes, header) = small();
    for length in 0..bytes.len() {
        let error = bench.open(&bytes[..length]).unwrap_err();
        if length >= header {
            assert!(
                error.contains("tensor `") && error.contains("is cut off"),
                "{error}"
            );
        }
    }
    bench.open(&bytes).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is accepted lies inside the file and has the bytes that its shape says.
    #[test]
    fn changed_bytes_are_read_or_refused(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        thread_local!(static BENCH: Bench = Bench::new());
        let (mut bytes, header) = small();
        for (at, value) in changes {
            bytes[at.index(header)] = value;
        }
        BENCH.with(|bench| {
            if let Ok(file) = bench.open(&bytes) {
                for name in file.names() {
                    if let Ok(tensor) = file.tensor(name) {
                        assert_eq!(tensor.bytes.len(), tensor.shape.iter().product::<usize>() * tensor.dtype.size());
                    }
                }
            }
        });
    }
}

#[test]
fn hostile_headers_are_refused_with_the_reason() {
    let bench = Bench::new();
    let one = |dtype: &str, shape: &str, offsets: &str| {
        raw(
            &format!(r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#),
            64,
        )
    };
    let deep = format!(r#"{{"w":{}{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
    let two = |second: &str| {
        let first = r#""v":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}"#;
        raw(&format!("{{{first},{second}}}"), 64)
    };
    let cases = [
        (Vec::new(), "only 0 bytes"),
        (
            u64::MAX.to_le_bytes().to_vec(),
            "18446744073709551615 bytes long",
        ),
        ((1u64 << 25).to_le_bytes().to_vec(), "only 0 are there"),
        (raw("[]", 0), "not the JSON it should be"),
        (raw("{", 0), "not the JSON it should be"),
        (raw("\u{0}\u{1}", 0), "not the JSON it should be"),
        (raw(&deep, 0), "not the JSON it should be"),
        (one("F32", "[4]", "[0,16,32]"), "not the JSON it should be"),
        (one("F32", "[-1]", "[0,16]"), "not the JSON it should be"),
        (
            one("F32", "[18446744073709551616]", "[0,16]"),
            "not the JSON it should be",
        ),
        (
            one("F32", "[4]", "[16,0]"),
            "tensor `w` ends (at byte 0) before it begins",
        ),
        (
            one("F32", "[4]", "[0,18446744073709551615]"),
            "tensor `w` is cut off",
        ),
        (one("F32", "[16]", "[16,80]"), "tensor `w` is cut off"),
        (
            one("F32", "[5]", "[0,16]"),
            "tensor `w` is F32 of shape [5] and takes 16 bytes",
        ),
        (
            one("F32", "[4611686018427387904,4]", "[0,0]"),
            "do not agree",
        ),
        (
            one("BF16", "[9223372036854775808,2]", "[0,0]"),
            "do not agree",
        ),
        (
            two(r#""w":{"dtype":"F32","shape":[4],"data_offsets":[8,24]}"#),
            "tensor `w` overlaps `v`",
        ),
        (
            two(r#""w":{"dtype":"I8","shape":[99],"data_offsets":[0,1]}"#),
            "overlaps",
        ),
        (
            two(r#""v":{"dtype":"F32","shape":[4],"data_offsets":[16,32]}"#),
            "tensor `v` is listed twice",
        ),
    ];
    for (i, (bytes, expected)) in cases.iter().enumerate() {
        let error = bench.open(bytes).unwrap_err();
        assert!(
            error.contains(expected),
            "case {i}: {error:?} should contain {expected:?}"
        );
    }
}

#[test]
fn a_directory_is_no_weight_file() {
    let directory = tempfile::tempdir().unwrap();
    let error = SafetensorsFile::open(directory.path())
        .unwrap_err()
        .to_string();
    assert!(error.contains("is not a regular file"), "{error}");
}
