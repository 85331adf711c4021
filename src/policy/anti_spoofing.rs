//! Anti-spoofing: a guest speaks for itself only, and not as a router or a DHCP server.
//!
//! The rules are those of cloud networks' port security and of libvirt's filter `clean-traffic`:
//! source addresses (Ethernet, IPv4, IPv6), ARP (RFC 826), neighbour discovery (RFC 4861), no DHCP
//! server, no router advertisement or redirect, and, of VLANs, those that are named. What can't be
//! judged does not pass: other protocols, headers that are cut short, and headers hidden in
//! fragments (RFC 6980, RFC 7113).

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

/// VLAN tags that are read: a tag within a tag would be the next switch's to read.
const MAX_TAGS: usize = 1;

/// Destinations of bridges' own protocols, such as spanning tree and LLDP: 01:80:c2:00:00:0x
/// (IEEE 802.1Q, table 8-1).
const BRIDGES: [u8; 5] = [0x01, 0x80, 0xc2, 0, 0];

/// What a frame from the guest is judged by.
#[derive(Debug, PartialEq, Eq)]
pub struct AntiSpoofing {
    sources: AllowedSources,
    link_local: Vec<Ipv6Addr>,
}

/// The copied start of a frame, or a part of it. What it does not hold is forbidden.
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

    /// Up to an end that may lie behind what was copied.
    fn up_to(self, end: usize) -> Bytes<'a> {
        Bytes(up_to(self.0, end))
    }

    fn from(self, at: usize) -> Result<Bytes<'a>, DropReason> {
        self.0.get(at..).map(Bytes).ok_or(DropReason::Forbidden)
    }
}

impl AntiSpoofing {
    /// Whether an Ethernet address is the guest's.
    pub fn is_own(&self, address: MacAddress) -> bool {
        self.sources.macs.contains(&address)
    }

    /// Checks for a guest that owns `sources`.
    pub fn new(sources: AllowedSources) -> Self {
        let link_local = sources.macs.iter().map(ipv6::link_local).collect();
        AntiSpoofing { sources, link_local }
    }

    /// Judges a frame by its start: at least the Ethernet header, and as much of the rest as rules
    /// need to see. The frame must be sent with these very bytes.
    ///
    /// # Errors
    /// Why it must be dropped.
    pub fn check(&self, start: &[u8]) -> Result<(), DropReason> {
        let frame = Bytes(start);
        self.check_mac(frame, 6)?;
        if start.starts_with(&BRIDGES) && start[5] <= 0xf {
            return Err(DropReason::Forbidden);
        }
        // The VLAN 0 is none: such a tag has a priority only.
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
        // Ethernet and IPv4, six and four bytes long.
        if packet.array(0)? != [0, 1, 8, 0, 6, 4] {
            return Err(DropReason::Forbidden);
        }
        self.check_mac(packet, 8)?;
        let sender = Ipv4Addr::from(packet.array::<4>(14)?);
        // A probe (RFC 5227) has no address yet.
        if sender.is_unspecified() { Ok(()) } else { self.check_address(sender.into()) }
    }

    fn check_ipv4(&self, packet: Bytes<'_>) -> Result<(), DropReason> {
        let header = Ipv4::parse(packet.0).ok_or(DropReason::Forbidden)?;
        let header_length = header.header_length();
        let length = header.total_length();
        if length < header_length {
            return Err(DropReason::Forbidden);
        }
        // Receivers cut off what follows the packet: padding holds no headers.
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
