//! What the hardware gives.

use std::time::Instant;

use baton_cuda::{Buffer, Device};
use cudarc::driver::{result, sys};

use crate::ROUNDS;

/// Peer copies of one process that sees both GPUs: what the hardware gives.
pub(crate) fn ceiling() {
    let devices = [0, 1].map(|gpu| Device::open(gpu).expect("a GPU"));
    let bytes = 1usize << 30;
    let buffers = devices.each_ref().map(|device| {
        let mut buffer = Buffer::<u8>::uninitialized(device, bytes, "a copy").expect("memory");
        buffer.fill_bytes(0x5a).expect("filled");
        device.synchronize().expect("filled");
        buffer
    });
    let contexts = devices.each_ref().map(|device| {
        device.bind().expect("bound");
        let mut context = std::ptr::null_mut();
        // SAFETY: a place to write to.
        unsafe { sys::cuCtxGetCurrent(&mut context) }
            .result()
            .expect("a context");
        context
    });
    devices[1].bind().expect("bound");
    // SAFETY: a live context of another device.
    let peers = unsafe { sys::cuCtxEnablePeerAccess(contexts[0], 0) };
    println!("peer access: {peers:?}");
    let stream = result::stream::create(result::stream::StreamKind::NonBlocking).expect("a stream");
    for (size, copies) in [
        (4 << 20, 8),
        (16 << 20, 8),
        (128 << 20, 1),
        (256 << 20, 1),
        (bytes, 1),
        (bytes, 4),
    ] {
        let mut times = Vec::new();
        for _ in 0..ROUNDS {
            let started = Instant::now();
            for copy in 0..copies {
                let at = copy * size % bytes;
                // SAFETY: both ranges are within their allocations.
                unsafe {
                    sys::cuMemcpyPeerAsync(
                        buffers[1].at(at),
                        contexts[1],
                        buffers[0].at(at),
                        contexts[0],
                        size,
                        stream,
                    )
                    .result()
                    .expect("a peer copy");
                }
            }
            // SAFETY: a live stream.
            unsafe { result::stream::synchronize(stream) }.expect("copied");
            times.push(started.elapsed().as_secs_f64());
        }
        times.sort_by(f64::total_cmp);
        let middle = times[ROUNDS / 2];
        println!(
            "peer copy, {copies} of {} MiB: {:.1} GB/s, {:.0} µs",
            size >> 20,
            (size * copies) as f64 / middle / 1e9,
            middle * 1e6
        );
    }
}
