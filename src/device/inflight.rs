//! The inflight buffer, for frontends that keep one for the next backend (cloud-hypervisor). The daemon writes it
//! and never relies on its content: the used index in guest memory says where a ring resumes.

use std::fs::File;
use std::sync::Arc;

use super::{Answer, Device, Refusal, refused};
use crate::guest::layout::MAX_SIZE;
use crate::guest::{Allowance, Inflight};
use crate::protocol::Reply;
use crate::sys::process::sealed_memory;

impl Device {
    /// Creates an inflight buffer (GET_INFLIGHT_FD).
    pub(super) fn make_inflight(&self, rings: u16, size: u16) -> Result<Reply, Refusal> {
        self.check_inflight(rings, size)?;
        let length = Inflight::length(rings, size);
        let file = sealed_memory(c"inflight", length).map_err(|error| {
            Refusal::Refused(format!("cannot make an inflight buffer: {error}"))
        })?;
        Ok(Reply::Inflight { length, rings, size, file })
    }

    /// Maps an inflight buffer, created by this daemon or its predecessor (SET_INFLIGHT_FD), and ignores its content.
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
            return refused(format!(
                "cannot map an inflight buffer of {length} bytes: {rings} rings of {size} descriptors need \
                 {needed}"
            ));
        }
        let replaced = self.frontend.inflight.as_ref().map_or(0, |it| it.mapped_bytes());
        let allowance = Allowance::new(&self.quota, replaced);
        let inflight = Arc::new(Inflight::map(file, offset, (rings, size), &allowance)?);
        self.end_all();
        self.frontend.inflight = Some(inflight.clone());
        self.frontend.memory = Arc::new(self.frontend.memory.recorded(Some(inflight)));
        self.restart_all();
        Ok(None)
    }

    fn check_inflight(&self, rings: u16, size: u16) -> Result<(), Refusal> {
        // The control virtqueue needs no entries: the worker answers a command before it takes the next.
        let most = 2 * self.workers.len();
        if rings == 0 || usize::from(rings) > most || size == 0 || size > MAX_SIZE {
            return refused(format!(
                "cannot use an inflight buffer for {rings} rings of {size} descriptors: the port has {most} \
                 rings of at most {MAX_SIZE}"
            ));
        }
        Ok(())
    }
}
