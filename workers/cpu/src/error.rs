//! Why an executor could not be made.

use std::fmt;

use crate::kernel::KERNEL_VARIABLE;

/// Why a CPU executor could not be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CpuError {
    /// A weight could not be read.
    Weight {
        /// Its name in the checkpoint.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The model is of a kind that this executor does not compute.
    Unsupported(String),
    /// The arena does not fit the model.
    Arena(String),
    /// This CPU does not have the kernel that was asked for.
    Kernel(String),
    /// [`crate::KERNEL_VARIABLE`] names no kernel.
    KernelName(String),
}

impl fmt::Display for CpuError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Weight { name, reason } => write!(f, "weight {name}: {reason}"),
            Self::Unsupported(what) => write!(f, "the CPU executor cannot run this model: {what}"),
            Self::Arena(what) => write!(f, "the KV arena does not fit the model: {what}"),
            Self::Kernel(kernel) => write!(
                f,
                "this CPU cannot run the {kernel} kernel; leave the choice open ({KERNEL_VARIABLE} unset) to get the best it can"
            ),
            Self::KernelName(reason) => write!(f, "{KERNEL_VARIABLE}: {reason}"),
        }
    }
}

impl std::error::Error for CpuError {}
