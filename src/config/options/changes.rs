//! Changes to the options of a port that runs.

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
    /// Limit what the guest sends, as 100mbit or 10kpps; none removes the limit.
    #[arg(long, value_name = "RATE")]
    tx_limit: Option<Limit>,
    /// Limit what the guest is given; none removes the limit.
    #[arg(long, value_name = "RATE")]
    rx_limit: Option<Limit>,
    /// Drop what these rules deny of the guest's frames; none removes them.
    #[arg(long, value_name = "RULES")]
    tx_filter: Option<Filter>,
    /// Drop what these rules deny of frames to the guest; none removes them.
    #[arg(long, value_name = "RULES")]
    rx_filter: Option<Filter>,
    /// Drop frames from addresses that are not the guest's own.
    #[arg(long, value_name = "on|off", value_parser = on_or_off(), hide_possible_values = true, action = clap::ArgAction::Set)]
    anti_spoofing: Option<bool>,
    /// Let the guest send from these Ethernet addresses besides --mac, and from no others.
    #[arg(long, value_name = "MAC[,MAC…]|none")]
    source_mac: Option<List<MacAddress>>,
    /// Let the guest send from these IP addresses or prefixes only; none allows any.
    #[arg(long, value_name = "PREFIX[,PREFIX…]|none")]
    source_ip: Option<List<Prefix>>,
    /// Let the guest tag frames for these VLANs, and for no others.
    #[arg(long, value_name = "N[,N…]|none")]
    vlan: Option<List<u16>>,
    /// Set the link state; off stops frames in both directions.
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
