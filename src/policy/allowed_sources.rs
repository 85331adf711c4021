//! Who a guest is, for anti-spoofing.

use std::fmt;

use ipnet::IpNet;

use crate::net_config::MacAddress;

/// Who a guest is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AllowedSources {
    /// Its Ethernet addresses; there is at least one.
    pub macs: Vec<MacAddress>,
    /// Its IP addresses; none: any. The IPv6 link-local addresses that follow from its Ethernet
    /// addresses (RFC 4291, appendix A) are its own anyway.
    pub addresses: Vec<IpNet>,
    /// VLANs whose tags it may set itself.
    pub vlans: Vec<u16>,
}

impl fmt::Display for AllowedSources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |items: Vec<String>| match items.len() {
            0 => "none".to_owned(),
            _ => items.join(","),
        };
        let macs = list(self.macs.iter().map(ToString::to_string).collect());
        let vlans = list(self.vlans.iter().map(ToString::to_string).collect());
        let ips = match self.addresses.len() {
            0 => "any".to_owned(),
            _ => list(self.addresses.iter().map(ToString::to_string).collect()),
        };
        write!(f, "on, mac {macs}, ip {ips}, vlan {vlans}")
    }
}
