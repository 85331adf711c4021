//! Changes of a running port. Invariant: every difference is applied, or none.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::channel;

use log::info;

use super::control::ControlCommand;
use super::{Origin, Port, Refusal};
use crate::config::{PortConfig, PortOptions};
use crate::policy::AntiSpoofing;

impl Port {
    /// Applies every difference between `options` and the present ones, or none.
    pub(super) fn change(&mut self, options: PortOptions, origin: Origin) -> Result<bool, Refusal> {
        let config = options.check().map_err(Refusal::CannotBeDone)?;
        let fixed = self.config.fixed_differences(&config);
        if !fixed.is_empty() {
            return Err(Refusal::NeedsRestart(fixed));
        }
        if config.is_live_equal(&self.config) {
            return Ok(false);
        }
        match self.send_change(&config) {
            Ok(set) => set.map_err(|error| {
                Refusal::CannotBeDone(format!(
                    "cannot set rx-filter: {error}; the port is unchanged"
                ))
            })?,
            Err(refusal) => {
                self.undo_change(&config);
                return Err(refusal);
            }
        }
        // None of the following steps can fail.
        if config.tx_filter != self.config.tx_filter {
            self.status.filters.tx.set(config.tx_filter.clone());
        }
        let limits = &self.status.limits;
        for (limiter, limit) in [(&limits.tx, config.tx_limit), (&limits.rx, config.rx_limit)] {
            if limiter.limit() != limit {
                limiter.set(&limit);
            }
        }
        let policies = self.config.policy().into_iter().zip(config.policy());
        for ((what, old), (_, new)) in policies.filter(|(old, new)| old != new) {
            info!("{}: {what} set {origin} from=\"{old}\" to=\"{new}\"", self.name());
        }
        self.config = config;
        Ok(true)
    }

    /// Makes the control thread apply its part of the change. The rx filter comes first: if the device refuses the
    /// filter, nothing has changed.
    fn send_change(&self, config: &PortConfig) -> Result<io::Result<()>, Refusal> {
        if config.rx_filter != self.config.rx_filter {
            let filter = config.rx_filter.clone();
            let set: io::Result<()> =
                self.request(|done| ControlCommand::RxFilter(filter, done))?;
            if set.is_err() {
                return Ok(set);
            }
        }
        if config.allowed_sources != self.config.allowed_sources {
            let rules = config
                .allowed_sources
                .clone()
                .map(|identity| Arc::new(AntiSpoofing::new(identity)));
            self.request(|done| ControlCommand::AntiSpoofing(rules, done))?;
        }
        if config.link != self.config.link {
            self.request(|done| ControlCommand::Link(config.link, done))?;
        }
        Ok(Ok(()))
    }

    /// Makes the control thread restore the old options, after it has not answered in time. The thread receives
    /// these commands after those that it has not carried out yet.
    fn undo_change(&self, config: &PortConfig) {
        let old = &self.config;
        if config.rx_filter != old.rx_filter {
            self.send(ControlCommand::RxFilter(old.rx_filter.clone(), channel().0));
        }
        if config.allowed_sources != old.allowed_sources {
            let rules =
                old.allowed_sources.clone().map(|identity| Arc::new(AntiSpoofing::new(identity)));
            self.send(ControlCommand::AntiSpoofing(rules, channel().0));
        }
        if config.link != old.link {
            self.send(ControlCommand::Link(old.link, channel().0));
        }
    }
}
