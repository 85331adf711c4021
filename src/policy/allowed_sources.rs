//! The source addresses and VLANs that anti-spoofing allows a guest.

use std::fmt;

use ipnet::IpNet;

use crate::net_config::MacAddress;

/// The source addresses and VLANs that a guest may use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AllowedSources {
    /// Ethernet addresses, at least one.
    pub macs: Vec<MacAddress>,
    /// IP addresses and prefixes; an empty list allows any. The IPv6 link-local addresses derived from `macs`
    /// (RFC 4291, appendix A) are always allowed.
    pub addresses: Vec<IpNet>,
    /// VLANs whose tags the guest may set itself.
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
