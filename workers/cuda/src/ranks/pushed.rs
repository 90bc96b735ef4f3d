//! Sums that products of few rows make at their own ends: `kernels/pushed_sum.cuh`.

use super::AllReduce;
use super::exchange::Arguments;

/// Of a layer: after attention's output projection, and after the feed-forward layer.
const SUMS: usize = 2;

/// A layer's slots, the next layer's, and a third set for an odd number of layers, whose last one meets the first.
const SETS: usize = 3;

/// Rows of f32 that a sum has room for, and rows of BF16.
const F32_ROWS: usize = 32;

/// One rank's end of them.
#[derive(Clone, Copy)]
pub(crate) struct PushedSums {
    arguments: Arguments,
    at: u64,
    /// Bytes of what one rank sends of one sum.
    rank_bytes: usize,
    ranks: usize,
    layers: usize,
}

/// `PushedSlots` of the kernels: of one sum.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Slots {
    at: u64,
    stride: u32,
    padding: u32,
}

impl Slots {
    /// For a model on one GPU.
    pub(crate) const NONE: Self = Self {
        at: 0,
        stride: 0,
        padding: 0,
    };
}

impl PushedSums {
    /// Bytes of exchange memory that sums of up to 32 rows of f32, or 64 of BF16, take.
    pub(crate) fn bytes(hidden: usize, ranks: usize) -> usize {
        SETS * SUMS * ranks * rank_bytes(hidden)
    }

    /// For the group of `sums`, whose exchange memory has [`Self::bytes`] for it.
    pub(crate) fn new(sums: &AllReduce, hidden: usize, layers: usize) -> Self {
        let exchange = sums.exchange();
        let ranks = exchange.ranks();
        assert!(
            exchange.options.pushed_bytes >= Self::bytes(hidden, ranks),
            "slots for pushed sums"
        );
        Self {
            arguments: exchange.arguments(sums.rank()),
            at: exchange.pushed_at() as u64,
            rank_bytes: rank_bytes(hidden),
            ranks,
            layers,
        }
    }

    /// What kernels are told of the group.
    pub(crate) fn arguments(&self) -> Arguments {
        self.arguments
    }

    /// The slots of a layer's sum: 0 after attention, 1 after the feed-forward layer.
    pub(crate) fn slots(&self, layer: usize, sum: usize) -> Slots {
        let of_sum = (set(layer, self.layers) * SUMS + sum) * self.ranks * self.rank_bytes;
        Slots {
            at: self.at + of_sum as u64,
            stride: self.rank_bytes as u32,
            padding: 0,
        }
    }
}

fn rank_bytes(hidden: usize) -> usize {
    F32_ROWS * hidden * size_of::<f32>()
}

/// Which slots a layer uses: others than the next layer, the first one after the last too.
pub(crate) fn set(layer: usize, layers: usize) -> usize {
    match layers % 2 == 1 && layer + 1 == layers {
        true => SETS - 1,
        false => layer % 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_layer_uses_what_the_next_one_does() {
        for layers in 2..20 {
            for layer in 0..layers {
                let next = (layer + 1) % layers;
                assert_ne!(set(layer, layers), set(next, layers), "{layer} of {layers}");
                assert!(set(layer, layers) < SETS);
            }
        }
    }
}
