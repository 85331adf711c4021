//! Anti-spoofing: a guest uses its own addresses only, and acts neither as a router nor as a DHCP server.
//!
//! The rules follow cloud networks' port security and libvirt's filter `clean-traffic`. They check source addresses
//! (Ethernet, IPv4, IPv6), ARP (RFC 826) and neighbour discovery (RFC 4861). They forbid DHCP servers, router
//! advertisements and redirects, and VLANs that the operator has not named.
//!
//! A frame that cannot be checked is forbidden: other protocols, truncated headers, and headers hidden in fragments
//! (RFC 6980, RFC 7113).

mod ipv6;
#[cfg(test)]
mod tests;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::AllowedSources;
use crate::counters::DropReason;
use crate::frame::{Ipv4, Link, bytes_at, ethertype, first_vlan_tag, protocol, up_to};
use crate::net_config::MacAddress;

const DHCP_SERVER: u16 = 67;
const DHCP_CLIENT: u16 = 68;

/// Maximum number of VLAN tags: an inner tag would become effective behind the next switch.
const MAX_TAGS: usize = 1;

/// Prefix of the destinations of bridge protocols, such as spanning tree and LLDP: 01:80:c2:00:00:0x
/// (IEEE 802.1Q, table 8-1).
const BRIDGE_GROUP: [u8; 5] = [0x01, 0x80, 0xc2, 0, 0];

/// The anti-spoofing rules for one guest.
#[derive(Debug, PartialEq, Eq)]
pub struct AntiSpoofing {
    sources: AllowedSources,
    link_local: Vec<Ipv6Addr>,
}

/// The copied start of a frame, or a part of it. A read beyond its end means that the frame is forbidden.
#[derive(Clone, Copy)]
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn u8(self, at: usize) -> Result<u8, DropReason> {
        self.0.get(at).copied().ok_or(DropReason::Forbidden)
    }

    fn u16(self, at: usize) -> Result<u16, DropReason> {
        Ok(u16::from_be_bytes(self.array(at)?))
    }

    fn array<const N: usize>(self, at: usize) -> Result<[u8; N], DropReason> {
        bytes_at(self.0, at).ok_or(DropReason::Forbidden)
    }

    /// Returns the bytes before `end`, which may lie beyond the copy.
    fn up_to(self, end: usize) -> Bytes<'a> {
        Bytes(up_to(self.0, end))
    }

    fn from(self, at: usize) -> Result<Bytes<'a>, DropReason> {
        self.0.get(at..).map(Bytes).ok_or(DropReason::Forbidden)
    }
}

impl AntiSpoofing {
    /// Returns true if the guest may use an Ethernet address.
    pub fn is_own(&self, address: MacAddress) -> bool {
        self.sources.macs.contains(&address)
    }

    /// Creates the rules for a guest that may use `sources`.
    pub fn new(sources: AllowedSources) -> Self {
        let link_local = sources.macs.iter().map(ipv6::link_local).collect();
        AntiSpoofing { sources, link_local }
    }

    /// Checks a frame by its start: at least the Ethernet header, and the further headers that the rules test. The
    /// frame must be sent with exactly these bytes.
    ///
    /// # Errors
    /// The reason to drop the frame.
    pub fn check(&self, start: &[u8]) -> Result<(), DropReason> {
        let frame = Bytes(start);
        self.check_mac(frame, 6)?;
        if start.starts_with(&BRIDGE_GROUP) && start[5] <= 0xf {
            return Err(DropReason::Forbidden);
        }
        // A tag with VLAN 0 carries a priority only.
        if let Some(id) = first_vlan_tag(start).map(|tag| tag & 0xfff)
            && id != 0
            && !self.sources.vlans.contains(&id)
        {
            return Err(DropReason::ForbiddenVlan);
        }
        let Link { ethertype, network } =
            Link::parse(start, MAX_TAGS).ok_or(DropReason::Forbidden)?;
        let packet = frame.from(network)?;
        match ethertype {
            ethertype::IPV4 => self.check_ipv4(packet),
            ethertype::IPV6 => self.check_ipv6(packet),
            ethertype::ARP | ethertype::RARP => self.check_arp(packet),
            inner if ethertype::is_vlan_tag(inner) => Err(DropReason::ForbiddenVlan),
            _ => Err(DropReason::Forbidden),
        }
    }

    fn check_mac(&self, bytes: Bytes<'_>, at: usize) -> Result<(), DropReason> {
        let mac = MacAddress(bytes.array(at)?);
        if self.sources.macs.contains(&mac) { Ok(()) } else { Err(DropReason::SpoofedMac) }
    }

    fn check_address(&self, address: IpAddr) -> Result<(), DropReason> {
        let addresses = &self.sources.addresses;
        let own = addresses.is_empty()
            || addresses.iter().any(|net| net.contains(&address))
            || matches!(address, IpAddr::V6(address) if self.link_local.contains(&address));
        if own { Ok(()) } else { Err(DropReason::SpoofedAddress) }
    }

    fn check_arp(&self, packet: Bytes<'_>) -> Result<(), DropReason> {
        // Hardware type Ethernet, protocol IPv4, address lengths 6 and 4 bytes.
        if packet.array(0)? != [0, 1, 8, 0, 6, 4] {
            return Err(DropReason::Forbidden);
        }
        self.check_mac(packet, 8)?;
        let sender = Ipv4Addr::from(packet.array::<4>(14)?);
        // A probe (RFC 5227) has sender address 0.0.0.0.
        if sender.is_unspecified() { Ok(()) } else { self.check_address(sender.into()) }
    }

    fn check_ipv4(&self, packet: Bytes<'_>) -> Result<(), DropReason> {
        let header = Ipv4::parse(packet.0).ok_or(DropReason::Forbidden)?;
        let header_length = header.header_length();
        let length = header.total_length();
        if length < header_length {
            return Err(DropReason::Forbidden);
        }
        // Receivers ignore bytes behind the packet, so padding holds no headers.
        let packet = packet.up_to(length);
        let source = header.source();
        if header.fragment_offset() == 0 && header.protocol() == protocol::UDP {
            let from = packet.u16(header_length)?;
            let to = packet.u16(header_length + 2)?;
            if from == DHCP_SERVER {
                return Err(DropReason::Forbidden);
            }
            if source.is_unspecified() && from == DHCP_CLIENT && to == DHCP_SERVER {
                return Ok(());
            }
        }
        self.check_address(source.into())
    }
}
