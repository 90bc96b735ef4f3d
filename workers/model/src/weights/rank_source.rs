//! One rank's part of a model whose weights lie whole.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;

use super::fp8::{BLOCK, Fp8Matrix, Fp8Scales};
use super::names;
use super::source::{MatrixBytes, TensorBytes, TensorSource};
use super::tensors::{Split, TensorSpec, expected_tensors};
use crate::spec::{Mixer, ModelSpec};

/// What one rank of a tensor-parallel worker takes of a whole model's tensors: cut as [`Split`] says, and where there are more
/// ranks than key/value heads, the head that it shares with its neighbours. Its shapes are those of [`ModelSpec::of_rank`].
///
/// Rows are borrowed; columns are copied when they are asked for.
pub struct RankSource<'a> {
    whole: &'a dyn TensorSource,
    /// Every tensor of the model by name, with its key/value heads where its rows are such.
    tensors: HashMap<String, (TensorSpec, Option<usize>)>,
    rank: usize,
    ranks: usize,
}

impl<'a> RankSource<'a> {
    /// Rank `rank` of `ranks`, which must have passed [`ModelSpec::of_rank`].
    ///
    /// # Panics
    /// If there is no such rank.
    pub fn new(whole: &'a dyn TensorSource, spec: &ModelSpec, rank: usize, ranks: usize) -> Self {
        assert!(rank < ranks, "there is no rank {rank} of {ranks}");
        let mut heads = HashMap::new();
        for (index, kind) in spec.layers.iter().enumerate() {
            let Mixer::Attention(attention) = &kind.mixer;
            for name in [names::K, names::V, names::K_BIAS, names::V_BIAS] {
                heads.insert(names::layer(index, name), attention.kv_heads);
            }
        }
        let tensors = expected_tensors(spec).into_iter().map(|tensor| {
            let heads = heads.get(&tensor.name).copied();
            (tensor.name.clone(), (tensor, heads))
        });
        Self {
            whole,
            tensors: tensors.collect(),
            rank,
            ranks,
        }
    }

    /// The tensor, and the rows and columns of it that this rank has.
    fn part(&self, name: &str) -> Result<(&TensorSpec, Range<usize>, Range<usize>), String> {
        let (tensor, heads) = self
            .tensors
            .get(name)
            .ok_or("the model has no such tensor")?;
        let (rows, columns) = (tensor.rows(), tensor.columns());
        Ok(match (tensor.split, heads) {
            (Split::Replicated, _) => (tensor, 0..rows, 0..columns),
            (Split::Rows, Some(heads)) => {
                let (mine, dim) = (heads_of_rank(*heads, self.rank, self.ranks), rows / heads);
                (tensor, mine.start * dim..mine.end * dim, 0..columns)
            }
            (Split::Rows, None) => (tensor, part(rows, self.rank, self.ranks), 0..columns),
            (Split::Columns, _) => (tensor, 0..rows, part(columns, self.rank, self.ranks)),
        })
    }
}

/// The key/value heads of a rank: equal parts, or one that neighbouring ranks share. As `KvShares::parallel` has it.
fn heads_of_rank(heads: usize, rank: usize, ranks: usize) -> Range<usize> {
    match ranks <= heads {
        true => part(heads, rank, ranks),
        false => {
            let head = rank * heads / ranks;
            head..head + 1
        }
    }
}

/// The `rank`-th of `ranks` nearly equal parts of `0 .. count`.
pub fn part(count: usize, rank: usize, ranks: usize) -> Range<usize> {
    count * rank / ranks..count * (rank + 1) / ranks
}

