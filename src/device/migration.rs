//! A guest that moves: what is written to its memory is noted while it leaves, and where it arrives its
//! address is announced.

use std::fs::File;
use std::sync::Arc;

use log::info;

use super::{Answer, Device, Refusal, refused};
use crate::guest::{Allowance, DirtyLog};
use crate::net_config::MacAddress;

impl Device {
    /// Takes another dirty log (SET_LOG_BASE). When this returns, the last one is not written to any
    /// more: cloud-hypervisor reads it then.
    pub(super) fn set_log(&mut self, file: File, offset: u64, size: u64) -> Result<(), Refusal> {
        let replaced = self.told.log.as_ref().map_or(0, |it| it.mapped_bytes());
        let allowance = Allowance::new(&self.quota, replaced);
        let log = Arc::new(DirtyLog::map(file, offset, size, &allowance)?);
        let before = self.told.log.replace(log);
        self.log_memory().inspect_err(|_| self.told.log = before)
    }

    /// Has what is written to memory noted, or not, as the features and the log say now.
    pub(super) fn log_memory(&mut self) -> Result<(), Refusal> {
        let logs = self.told.features.is_some_and(|features| features.logs());
        if logs && self.told.log.is_none() {
            return refused("LOG_ALL was set before there was a dirty log (SET_LOG_BASE)");
        }
        let log = if logs { self.told.log.clone() } else { None };
        if log.is_none() && self.told.memory.log().is_none() {
            return Ok(());
        }
        let memory = self.told.memory.logged(log)?;
        self.end_all();
        let what = if logs { "noted in the frontend's dirty log" } else { "not noted any more" };
        info!("{}: what is written to guest memory is {what}", self.name);
        self.told.memory = Arc::new(memory);
        self.restart_all();
        Ok(())
    }

    /// Tells the port's network where the card is now (SEND_RARP).
    pub(super) fn announce(&mut self, address: [u8; 6]) -> Answer {
        let Some(announcer) = &self.announcer else {
            return refused("the port has no network to announce the card on");
        };
        if self.rules.as_ref().is_some_and(|rules| !rules.is_own(MacAddress(address))) {
            return refused(format!("{} is not the guest's address", MacAddress(address)));
        }
        if !self.config.link {
            return refused(format!("cannot announce {}: the link is off", MacAddress(address)));
        }
        match announcer.announce(address) {
            Ok(()) => info!("{}: {} is announced", self.name, MacAddress(address)),
            Err(error) => return refused(format!("announce {}: {error}", MacAddress(address))),
        }
        Ok(None)
    }
}
