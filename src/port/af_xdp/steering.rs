//! Steering of a guest's frames to its queue: a flow rule for its MAC address, and that address in the NIC's
//! address filter.
//!
//! The kernel removes the filter's entry when the process ends. A flow rule outlives a killed daemon; the
//! next daemon finds the rule and takes it over.

use std::io;

use log::{info, warn};

use super::OpenError;
use crate::net_config::MacAddress;
use crate::sys::flow::{AddressFilter, Rule, Rules};

/// Flow rule and filter entry for one MAC address, which are removed on drop.
#[derive(Debug)]
pub(super) struct Steering {
    device: u32,
    name: String,
    rules: Rules,
    rule: Rule,
    _filter: AddressFilter,
}

impl Steering {
    /// Steers frames for `address` to `queue` of the device `name`.
    ///
    /// # Errors
    /// The driver refuses the rule, or a rule steers the frames to another queue.
    pub(super) fn new(
        name: &str,
        device: u32,
        address: MacAddress,
        queue: u32,
    ) -> Result<Self, OpenError> {
        let failed = |error: io::Error| {
            let hint = match error.raw_os_error() {
                Some(libc::EOPNOTSUPP | libc::EINVAL) => format!(
                    "; the driver takes no such rule, or not with the device's settings: try \
                     'ethtool -K {name} ntuple on', or steer the frames another way, without \
                     steer=mac"
                ),
                Some(libc::EPERM) => "; run with CAP_NET_ADMIN and CAP_NET_RAW".into(),
                _ => String::new(),
            };
            OpenError(format!(
                "cannot steer frames for {address} to queue {queue} of {name}: {error}{hint}"
            ))
        };
        let filter = AddressFilter::new(device, address.0).map_err(failed)?;
        let rules = Rules::of(device).map_err(failed)?;
        let present = rules.list().map_err(failed)?;
        let rule = match present.iter().find(|rule| rule.address == address.0) {
            Some(rule) if rule.queue == u64::from(queue) => *rule,
            Some(Rule { queue: other, location, .. }) => {
                return Err(OpenError(format!(
                    "cannot steer frames for {address} to queue {queue} of {name}: a flow rule steers \
                     them to queue {other}; if it is unused, run 'ethtool -N {name} delete {location}'"
                )));
            }
            None => rules.insert(address.0, queue.into()).map_err(failed)?,
        };
        info!("af_xdp {name}: flow rule active address={address} queue={queue}");
        Ok(Steering { device, name: name.to_owned(), rules, rule, _filter: filter })
    }

    /// Returns true if the rule is on the device with index `device`.
    pub(super) fn is_on(&self, device: u32) -> bool {
        self.device == device
    }
}

impl Drop for Steering {
    fn drop(&mut self) {
        match self.rules.delete(&self.rule) {
            // The device is gone, with its rules.
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
            Err(error) => warn!(
                "af_xdp {}: cannot delete the flow rule: {error}; run 'ethtool -N {} delete {}'",
                self.name, self.name, self.rule.location
            ),
            Ok(()) => {}
        }
    }
}
