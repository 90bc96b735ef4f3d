//! What keeps a worker from running.

use std::fmt;
use std::path::PathBuf;

use baton_bus::BusError;

/// Why [`crate::run()`] ended other than by its shutdown.
#[derive(Debug)]
pub enum WorkerError {
    /// A setting that cannot be used.
    Config {
        /// Which setting, what is wrong with it, and what would do.
        detail: String,
    },
    /// The model directory cannot be used.
    Model {
        /// Which directory.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// The executor did not start.
    Device {
        /// Which device.
        device: String,
        /// Why.
        detail: String,
    },
    /// KV transfer did not start.
    Transfer {
        /// Why.
        detail: String,
    },
    /// The bus was not reached.
    Bus(BusError),
    /// The executor broke or hangs, or KV transfer does. The worker said so in its beats for a while, and left.
    Failed {
        /// What broke.
        detail: String,
    },
    /// The operating system refused something.
    System {
        /// What was asked.
        what: &'static str,
        /// Why it was refused.
        detail: String,
    },
}

impl fmt::Display for WorkerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Config { detail } => write!(f, "configuration: {detail}"),
            Self::Model { path, detail } => {
                write!(f, "model directory {}: {detail}", path.display())
            }
            Self::Device { device, detail } => write!(f, "device {device}: {detail}"),
            Self::Transfer { detail } => write!(
                f,
                "KV transfer did not start: {detail}. Install UCX (libucx0 or a libucx wheel), or run role \"both\", which needs none"
            ),
            Self::Bus(error) => error.fmt(f),
            Self::Failed { detail } => write!(f, "out of service: {detail}"),
            Self::System { what, detail } => write!(f, "{what}: {detail}"),
        }
    }
}

impl std::error::Error for WorkerError {}
