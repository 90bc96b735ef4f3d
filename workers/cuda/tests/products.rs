//! Products of many rows through cuBLASLt against f64, by every kind of numbers and scales.

use std::sync::Arc;

use baton_cuda::{Blas, Buffer, Device, Dtype, Output, Product};
use baton_executor_tests::Random;
use baton_model::f32_from_e4m3;

const BLOCK: usize = 128;

/// All that a captured decode step has, as far as algorithms are chosen for few rows, and some beside them.
const ROWS: [usize; 14] = [
    8, 72, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 512, 640,
];

#[test]
#[ignore = "needs a GPU"]
fn fp8_products_are_those_of_f64() {
    let device = Device::open(0).unwrap_or_else(|error| panic!("{error}"));
    let mut blas = Blas::new(&device).unwrap_or_else(|error| panic!("{error}"));
    let sizes = [
        (6144, 4096),
        (4096, 14_336),
        (28_672, 4096),
        (80, 112),
        (512, 512),
    ];
    let mut random = Random(5);
    for (outputs, inputs) in sizes {
        let matrix = Matrix::new(&device, &mut random, outputs, inputs);
        let mut worst: f64 = 0.0;
        for rows in ROWS {
            for output in [Output::Bf16, Output::F32, Output::AddF32] {
                for blocks in [false, true] {
                    if blocks && (outputs % BLOCK > 0 || inputs % (4 * BLOCK) > 0) {
                        continue;
                    }
                    let error = matrix.error(&device, &mut blas, &mut random, rows, output, blocks);
                    let label = format!("{rows} rows, {outputs} x {inputs}, {output:?}, {blocks}");
                    // Rounding to BF16 costs 1.7e-3, the tensor core's short sums 2.9e-3 where inputs are most.
                    assert!(error < 4e-3, "{label}: {error:.2e}");
                    worst = worst.max(error);
                }
            }
        }
        println!("{outputs} x {inputs}: worst error {worst:.2e}");
    }
}

struct Matrix {
    outputs: usize,
    inputs: usize,
    codes: Vec<u8>,
    channel: Vec<f32>,
    block: Vec<f32>,
    on_device: (Buffer<u8>, Buffer<f32>, Buffer<f32>),
}

impl Matrix {
    fn new(device: &Arc<Device>, random: &mut Random, outputs: usize, inputs: usize) -> Self {
        let codes = codes(random, outputs * inputs);
        let channel = scales(random, outputs);
        let block = scales(random, outputs.div_ceil(BLOCK) * inputs.div_ceil(BLOCK));
        let on_device = (
            Buffer::of(device, &codes, "codes").expect("GPU memory"),
            Buffer::of(device, &channel, "scales").expect("GPU memory"),
            Buffer::of(device, &block, "scales").expect("GPU memory"),
        );
        Self {
            outputs,
            inputs,
            codes,
            channel,
            block,
            on_device,
        }
    }

    /// Of some of the results, relative to their size.
    fn error(
        &self,
        device: &Arc<Device>,
        blas: &mut Blas,
        random: &mut Random,
        rows: usize,
        output: Output,
        blocks: bool,
    ) -> f64 {
        let n = self.inputs;
        let x = codes(random, rows * n);
        let x_scales = scales(random, rows * if blocks { n / BLOCK } else { 1 });
        let x_device = Buffer::of(device, &x, "codes").expect("GPU memory");
        let x_scales_device = Buffer::of(device, &x_scales, "scales").expect("GPU memory");
        let count = rows * self.outputs;
        // 1 to add to, or NaN to be overwritten.
        let before = if output == Output::AddF32 {
            1.0
        } else {
            f32::NAN
        };
        let y = Buffer::of(device, &vec![before; count], "results").expect("GPU memory");
        let product = Product {
            x: x_device.at(0),
            w: self.on_device.0.at(0),
            y: y.at(0),
            rows,
            outputs: self.outputs,
            inputs: n,
            dtype: Dtype::E4m3 {
                w_scales: if blocks {
                    self.on_device.2.at(0)
                } else {
                    self.on_device.1.at(0)
                },
                x_scales: x_scales_device.at(0),
                blocks,
            },
            output,
        };
        // SAFETY: matrices of these sizes, alive until the results are read.
        unsafe { blas.multiply(&product) }.unwrap_or_else(|error| panic!("{error}"));
        let mut found = vec![0f32; count];
        y.read(0, &mut found).expect("the results");
        let (mut errors, mut truths) = (0.0, 0.0);
        for i in 0..400 {
            let (row, out) = match i {
                0 => (rows - 1, self.outputs - 1),
                _ => (random.below(rows), random.below(self.outputs)),
            };
            let truth: f64 = (0..n)
                .map(|k| {
                    let scale = match blocks {
                        true => {
                            let w = self.block[out / BLOCK * (n / BLOCK) + k / BLOCK];
                            f64::from(w) * f64::from(x_scales[k / BLOCK * rows + row])
                        }
                        false => f64::from(self.channel[out]) * f64::from(x_scales[row]),
                    };
                    number(self.codes[out * n + k]) * number(x[row * n + k]) * scale
                })
                .sum();
            let at = row * self.outputs + out;
            let ours = match output {
                Output::Bf16 => {
                    let bits = found[at / 2].to_bits() >> (16 * (at % 2)) << 16;
                    f64::from(f32::from_bits(bits))
                }
                Output::F32 => f64::from(found[at]),
                Output::AddF32 => f64::from(found[at]) - 1.0,
            };
            errors += (ours - truth).powi(2);
            truths += truth.powi(2);
        }
        (errors / truths).sqrt()
    }
}

fn number(code: u8) -> f64 {
    f64::from(f32_from_e4m3(code))
}

/// Any numbers but NaN.
fn codes(random: &mut Random, count: usize) -> Vec<u8> {
    let code = |_| match random.below(256) as u8 {
        code if code & 0x7f == 0x7f => 0x31,
        code => code,
    };
    (0..count).map(code).collect()
}

/// Of different sizes, so that one in the wrong place shows.
fn scales(random: &mut Random, count: usize) -> Vec<f32> {
    (0..count)
        .map(|_| (random.number() as f32 + 1.5) * 0.01)
        .collect()
}
