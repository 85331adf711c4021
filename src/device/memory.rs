//! The memory table.

use std::sync::Arc;

use log::{debug, info};

use super::{Answer, Device, refused};
use crate::guest::{GuestMemory, Unmapped};

impl Device {
    /// Puts a new memory table in force, under running rings if need be.
    pub(super) fn replace_memory(&mut self, memory: GuestMemory) -> Answer {
        if self.requires_sealed_memory && !memory.is_sealed() {
            return refused(
                "its file can be truncated, and --require-sealed-memory is set; give the guest \
                 memory from memory-backend-memfd, which seals it",
            );
        }
        let memory = memory.logged(self.told.memory.log().cloned())?;
        let memory = memory.recorded(self.told.inflight.clone());
        for (index, ring) in self.told.rings.iter().enumerate() {
            if ring.is_running() && ring.layout(&memory).is_err() {
                return refused(format!("ring {index} runs in memory that would go"));
            }
        }
        self.end_all();
        debug!("{}: {} memory regions", self.name, memory.len());
        let known = self.told.memory.unmapped();
        for Unmapped { request, .. } in memory.unmapped() {
            if !known.iter().any(|region| region.request == *request) {
                info!(
                    "{}: memory region not mapped address={:#x} bytes={}; its file is on a disk or \
                     read-only, and no ring or buffer can lie there",
                    self.name, request.guest_address, request.size,
                );
            }
        }
        if !memory.is_sealed() && self.told.memory.is_sealed() {
            info!(
                "{}: guest memory is not sealed: whoever can truncate its file can stop this port",
                self.name
            );
        }
        self.told.memory = Arc::new(memory);
        self.restart_all();
        Ok(None)
    }
}