impl TensorSource for RankSource<'_> {
    fn bf16(&self, name: &str) -> Result<TensorBytes<'_>, String> {
        let (tensor, rows, columns) = self.part(name)?;
        let bytes = self.whole.shaped(name, &tensor.shape)?;
        let mut shape = vec![rows.len()];
        if tensor.shape.len() == 2 {
            shape.push(columns.len());
        }
        let bytes = cut(bytes, tensor.columns(), 2, rows, columns);
        Ok(TensorBytes { shape, bytes })
    }

    fn projection(&self, name: &str, out: usize, inputs: usize) -> Result<MatrixBytes<'_>, String> {
        let (tensor, rows, columns) = self.part(name)?;
        if (rows.len(), columns.len()) != (out, inputs) {
            let (rows, columns) = (rows.len(), columns.len());
            return Err(format!(
                "its part on rank {} of {} is {rows}×{columns}, not {out}×{inputs}",
                self.rank, self.ranks
            ));
        }
        let across = tensor.columns();
        match self.whole.projection(name, tensor.rows(), across)? {
            MatrixBytes::Bf16(bytes) => Ok(MatrixBytes::Bf16(cut(bytes, across, 2, rows, columns))),
            MatrixBytes::Fp8(matrix) => cut_fp8(matrix, rows, columns).map(MatrixBytes::Fp8),
        }
    }
}

/// Rows and columns of a matrix whose rows are `across` numbers of `size` bytes.
fn cut(
    bytes: Cow<'_, [u8]>,
    across: usize,
    size: usize,
    rows: Range<usize>,
    columns: Range<usize>,
) -> Cow<'_, [u8]> {
    let all = rows.start * across * size..rows.end * across * size;
    if columns == (0..across) {
        return match bytes {
            Cow::Borrowed(bytes) => Cow::Borrowed(&bytes[all]),
            Cow::Owned(bytes) => Cow::Owned(bytes[all].to_vec()),
        };
    }
    let mut part = Vec::with_capacity(rows.len() * columns.len() * size);
    for row in bytes[all].chunks_exact(across * size) {
        part.extend_from_slice(&row[columns.start * size..columns.end * size]);
    }
    Cow::Owned(part)
}

