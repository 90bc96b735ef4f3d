//! On one kernel the logits are the same bits whatever the batch, the chunks, the neighbours, the blocks and
//! the threads.

mod common;

use baton_executor_tests::company::{BLOCK_TOKENS, BLOCKS, alone, sequences, together};
use baton_executor_tests::{Build, Tiny, tiny_families};
use common::{executor, kernels};
use proptest::prelude::*;

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4, ..ProptestConfig::default() })]

    #[test]
    fn logits_do_not_depend_on_the_company(seed: u64) {
        // Llama 3 with grouped heads, Mistral with a window that cuts inside and across blocks, Qwen3.
        for family in [1, 3, 5] {
            let tiny = Tiny::new(tiny_families().remove(family), 9);
            let sequences = sequences(tiny.spec.vocab);
            for kernel in kernels() {
                let build = |threads| {
                    let build = Build {
                        spec: &tiny.spec,
                        weights: &tiny,
                        block_tokens: BLOCK_TOKENS,
                        blocks: BLOCKS,
                    };
                    executor(kernel, threads, build)
                };
                let expected = alone(&mut build(1), &sequences);
                for threads in [1, 2, 3] {
                    let found = together(&mut build(threads), &sequences, seed ^ threads as u64);
                    for (at, logits) in &found {
                        prop_assert_eq!(
                            bits(logits), bits(&expected[at]),
                            "{} on {} with {} threads, sequence and tokens {:?}",
                            tiny.spec.family, kernel, threads, at
                        );
                    }
                }
            }
        }
    }
}
