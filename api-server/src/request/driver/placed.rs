//! What a generation takes of its worker, as this server's router counts it.

use std::sync::Arc;

use crate::fleet::router::Outstanding;
use crate::request::lifecycle::Target;
use crate::server::Server;

/// Counts a job on its worker for as long as it lives.
pub(super) struct Placed {
    server: Arc<Server>,
    target: Target,
    job: Outstanding,
    /// It was taken: its end leaves a place.
    pub(super) admitted: bool,
}

impl Placed {
    pub(super) fn new(server: &Arc<Server>, target: &Target, job: Outstanding) -> Self {
        server.fleet().begin(&target.worker, job);
        Self {
            server: Arc::clone(server),
            target: target.clone(),
            job,
            admitted: false,
        }
    }
}

impl Drop for Placed {
    fn drop(&mut self) {
        self.server.fleet().end(&self.target.worker, self.job);
        if self.admitted {
            self.server.decode_room.made();
        }
    }
}
