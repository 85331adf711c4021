//! The inflight buffer, for frontends that keep one for the next backend (cloud-hypervisor).

use std::fs::File;
use std::sync::Arc;

use super::{Answer, Device, Refusal, refused};
use crate::guest::layout::MAX_SIZE;
use crate::guest::{Allowance, Inflight};
use crate::protocol::Reply;
use crate::sys::process::sealed_memory;

impl Device {
    /// Makes a buffer (GET_INFLIGHT_FD).
    pub(super) fn make_inflight(&self, rings: u16, size: u16) -> Result<Reply, Refusal> {
        self.check_inflight(rings, size)?;
        let length = Inflight::length(rings, size);
        let file = sealed_memory(c"inflight", length)
            .map_err(|error| Refusal::Refused(format!("make an inflight buffer: {error}")))?;
        Ok(Reply::Inflight { length, rings, size, file })
    }

    /// Takes a buffer, made by us or our predecessor (SET_INFLIGHT_FD). What it holds does not count.
    pub(super) fn set_inflight(
        &mut self,
        file: File,
        offset: u64,
        length: u64,
        (rings, size): (u16, u16),
    ) -> Answer {
        self.check_inflight(rings, size)?;
        let needed = Inflight::length(rings, size);
        if length < needed {
            return refused(format!("{length} bytes are too few for {rings} rings: {needed}"));
        }
        let replaced = self.told.inflight.as_ref().map_or(0, |it| it.mapped_bytes());
        let allowance = Allowance::new(&self.quota, replaced);
        let inflight = Arc::new(Inflight::map(file, offset, (rings, size), &allowance)?);
        self.end_all();
        self.told.inflight = Some(inflight.clone());
        self.told.memory = Arc::new(self.told.memory.recorded(Some(inflight)));
        self.restart_all();
        Ok(None)
    }

    fn check_inflight(&self, rings: u16, size: u16) -> Result<(), Refusal> {
        // Commands are answered at once: none is in flight.
        let most = 2 * self.workers.len();
        if rings == 0 || usize::from(rings) > most || size == 0 || size > MAX_SIZE {
            return refused(format!(
                "an inflight buffer for {rings} rings of {size}: the port has {most}, of {MAX_SIZE} at \
                 the most"
            ));
        }
        Ok(())
    }
}
