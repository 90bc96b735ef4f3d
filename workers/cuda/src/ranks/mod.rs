//! Several GPUs of one host as ranks of a group: devices that reach each other's memory, and sums over all of them.
//!
//! One process, one thread a rank. `docs/cuda-ranks.md` is the protocol.

mod all_gather;
mod all_reduce;
mod exchange;
mod pushed;

pub use all_gather::AllGather;
pub use all_reduce::{Algorithm, AllReduce, Sum, SumDtype};
pub(crate) use exchange::Arguments;
pub use exchange::ExchangeOptions;
pub(crate) use pushed::{PushedSums, Slots, set};

use std::sync::Arc;

use crate::error::CudaError;
use crate::gpu::device::Device;

/// Most ranks of a group: as many as `kernels/exchange.cuh` has room for.
pub(crate) const RANKS_MAX: usize = 8;

/// Opens the GPUs of a group, rank by rank, each able to read and write the others' memory. One GPU may have several ranks, for
/// tests.
///
/// # Errors
/// [`CudaError::Device`] if there are not 2 to 8 ranks, if a GPU is missing, or if two cannot reach each other.
pub fn open_group(ordinals: &[u32]) -> Result<Vec<Arc<Device>>, CudaError> {
    if !(2..=RANKS_MAX).contains(&ordinals.len()) {
        return Err(CudaError::Device(format!(
            "a group has 2 to {RANKS_MAX} GPUs, not {}",
            ordinals.len()
        )));
    }
    let devices: Vec<_> = ordinals
        .iter()
        .map(|ordinal| Device::open(*ordinal))
        .collect::<Result<_, _>>()?;
    for device in &devices {
        for peer in &devices {
            device.reach(peer)?;
        }
    }
    Ok(devices)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_of_one_or_nine_is_refused_before_any_gpu_is_looked_for() {
        for count in [0, 1, 9] {
            let error = open_group(&vec![0; count]).err().expect("refused");
            let text = error.to_string();
            assert_eq!(text, format!("a group has 2 to 8 GPUs, not {count}"));
        }
    }
}
