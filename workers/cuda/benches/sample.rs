//! What sampling costs on the GPU: `cargo bench -p baton-cuda --bench sample`, on a machine with one.
//!
//! Microseconds of a graph that holds the copies and the kernel of one step, and of the host's part of a launch. Rows of
//! 128,256 logits in the shape of a bell.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use baton_cuda::{Buffer, Compiler, Device, Graph, Pinned, Sampler};
use baton_engine::{SampleRequest, SampleState, TokenCount, Want, What, random_bits};
use baton_protocol::Sampling;

const VOCAB: usize = 128_256;
const REPEATS: u32 = 20;

fn main() {
    let device = Device::open(0).unwrap_or_else(|error| panic!("{error}"));
    let compiler = Compiler::for_capability(device.capability()).expect("NVRTC");
    println!(
        "{}, a vocabulary of {VOCAB}: µs a step on the GPU (on the host)",
        device.name()
    );
    let batches = [1, 8, 32, 64, 128];
    print!("{:44}", "rows");
    batches.iter().for_each(|rows| print!("{rows:>16}"));
    println!();
    let logits: Vec<f32> = (0..batches[4] * VOCAB).map(|i| bell(i as u32)).collect();
    for (name, scale, sampling) in cases() {
        print!("{name:44}");
        let scaled: Vec<f32> = logits.iter().map(|x| x * scale).collect();
        for rows in batches {
            let (gpu, host) = measure(&device, &compiler, &scaled, &sampling, rows);
            print!("{:>16}", format!("{gpu:.1} ({host:.1})"));
        }
        println!();
    }
}

fn cases() -> Vec<(&'static str, f32, Sampling)> {
    let warm = Sampling {
        temperature: 0.8,
        ..Sampling::default()
    };
    let k_p = Sampling {
        top_k: 40,
        top_p: 0.95,
        ..warm.clone()
    };
    vec![
        ("temperature", 2.0, warm.clone()),
        (
            "min-p 0.05",
            2.0,
            Sampling {
                min_p: 0.05,
                ..warm.clone()
            },
        ),
        (
            "top-k 40",
            2.0,
            Sampling {
                top_k: 40,
                ..warm.clone()
            },
        ),
        (
            "top-p 0.95",
            4.0,
            Sampling {
                top_p: 0.95,
                ..warm.clone()
            },
        ),
        ("top-k 40, top-p 0.95", 2.0, k_p.clone()),
        (
            "top-k 40, top-p 0.95, penalties",
            2.0,
            Sampling {
                repetition_penalty: 1.01,
                frequency_penalty: 0.01,
                ..k_p
            },
        ),
        (
            "greedy, 20 log-probabilities",
            2.0,
            Sampling {
                logprobs: Some(20),
                ..Sampling::default()
            },
        ),
        (
            "top-p 0.95 of a flat distribution",
            0.5,
            Sampling {
                top_p: 0.95,
                ..warm.clone()
            },
        ),
        (
            "top-k 5000",
            2.0,
            Sampling {
                top_k: 5000,
                ..warm
            },
        ),
    ]
}

/// Penalties of a sequence of a thousand different tokens.
fn measure(
    device: &Arc<Device>,
    compiler: &Compiler,
    host_logits: &[f32],
    sampling: &Sampling,
    rows: usize,
) -> (f64, f64) {
    let mut sampler = Sampler::new(device, compiler, VOCAB, rows).expect("a sampler");
    let mut batch = sampler.batch().expect("room");
    let mut state = SampleState {
        sampling: sampling.clone(),
        ..SampleState::default()
    };
    if state.has_penalty() {
        let count = |i| TokenCount {
            token: i * 100,
            prompt: 1,
            output: i % 3,
        };
        state.counts = (0..1000u32).map(count).collect();
    }
    let wants: Vec<Want> = (0..rows)
        .map(|row| {
            let mut state = state.clone();
            state.sampling.seed = row as u64;
            let request = SampleRequest {
                position: 7,
                state: Arc::new(state),
                ban_stop_ids: false,
                mask: None,
            };
            Want {
                sequence: row,
                row,
                what: What::Sample(request),
            }
        })
        .collect();
    let logits = Buffer::of(device, &host_logits[..rows * VOCAB], "logits").expect("GPU memory");
    let mut best = Pinned::zeroed(device, rows).expect("host memory");
    for (best, row) in best.iter_mut().zip(host_logits.chunks(VOCAB)) {
        let order = |a: &usize, b: &usize| row[*a].total_cmp(&row[*b]);
        *best = (0..VOCAB).max_by(order).expect("a row") as i32;
    }
    let tokens = Buffer::<i32>::zeroed(device, rows, "tokens").expect("GPU memory");
    let (tokens_at, logits_at) = (tokens.at(0), logits.at(0));
    let mut launch = || {
        // SAFETY: rows as the sampler wants them; nothing is read before the GPU is waited for.
        unsafe {
            best.upload(rows, tokens_at)?;
            sampler.launch(
                &mut batch,
                &wants,
                |_| false,
                tokens_at,
                logits_at,
                tokens_at,
            )
        }
    };
    let finish = || device.synchronize().expect("the kernel");
    launch().expect("a launch");
    finish();
    let started = Instant::now();
    for _ in 0..REPEATS {
        launch().expect("a launch");
    }
    let host = started.elapsed();
    finish();
    let graph = Graph::capture(device, &mut launch).expect("a graph");
    let mut times: Vec<f64> = (0..5)
        .map(|_| {
            finish();
            let started = Instant::now();
            for _ in 0..REPEATS {
                // SAFETY: what it was captured with is still there.
                unsafe { graph.launch() }.expect("a launch");
            }
            finish();
            started.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    black_box(batch.answers(&wants));
    let micros = |seconds: f64| seconds * 1e6 / f64::from(REPEATS);
    (micros(times[2]), micros(host.as_secs_f64()))
}

fn bell(i: u32) -> f32 {
    let unit = |j| random_bits(j, i) as f32 / (1u64 << 53) as f32;
    (0..6).map(unit).sum::<f32>() - 3.0
}
