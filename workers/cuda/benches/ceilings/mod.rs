//! This GPU's ceilings, measured so that nothing measured against them can be above them.

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_cuda::{
    Blas, Buffer, Compiler, CudaError, Device, Dtype, LaunchConfig, Module, Output, Product,
    launch, sources::Source,
};
use cudarc::driver::{result, sys};

/// Bytes per second of a kernel that reads 4 GiB.
///
/// # Errors
/// Also if that cannot be the memory's bandwidth.
pub fn read_bandwidth(device: &Arc<Device>) -> Result<f64, Box<dyn Error>> {
    const BYTES: usize = 4 << 30;
    let source = Source {
        name: "read.cu",
        text: include_str!("../read.cu"),
    };
    let image = Compiler::for_capability(device.capability())?.compile(&source, &[])?;
    let kernel = Module::load(device, &image)?.kernel("read_sum", 0)?;
    let mut data = Buffer::<u8>::uninitialized(device, BYTES, "4 GiB to read")?;
    data.fill_bytes(0x5a)?;
    let out = Buffer::<u32>::zeroed(device, 1, "a sum")?;
    let shape = LaunchConfig::row(device.multiprocessors() as usize * 8, 512);
    let time = best(device, || {
        // SAFETY: the kernel's arguments, by its file.
        unsafe { launch!(kernel, shape, data.at(0), (BYTES / 16) as i64, out.at(0)) }
    })?;
    let measured = BYTES as f64 / time;
    let Some(theoretical) = theoretical_bandwidth() else {
        println!(
            "the driver does not say what its memory's bandwidth is: the one measured is not checked"
        );
        return Ok(measured);
    };
    match measured / theoretical {
        0.5..=1.0 => Ok(measured),
        part => Err(format!(
            "reads reach {:.2} TB/s, {:.0}% of the {:.2} TB/s that the memory's clock and width give: no ceiling to compare with. \
             Is another program on the GPU, or its clock held down?",
            measured / 1e12,
            part * 100.0,
            theoretical / 1e12
        )
        .into()),
    }
}

/// Bytes per second of the memory of GPU 0 by its clock and width, two transfers a clock; none if the driver does not say.
fn theoretical_bandwidth() -> Option<f64> {
    use sys::CUdevice_attribute::{
        CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH, CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE,
    };
    let device = result::device::get(0).ok()?;
    let attribute = |which| {
        // SAFETY: a device that the driver just gave.
        let value = unsafe { result::device::get_attribute(device, which) };
        value.ok().filter(|value| *value > 0).map(f64::from)
    };
    let kilohertz = attribute(CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)?;
    let bits = attribute(CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)?;
    Some(2.0 * kilohertz * 1e3 * bits / 8.0)
}

/// Operations per second of a product of 8192³ on random numbers, BF16 or e4m3 with scales.
pub fn matmul_rate(device: &Arc<Device>, fp8: bool) -> Result<f64, CudaError> {
    const N: usize = 8192;
    let mut blas = Blas::new(device)?;
    let numbers = match fp8 {
        true => codes(N * N),
        false => noise(2 * N * N),
    };
    let x = Buffer::<u8>::of(device, &numbers, "a matrix")?;
    let w = Buffer::<u8>::of(device, &numbers, "a matrix")?;
    let y = Buffer::<u16>::zeroed(device, N * N, "a matrix")?;
    let scales = Buffer::<f32>::of(device, &[CODE_SCALE; N], "scales")?;
    let product = Product {
        x: x.at(0),
        w: w.at(0),
        y: y.at(0),
        rows: N,
        outputs: N,
        inputs: N,
        dtype: match fp8 {
            true => Dtype::E4m3 {
                w_scales: scales.at(0),
                x_scales: scales.at(0),
                blocks: false,
            },
            false => Dtype::Bf16,
        },
        output: Output::Bf16,
    };
    let time = best(device, || {
        // SAFETY: matrices of these sizes.
        unsafe { blas.multiply(&product) }
    })?;
    Ok(2.0 * (N as f64).powi(3) / time)
}

/// What part of its ceiling some work reached.
///
/// # Errors
/// If it is more than there is: then what was measured as the ceiling is none. A measurement repeats to within 2%.
pub fn share(floor: f64, time: f64, what: &str) -> Result<f64, String> {
    let share = floor / time;
    match share <= 1.02 {
        true => Ok(share),
        false => Err(format!(
            "{what}: {:.0}% of the ceiling measured at the start, which was none then: is another program on the GPU, or its \
             clock held down? Run it again",
            share * 100.0
        )),
    }
}

/// A GPU that was idle takes this long to raise its clocks.
const WARM_UP: Duration = Duration::from_secs(1);

/// Seconds of one run: of several rounds the best median, after the GPU was kept busy with the same for a while.
fn best(device: &Device, mut run: impl FnMut() -> Result<(), CudaError>) -> Result<f64, CudaError> {
    const ROUNDS: usize = 5;
    const RUNS: usize = 9;
    let begun = Instant::now();
    while begun.elapsed() < WARM_UP {
        run()?;
        device.synchronize()?;
    }
    let mut best = f64::INFINITY;
    for _ in 0..ROUNDS {
        let mut times = Vec::new();
        for _ in 0..RUNS {
            let started = Instant::now();
            run()?;
            device.synchronize()?;
            times.push(started.elapsed());
        }
        best = best.min(middle(times));
    }
    Ok(best)
}

/// The median, in seconds.
pub fn middle(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64()
}

/// e4m3 numbers of either sign between 2^-3 and 2; times [`CODE_SCALE`] they are as large as [`noise`].
pub fn codes(bytes: usize) -> Vec<u8> {
    random(bytes, 0x9f9f_9f9f_9f9f_9f9f, 0x2020_2020_2020_2020)
}

/// What an e4m3 number of [`codes`] is multiplied with.
pub const CODE_SCALE: f32 = 0.0625;

/// BF16 numbers of either sign between 2^-7 and 2^-3.
pub fn noise(bytes: usize) -> Vec<u8> {
    random(bytes, 0x81ff_81ff_81ff_81ff, 0x3c00_3c00_3c00_3c00)
}

/// Random bytes, only the bits of `free` at random and those of `set` set.
fn random(bytes: usize, free: u64, set: u64) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut out = Vec::with_capacity(bytes + 8);
    while out.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&((state & free) | set).to_le_bytes());
    }
    out.truncate(bytes);
    out
}
