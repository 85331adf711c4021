//! Changes to the options of a running port.

use serde::{Deserialize, Serialize};

use super::PortOptions;
use super::values::{List, Prefix, on_or_off};
use crate::net_config::MacAddress;
use crate::policy::{Filter, Limit};

/// Changes to a port that runs: the options that `ctl set` takes, and their new values.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
#[group(id = "changes", required = true, multiple = true)]
pub struct PortChanges {
    /// Limit what the guest sends, as 10mbit,5kpps.
    ///
    /// none removes the limit.
    #[arg(long, value_name = "RATE|none")]
    tx_limit: Option<Limit>,
    /// Limit what the guest receives, likewise.
    #[arg(long, value_name = "RATE|none")]
    rx_limit: Option<Limit>,
    /// Drop frames of the guest that these deny.
    ///
    /// none removes the rules.
    #[arg(long, value_name = "RULES|none")]
    tx_filter: Option<Filter>,
    /// Drop frames to the guest that these deny.
    ///
    /// none removes the rules.
    #[arg(long, value_name = "RULES|none")]
    rx_filter: Option<Filter>,
    /// Drop frames from other source addresses.
    ///
    /// The guest's own are --mac, --source-mac and --source-ip.
    #[arg(long, value_name = "on|off", value_parser = on_or_off(), hide_possible_values = true, action = clap::ArgAction::Set)]
    anti_spoofing: Option<bool>,
    /// Let the guest send from --mac and these.
    ///
    /// The value is MAC[,MAC…] or none.
    #[arg(long, value_name = "LIST|none")]
    source_mac: Option<List<MacAddress>>,
    /// Let the guest send from these IPs only.
    ///
    /// The value is PREFIX[,PREFIX…] or none. none allows any.
    #[arg(long, value_name = "LIST|none")]
    source_ip: Option<List<Prefix>>,
    /// Let the guest tag for these VLANs only.
    ///
    /// The value is N[,N…], 1 to 4094, or none.
    #[arg(long, value_name = "LIST|none")]
    vlan: Option<List<u16>>,
    /// Set the link state; off stops all traffic.
    #[arg(long, value_name = "on|off", value_parser = on_or_off(), hide_possible_values = true, action = clap::ArgAction::Set)]
    link: Option<bool>,
}

impl PortOptions {
    /// Returns these options with `changes` applied.
    pub fn with(self, changes: PortChanges) -> Self {
        PortOptions {
            tx_limit: changes.tx_limit.or(self.tx_limit),
            rx_limit: changes.rx_limit.or(self.rx_limit),
            tx_filter: changes.tx_filter.or(self.tx_filter),
            rx_filter: changes.rx_filter.or(self.rx_filter),
            anti_spoofing: changes.anti_spoofing.or(self.anti_spoofing),
            source_mac: changes.source_mac.map_or(self.source_mac, |list| list.0),
            source_ip: changes.source_ip.map_or(self.source_ip, |list| list.0),
            vlan: changes.vlan.map_or(self.vlan, |list| list.0),
            link: changes.link.or(self.link),
            ..self
        }
    }
}
