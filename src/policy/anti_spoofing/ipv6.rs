//! Anti-spoofing of IPv6, with neighbour discovery.

use std::net::Ipv6Addr;

use super::{AntiSpoofing, Bytes};
use crate::counters::DropReason;
use crate::frame::{Ipv6, Walk, protocol};
use crate::net_config::MacAddress;

const DHCPV6_SERVER: u16 = 547;

const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;

/// Extension headers that one packet may have.
const MAX_EXTENSIONS: usize = 7;

/// The ICMPv6 message of a packet.
struct Message<'a> {
    bytes: Bytes<'a>,
    source: Ipv6Addr,
    is_fragment: bool,
    /// Whether all of the packet is there.
    is_whole: bool,
}

impl AntiSpoofing {
    pub(super) fn check_ipv6(&self, packet: Bytes<'_>) -> Result<(), DropReason> {
        let header = Ipv6::parse(packet.0).ok_or(DropReason::Forbidden)?;
        // Receivers cut off what follows the packet: padding holds no headers.
        let length = header.total_length();
        let packet = packet.up_to(length);
        let source = header.source();
        let upper = Walk::over_all(MAX_EXTENSIONS)
            .walk(packet.0, header.next_header(), Ipv6::LENGTH)
            .ok_or(DropReason::Forbidden)?;
        // A later fragment has none.
        let payload = upper.transport.map(|at| packet.from(at)).transpose()?;
        let icmp = payload.filter(|_| upper.protocol == protocol::ICMPV6);
        if let Some(bytes) = icmp {
            let is_whole = packet.0.len() == length;
            let is_fragment = upper.is_fragment;
            self.check_icmpv6(&Message { bytes, source, is_fragment, is_whole })?;
        } else if let Some(udp) = payload.filter(|_| upper.protocol == protocol::UDP)
            && udp.u16(0)? == DHCPV6_SERVER
        {
            return Err(DropReason::Forbidden);
        }
        // Of a guest that has no address yet, and looks whether somebody else has it.
        if source.is_unspecified() && icmp.is_some() {
            return Ok(());
        }
        self.check_address(source.into())
    }

    fn check_icmpv6(&self, message: &Message<'_>) -> Result<(), DropReason> {
        let Message { bytes, source, is_fragment, is_whole } = *message;
        let kind = bytes.u8(0)?;
        let options = match kind {
            ROUTER_ADVERTISEMENT | REDIRECT => return Err(DropReason::Forbidden),
            ROUTER_SOLICITATION => 8,
            NEIGHBOUR_SOLICITATION | NEIGHBOUR_ADVERTISEMENT => 24,
            _ => return Ok(()),
        };
        if is_fragment {
            return Err(DropReason::Forbidden);
        }
        // An advertisement claims its target, and so does a solicitation by nobody.
        let claims = kind == NEIGHBOUR_ADVERTISEMENT
            || (kind == NEIGHBOUR_SOLICITATION && source.is_unspecified());
        if claims {
            self.check_address(Ipv6Addr::from(bytes.array::<16>(8)?).into())?;
        }
        // Link-layer addresses of source and target, up to the packet's end.
        if !is_whole {
            return Err(DropReason::Forbidden);
        }
        let mut at = options;
        while at < bytes.0.len() {
            let length = usize::from(bytes.u8(at + 1)?) * 8;
            if length == 0 {
                return Err(DropReason::Forbidden);
            }
            if matches!(bytes.u8(at)?, 1 | 2) {
                self.check_mac(bytes, at + 2)?;
            }
            at += length;
        }
        Ok(())
    }
}

/// The interface's link-local address by modified EUI-64.
pub(super) fn link_local(mac: &MacAddress) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.0.map(u16::from);
    Ipv6Addr::new(0xfe80, 0, 0, 0, (a ^ 2) << 8 | b, c << 8 | 0xff, 0xfe00 | d, e << 8 | f)
}
