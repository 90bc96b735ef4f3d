//! The gate on real weights.

mod common;

use baton_cpu::Kernel;
use baton_executor_tests::Build;
use baton_executor_tests::golden::{BLOCK_TOKENS, BLOCKS, Limits, model, teacher_forced};
use baton_model::ModelDir;
use common::{executor, kernels};

/// Measured: 0.44, 0.045 and 0.027. Activations rounded to BF16 at every product cost this much against float32
/// arithmetic.
const LIMITS: Limits = Limits {
    error_max: 0.6,
    error_mean: 0.06,
    margin: 0.1,
};

#[test]
fn teacher_forced_logits_are_those_of_transformers() {
    let model = model();
    let dir = ModelDir::open(&model.path).expect("a prepared model");
    let weights = dir.weights(0).expect("its weights");
    for kernel in kernels() {
        // Plain code takes its time on real weights: a few steps are enough to see that it agrees.
        let (cases, steps) = if kernel == Kernel::Portable {
            (1, 16)
        } else {
            (6, 64)
        };
        let mut executor = executor(
            kernel,
            2,
            Build {
                spec: dir.spec(),
                weights: &weights,
                block_tokens: BLOCK_TOKENS,
                blocks: BLOCKS as usize,
            },
        );
        teacher_forced(&kernel.to_string(), &mut executor, cases, steps, &LIMITS);
    }
}
