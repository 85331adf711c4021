//! Live migration: the dirty log on the source host, and the announcement of the guest's MAC address on the
//! destination host.

use std::fs::File;
use std::sync::Arc;

use log::info;

use super::{Answer, Device, Refusal, refused};
use crate::guest::{Allowance, DirtyLog};
use crate::net_config::MacAddress;

impl Device {
    /// Replaces the dirty log (SET_LOG_BASE). When this returns, no worker writes to the previous log, which
    /// cloud-hypervisor then reads.
    pub(super) fn set_log(&mut self, file: File, offset: u64, size: u64) -> Result<(), Refusal> {
        let replaced = self.frontend.log.as_ref().map_or(0, |it| it.mapped_bytes());
        let allowance = Allowance::new(&self.quota, replaced);
        let log = Arc::new(DirtyLog::map(file, offset, size, &allowance)?);
        let before = self.frontend.log.replace(log);
        self.log_memory().inspect_err(|_| self.frontend.log = before)
    }

    /// Turns dirty logging on or off, as LOG_ALL and the frontend's log require.
    ///
    /// # Errors
    /// LOG_ALL is negotiated, and the frontend has set no log.
    pub(super) fn log_memory(&mut self) -> Result<(), Refusal> {
        let logs = self.frontend.features.is_some_and(|features| features.logs());
        if logs && self.frontend.log.is_none() {
            return refused("LOG_ALL was set before SET_LOG_BASE");
        }
        let log = if logs { self.frontend.log.clone() } else { None };
        if log.is_none() && self.frontend.memory.log().is_none() {
            return Ok(());
        }
        let memory = self.frontend.memory.logged(log)?;
        self.end_all();
        if logs {
            info!("{}: dirty logging started", self.name);
        } else {
            info!("{}: dirty logging stopped", self.name);
        }
        self.frontend.memory = Arc::new(memory);
        self.restart_all();
        Ok(())
    }

    /// Announces the guest's MAC address on the port's network (SEND_RARP).
    pub(super) fn announce(&mut self, address: [u8; 6]) -> Answer {
        let Some(announcer) = &self.announcer else {
            return refused("cannot announce the guest: a loopback port has no network");
        };
        if self.anti_spoofing.as_ref().is_some_and(|rules| !rules.is_own(MacAddress(address))) {
            return refused(format!("{} is not the guest's address", MacAddress(address)));
        }
        if !self.config.link {
            return refused(format!("cannot announce {}: the link is off", MacAddress(address)));
        }
        match announcer.announce(address) {
            Ok(()) => info!("{}: guest announced mac={}", self.name, MacAddress(address)),
            Err(error) => {
                return refused(format!("cannot announce {}: {error}", MacAddress(address)));
            }
        }
        Ok(None)
    }
}
