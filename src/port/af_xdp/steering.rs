//! Bringing a guest's frames to its queue: a flow rule for its MAC address, and the card's filter for
//! addresses opened for it.
//!
//! The filter goes with the process. A rule stays behind a daemon that is killed; its successor
//! finds it and takes it over.

use std::io;

use log::{info, warn};

use super::OpenError;
use crate::net_config::MacAddress;
use crate::sys::flow::{AddressFilter, Rule, Rules};

/// A guest's frames come to a queue for as long as this lives.
#[derive(Debug)]
pub(super) struct Steering {
    device: u32,
    name: String,
    rules: Rules,
    rule: Rule,
    _filter: AddressFilter,
}

impl Steering {
    /// Brings frames for `address` to `queue` of the device `name`.
    ///
    /// # Errors
    /// The driver takes no such rule, or there is one that brings them to another queue.
    pub(super) fn new(
        name: &str,
        device: u32,
        address: MacAddress,
        queue: u32,
    ) -> Result<Self, OpenError> {
        let failed = |error: io::Error| {
            let hint = match error.raw_os_error() {
                Some(libc::EOPNOTSUPP | libc::EINVAL) => format!(
                    "; its driver takes no such rule, or not as the device is set up: try \
                     'ethtool -K {name} ntuple on'; without steer=mac, bring the guest's frames to \
                     queue {queue} another way"
                ),
                Some(libc::EPERM) => "; run with CAP_NET_ADMIN and CAP_NET_RAW".into(),
                _ => String::new(),
            };
            OpenError(format!(
                "bring frames for {address} to queue {queue} of {name}: {error}{hint}"
            ))
        };
        let filter = AddressFilter::new(device, address.0).map_err(failed)?;
        let rules = Rules::of(device).map_err(failed)?;
        let present = rules.list().map_err(failed)?;
        let rule = match present.iter().find(|rule| rule.address == address.0) {
            Some(rule) if rule.queue == u64::from(queue) => *rule,
            Some(Rule { queue: other, location, .. }) => {
                return Err(OpenError(format!(
                    "{name} has a flow rule that brings frames for {address} to queue {other}; \
                     if nobody needs it, 'ethtool -N {name} delete {location}'"
                )));
            }
            None => rules.insert(address.0, queue.into()).map_err(failed)?,
        };
        info!("af_xdp {name}: frames for {address} come to queue {queue}");
        Ok(Steering { device, name: name.to_owned(), rules, rule, _filter: filter })
    }

    /// Whether it is about the device of that index.
    pub(super) fn is_on(&self, device: u32) -> bool {
        self.device == device
    }
}

impl Drop for Steering {
    fn drop(&mut self) {
        match self.rules.delete(&self.rule) {
            // The device has gone, and its rules with it.
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
            Err(error) => warn!(
                "af_xdp {}: a flow rule stays, 'ethtool -N {} delete {}' removes it: {error}",
                self.name, self.name, self.rule.location
            ),
            Ok(()) => {}
        }
    }
}
