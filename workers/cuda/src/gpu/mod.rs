//! The GPU without a model: the driver's objects as values that free themselves, its libraries, kernels from source to launch.

pub(crate) mod compile;
pub(crate) mod device;
pub(crate) mod event;
pub(crate) mod graph;
pub(crate) mod host_slots;
pub(crate) mod kernel;
pub(crate) mod libraries;
pub(crate) mod report;
pub mod sources;
pub(crate) mod tensor_map;
