//! Changes of the memory table.

use std::sync::Arc;

use log::{debug, info};

use super::{Answer, Device, refused};
use crate::guest::{GuestMemory, Unmapped};

impl Device {
    /// Replaces the memory table, also while rings run: their sessions end, and new ones begin.
    ///
    /// # Errors
    /// The memory must be sealed and is not, or a running ring is not in it.
    pub(super) fn replace_memory(&mut self, memory: GuestMemory) -> Answer {
        if self.requires_sealed_memory && !memory.is_sealed() {
            return refused(
                "its file can be truncated, and --require-sealed-memory is set; give the guest \
                 memory from memory-backend-memfd, which seals it",
            );
        }
        let memory = memory.logged(self.frontend.memory.log().cloned())?;
        let memory = memory.recorded(self.frontend.inflight.clone());
        for (index, ring) in self.frontend.rings.iter().enumerate() {
            if ring.is_running() && ring.layout(&memory).is_err() {
                return refused(format!("ring {index} runs in memory that the request removes"));
            }
        }
        self.end_all();
        debug!("{}: memory table replaced regions={}", self.name, memory.len());
        let known = self.frontend.memory.unmapped();
        for Unmapped { request, .. } in memory.unmapped() {
            if !known.iter().any(|region| region.request == *request) {
                info!(
                    "{}: memory region not mapped address={:#x} bytes={}; its file is on a disk or \
                     read-only, and no ring or buffer can lie there",
                    self.name, request.guest_address, request.size,
                );
            }
        }
        if !memory.is_sealed() && self.frontend.memory.is_sealed() {
            info!(
                "{}: guest memory is not sealed; a process that truncates its file stops this port",
                self.name
            );
        }
        self.frontend.memory = Arc::new(memory);
        self.restart_all();
        Ok(None)
    }
}
