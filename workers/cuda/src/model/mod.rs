//! A model on one GPU, or on several as ranks.

pub(crate) mod attention;
mod buffers;
mod chain;
pub(crate) mod rank;
mod steps;
mod tensor_parallel;
pub(crate) mod weights;

use std::sync::Arc;

use baton_model::{ModelSpec, TensorSource};

use crate::error::CudaError;
use crate::gpu::device::Device;
use crate::options::CudaOptions;
use crate::ranks::{AllReduce, ExchangeOptions, PushedSums};
use rank::{Place, RankModel};

/// A loaded model: of each rank its part, on a GPU of its own.
pub struct CudaModel {
    pub(crate) ranks: Vec<RankModel>,
    /// The whole one.
    pub(crate) spec: ModelSpec,
}

impl CudaModel {
    /// Copies the weights to the GPUs, compiles the kernels and allocates the activations, on all GPUs at the same time. There is a
    /// source for each, with its rank's part of the model; devices that are several are of [`crate::open_group`].
    ///
    /// # Errors
    /// [`CudaError`] says what is missing, what does not fit, or which weight is wrong, and with several GPUs on which.
    ///
    /// # Panics
    /// If there are not as many sources as devices.
    pub fn load(
        devices: &[Arc<Device>],
        spec: &ModelSpec,
        sources: &[&dyn TensorSource],
        options: CudaOptions,
    ) -> Result<Self, CudaError> {
        assert_eq!(devices.len(), sources.len(), "a rank has a GPU and weights");
        let ranks = devices.len();
        let is_hopper = |device: &Arc<Device>| device.capability() == (9, 0);
        let pushes = devices.iter().all(|d| is_hopper(d) && !d.is_shared());
        let load = |rank: usize| {
            let place = Place {
                rank,
                ranks,
                pushes,
            };
            RankModel::load(&devices[rank], spec, sources[rank], options, place)
        };
        let mut model = Self {
            ranks: on_all(devices, &|rank| load(rank))?,
            spec: spec.clone(),
        };
        if ranks > 1 {
            model.join(devices)?;
        }
        Ok(model)
    }

    /// Makes a group of its ranks.
    fn join(&mut self, devices: &[Arc<Device>]) -> Result<(), CudaError> {
        let hidden = self.spec.hidden;
        let mut options = ExchangeOptions::default();
        if self.ranks.iter().any(RankModel::pushes) {
            options.pushed_bytes = PushedSums::bytes(hidden, devices.len());
        }
        let ends = AllReduce::open(devices, options)?;
        let embeddings: Vec<_> = self.ranks.iter().map(RankModel::embedding_at).collect();
        let chains = self.ranks.iter().all(RankModel::has_chain);
        for (rank, end) in self.ranks.iter_mut().zip(ends) {
            rank.join(end, &embeddings, chains)?;
        }
        Ok(())
    }

    /// What became of the weights, as a sentence for whoever starts a worker.
    pub fn weights_text(&self) -> String {
        let text = self.ranks[0].weights_text();
        match self.ranks.len() {
            1 => text,
            ranks => format!("on each of {ranks} GPUs {text}"),
        }
    }

    /// Bytes of weights that a step of one row reads, on one GPU.
    pub fn streamed_bytes(&self) -> usize {
        self.ranks[0].streamed_bytes()
    }

    /// The GPUs it is on, by rank.
    pub fn devices(&self) -> Vec<Arc<Device>> {
        self.ranks.iter().map(|rank| rank.device.clone()).collect()
    }
}

/// What each rank's thread gives. Of several errors that of the first rank.
pub(crate) fn on_all<T: Send>(
    devices: &[Arc<Device>],
    work: &(dyn Fn(usize) -> Result<T, CudaError> + Sync),
) -> Result<Vec<T>, CudaError> {
    if devices.len() == 1 {
        return Ok(vec![work(0)?]);
    }
    let done: Vec<Result<T, CudaError>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..devices.len())
            .map(|rank| scope.spawn(move || work(rank)))
            .collect();
        let threads = threads.into_iter();
        threads
            .map(|thread| thread.join().expect("loading does not panic"))
            .collect()
    });
    let done = done.into_iter().zip(devices);
    done.map(|(done, device)| done.map_err(|error| error.on(device.ordinal())))
        .collect()
}
