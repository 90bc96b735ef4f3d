//! Blocks that somebody beside the engine holds: a lease, or a pull.

use baton_engine::BlockTable;

use super::EngineWaker;

/// Blocks held outside the engine. Giving them back wakes an engine that waits for blocks.
pub(crate) struct HeldBlocks {
    table: Option<BlockTable>,
    waker: EngineWaker,
}

impl HeldBlocks {
    pub(crate) fn new(table: BlockTable, waker: EngineWaker) -> Self {
        Self {
            table: Some(table),
            waker,
        }
    }

    pub(crate) fn table(&self) -> Option<&BlockTable> {
        self.table.as_ref()
    }

    /// Hands the blocks on.
    pub(crate) fn take(&mut self) -> Option<BlockTable> {
        self.table.take()
    }

    /// Counts the blocks as quarantined until they come back.
    pub(crate) fn quarantine(&mut self) {
        if let Some(table) = &mut self.table {
            table.quarantine();
        }
    }
}

impl Drop for HeldBlocks {
    fn drop(&mut self) {
        if self.table.take().is_some() {
            self.waker.wake();
        }
    }
}
