//! Every family, on every kernel of this CPU, against a plain decoder in f64.

mod common;

use std::sync::Arc;

use baton_cpu::{CpuError, CpuExecutor, CpuOptions, HeapMemory, Kernel};
use baton_engine::{Executor, kv_geometry};
use baton_executor_tests::families::{
    broken_plans_are_refused, families, fp8_families, prompt_log_probabilities,
};
use baton_executor_tests::{Applies, Build, Tiny, probe, tiny_families};
use baton_model::Mixer;
use common::{chosen, executor, kernels};

/// What BF16 activations cost these models' logits is measured below 0.05. A wrong rotation, mask, bias or norm
/// costs tenths and more.
const ERROR_MAX: f64 = 0.08;

#[test]
fn logits_are_those_of_the_plain_decoder() {
    for kernel in kernels() {
        families(&kernel.to_string(), ERROR_MAX, &|build| {
            Box::new(executor(kernel, 2, build))
        });
    }
}

/// FP8 weights are rounded to BF16 at load, which costs what other BF16 weights do not: measured below 0.05 too.
#[test]
fn fp8_weights_are_what_their_scales_make_them() {
    fp8_families(&chosen().to_string(), ERROR_MAX, &|build| {
        Box::new(executor(chosen(), 2, build))
    });
}

#[test]
fn prompt_log_probabilities_are_those_of_the_plain_decoder() {
    prompt_log_probabilities(ERROR_MAX, &|build| Box::new(executor(chosen(), 2, build)));
}

#[test]
fn a_step_submitted_ahead_changes_no_token() {
    baton_executor_tests::ahead::steps_ahead(&|build| Box::new(executor(chosen(), 2, build)));
    baton_executor_tests::ahead::chunks_ahead(&|build| Box::new(executor(chosen(), 2, build)));
}

#[test]
fn only_what_is_in_flight_is_followed() {
    baton_executor_tests::ahead::only_what_is_in_flight_is_followed(&|build| {
        Box::new(executor(chosen(), 2, build))
    });
}

#[test]
fn masks_are_obeyed() {
    baton_executor_tests::masks::masks_are_obeyed(&|build| Box::new(executor(chosen(), 2, build)));
}

#[test]
fn masks_come_later() {
    baton_executor_tests::masks::masks_come_later(&|build| Box::new(executor(chosen(), 2, build)));
}

#[test]
fn runs_choose_what_single_steps_do() {
    for kernel in kernels() {
        let applies = baton_executor_tests::runs::runs_choose_what_single_steps_do(&|build| {
            Box::new(executor(kernel, 2, build))
        });
        assert_eq!(applies, Applies::Yes);
    }
}

#[test]
fn a_row_of_nan_fails_alone() {
    for kernel in kernels() {
        baton_executor_tests::broken::rows_without_numbers(&|build| {
            Box::new(executor(kernel, 2, build))
        });
    }
}

/// In some milliseconds of one thread, so that the probe has time for all of its steps.
#[test]
fn the_probe_predicts_steps() {
    let sizes = probe::Sizes {
        layers: 2,
        hidden: 128,
        vocab: 16_384,
    };
    let kernel = chosen();
    let builder = |build: Build<'_>| -> Box<dyn Executor> { Box::new(executor(kernel, 1, build)) };
    let terms = ["row", "KV", "attention of prompts"];
    probe::the_probe_predicts_steps(&kernel.to_string(), sizes, &terms, 3.0, &builder);
}

#[test]
fn what_does_not_fit_is_refused_with_a_sentence() {
    let tiny = Tiny::new(tiny_families().remove(0), 1);
    let kv = kv_geometry(&tiny.spec, 16);
    let load = |kv: baton_protocol::KvGeometry, bytes| {
        let options = CpuOptions {
            threads: 1,
            kernel: Some(Kernel::Portable),
            step_tokens_max: 8,
            step_sequences_max: 2,
        };
        let memory = Arc::new(HeapMemory::new(bytes));
        CpuExecutor::load(&tiny.spec, &[&tiny], vec![memory], kv, options)
    };
    let error = |result: Result<CpuExecutor, CpuError>| result.err().expect("refused").to_string();
    assert!(error(load(kv.clone(), 100)).contains("a block takes"));
    let mut other = kv.clone();
    other.groups[0].head_dim = 99;
    assert!(error(load(other, 1 << 20)).contains("head_dim is 99 here and 12 there"));

    let mut other = Tiny::new(tiny_families().remove(0), 1);
    other.spec.hidden = 73;
    let options = CpuOptions {
        threads: 1,
        kernel: None,
        step_tokens_max: 8,
        step_sequences_max: 2,
    };
    let memory = Arc::new(HeapMemory::new(1 << 20));
    let refused = CpuExecutor::load(
        &other.spec,
        &[&other],
        vec![memory],
        kv.clone(),
        options.clone(),
    );
    assert!(error(refused).contains("model.embed_tokens.weight"));

    let mut mixed = Tiny::new(tiny_families().remove(0), 1);
    let kind = Arc::make_mut(&mut mixed.spec.layers[1]);
    let Mixer::Attention(attention) = &mut kind.mixer;
    attention.sliding_window = Some(7);
    let memory = Arc::new(HeapMemory::new(1 << 20));
    let refused = CpuExecutor::load(
        &mixed.spec,
        &[&mixed],
        vec![memory],
        kv.clone(),
        options.clone(),
    );
    assert!(error(refused).contains(
        "cannot run this model: its layers differ (1 with full attention of 6/2 heads of 12 and a gated MLP of 144, 1 \
         with sliding attention over 7 tokens"
    ));

    let mut executor = load(kv.clone(), 3 * kv.block_bytes()).expect("it loads");
    broken_plans_are_refused(&mut executor);
}