fn cut_fp8(
    matrix: Fp8Matrix<'_>,
    rows: Range<usize>,
    columns: Range<usize>,
) -> Result<Fp8Matrix<'_>, String> {
    let Fp8Matrix {
        rows: all_rows,
        columns: across,
        codes,
        scales,
    } = matrix;
    let scales = match scales {
        Fp8Scales::Channel(scales) => Fp8Scales::Channel(scales[rows.clone()].to_vec()),
        Fp8Scales::Block(scales) => {
            let whole = |part: &Range<usize>, all: usize| {
                part.start.is_multiple_of(BLOCK)
                    && (part.end.is_multiple_of(BLOCK) || part.end == all)
            };
            if !whole(&rows, all_rows) || !whole(&columns, across) {
                return Err(format!(
                    "a rank has its rows {rows:?} and columns {columns:?}, which cuts {BLOCK}×{BLOCK} blocks that share a scale; \
                     choose a tensor-parallel size that does not, or prepare the model with `--dtype bf16`"
                ));
            }
            let blocks = |part: &Range<usize>| part.start / BLOCK..part.end.div_ceil(BLOCK);
            let wide = across.div_ceil(BLOCK);
            let down = blocks(&rows);
            let of_row = |row: usize| blocks(&columns).map(move |column| row * wide + column);
            Fp8Scales::Block(down.flat_map(of_row).map(|at| scales[at]).collect())
        }
    };
    Ok(Fp8Matrix {
        rows: rows.len(),
        columns: columns.len(),
        codes: cut(codes, across, 1, rows, columns),
        scales,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::UniformSpec;
    use crate::{Rope, RopeScaling};

    /// Element `[row][column]` of the tensor numbered `seed` is a number of its own.
    struct Numbered;

    fn bytes(name: &str, row: usize, column: usize) -> [u8; 2] {
        let seed = name
            .bytes()
            .fold(7u32, |h, b| h.wrapping_mul(31).wrapping_add(b.into()));
        let mixed = (seed ^ (row * 977 + column) as u32).wrapping_mul(0x9e37_79b1);
        ((mixed >> 16) as u16).to_le_bytes()
    }

    fn spec(kv_heads: usize) -> ModelSpec {
        let spec = UniformSpec {
            family: "qwen2".to_owned(),
            hidden: 24,
            intermediate: 40,
            layers: 2,
            heads: 8,
            kv_heads,
            head_dim: 6,
            vocab: 33,
            tokens_max: 64,
            rms_eps: 1e-5,
            rope: Rope {
                theta: 10_000.0,
                scaling: RopeScaling::None,
            },
            qkv_bias: true,
            qk_norm: false,
            tied_embeddings: false,
            sliding_window: None,
        };
        ModelSpec::try_from(spec).expect("a model")
    }

    impl TensorSource for (Numbered, ModelSpec) {
        fn bf16(&self, name: &str) -> Result<TensorBytes<'_>, String> {
            let tensors = expected_tensors(&self.1);
            let tensor = tensors.into_iter().find(|t| t.name == name).ok_or("none")?;
            let across = tensor.columns();
            let all = (0..tensor.elements()).flat_map(|i| bytes(name, i / across, i % across));
            Ok(TensorBytes {
                shape: tensor.shape,
                bytes: all.collect::<Vec<u8>>().into(),
            })
        }
    }

    #[test]
    fn ranks_have_every_row_and_column_and_share_heads_beyond_their_number() {
        for (kv_heads, ranks) in [(4, 1), (4, 2), (4, 4), (2, 4), (2, 8), (1, 8)] {
            let whole = (Numbered, spec(kv_heads));
            let spec = &whole.1;
            let mine = spec.of_rank(ranks).expect("it can be shared");
            let sources: Vec<_> = (0..ranks)
                .map(|rank| RankSource::new(&whole, spec, rank, ranks))
                .collect();
            for tensor in expected_tensors(spec) {
                let name = &tensor.name;
                let (rows, across) = (tensor.rows(), tensor.columns());
                let mut seen = vec![0; rows * across];
                for (rank, source) in sources.iter().enumerate() {
                    let part = source.bf16(name).expect(name);
                    let (_, down, along) = source.part(name).expect(name);
                    assert_eq!(part.shape[0], down.len());
                    let cells = down.flat_map(|r| along.clone().map(move |c| (r, c)));
                    for ((row, column), found) in cells.zip(part.bytes.as_chunks::<2>().0) {
                        assert_eq!(*found, bytes(name, row, column), "{name} on rank {rank}");
                        seen[row * across + column] += 1;
                    }
                }
                let times = match (
                    tensor.split,
                    name.contains("k_proj") || name.contains("v_proj"),
                ) {
                    (Split::Replicated, _) => ranks,
                    (_, true) => (ranks / kv_heads).max(1),
                    _ => 1,
                };
                assert!(seen.iter().all(|count| *count == times), "{name}: {seen:?}");
            }
            let named =
                |tensor: &TensorSpec| tensor.name != names::EMBED && tensor.name != names::LM_HEAD;
            for tensor in expected_tensors(&mine).into_iter().filter(named) {
                let part = sources[ranks - 1].bf16(&tensor.name).expect("it is there");
                assert_eq!(part.shape, tensor.shape, "{}", tensor.name);
            }
        }
    }

    #[test]
    fn what_cannot_be_shared_is_refused_with_what_it_is() {
        for (kv_heads, ranks, told) in [
            (4, 0, "at least 1"),
            (4, 3, "8 query heads"),
            (4, 16, "8 query heads"),
        ] {
            let error = spec(kv_heads).of_rank(ranks).expect_err("refused");
            assert!(error.contains(told), "{error}");
        }
    }

    #[test]
    fn fp8_parts_have_their_own_scales() {
        let numbers: Vec<u8> = (0..256 * 256)
            .flat_map(|i: usize| half::bf16::from_f32(((i * 31) % 97) as f32 - 48.0).to_le_bytes())
            .collect();
        for matrix in [
            Fp8Matrix::per_channel(&numbers, 256, 256),
            Fp8Matrix::per_block(&numbers, 256, 256),
        ] {
            let (mut whole, mut part) = (Vec::new(), Vec::new());
            matrix.dequantize(&mut whole);
            let cut_off = cut_fp8(matrix.clone(), 128..256, 128..256).expect("whole blocks");
            cut_off.dequantize(&mut part);
            let expected = cut(whole.into(), 256, 2, 128..256, 128..256);
            assert_eq!(part, expected.as_ref());
        }
        let blocks = Fp8Matrix::per_block(&numbers, 256, 256);
        let error = cut_fp8(blocks, 0..64, 0..256).expect_err("half a block");
        assert!(error.contains("share a scale"), "{error}");
    }
}
