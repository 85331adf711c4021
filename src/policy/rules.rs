//! Anti-spoofing: a guest speaks for itself only, and not as a router or a DHCP server.
//!
//! The rules are those of cloud networks' port security and of libvirt's filter `clean-traffic`:
//! source addresses (Ethernet, IPv4, IPv6), ARP (RFC 826), neighbour discovery (RFC 4861), no DHCP
//! server, no router advertisement or redirect, and, of VLANs, those that are named. What can't be
//! judged does not pass: other protocols, headers that are cut short, and headers hidden in
//! fragments (RFC 6980, RFC 7113).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::Identity;
use crate::counters::Drop;
use crate::net_config::MacAddress;

const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const RARP: u16 = 0x8035;
const IPV6: u16 = 0x86dd;
const VLAN: [u16; 3] = [0x8100, 0x88a8, 0x9100];

const UDP: u8 = 17;
const ICMPV6: u8 = 58;
const DHCP_SERVER: u16 = 67;
const DHCP_CLIENT: u16 = 68;
const DHCPV6_SERVER: u16 = 547;

const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;

/// Destinations of bridges' own protocols, such as spanning tree and LLDP: 01:80:c2:00:00:0x
/// (IEEE 802.1Q, table 8-1).
const BRIDGES: [u8; 5] = [0x01, 0x80, 0xc2, 0, 0];

/// Extension headers that one packet may have.
const MAX_EXTENSIONS: usize = 8;

/// What a frame from the guest is judged by.
#[derive(Debug, PartialEq, Eq)]
pub struct Rules {
    identity: Identity,
    link_local: Vec<Ipv6Addr>,
}

/// The copied start of a frame, or a part of it. What it does not hold is forbidden.
#[derive(Clone, Copy)]
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn u8(self, at: usize) -> Result<u8, Drop> {
        self.0.get(at).copied().ok_or(Drop::Forbidden)
    }

    fn u16(self, at: usize) -> Result<u16, Drop> {
        Ok(u16::from_be_bytes(self.array(at)?))
    }

    fn array<const N: usize>(self, at: usize) -> Result<[u8; N], Drop> {
        let bytes = self.0.get(at..).and_then(|rest| rest.first_chunk());
        bytes.copied().ok_or(Drop::Forbidden)
    }

    /// Up to an end that may lie behind what was copied.
    fn up_to(self, end: usize) -> Bytes<'a> {
        Bytes(self.0.get(..end).unwrap_or(self.0))
    }

    fn from(self, at: usize) -> Result<Bytes<'a>, Drop> {
        self.0.get(at..).map(Bytes).ok_or(Drop::Forbidden)
    }
}

/// An IPv6 packet behind its extension headers.
struct Upper<'a> {
    protocol: u8,
    /// Its transport header, and what follows; nothing in a later fragment.
    payload: Option<Bytes<'a>>,
    is_fragment: bool,
}

impl Rules {
    /// Whether an Ethernet address is the guest's.
    pub fn is_own(&self, address: MacAddress) -> bool {
        self.identity.macs.contains(&address)
    }

    /// Rules for a guest.
    pub fn new(identity: Identity) -> Self {
        let link_local = identity.macs.iter().map(link_local).collect();
        Rules { identity, link_local }
    }

    /// Judges a frame by its start: at least the Ethernet header, and as much of the rest as rules
    /// need to see. The frame must be sent with these very bytes.
    ///
    /// # Errors
    /// Why it must be dropped.
    pub fn check(&self, start: &[u8]) -> Result<(), Drop> {
        let frame = Bytes(start);
        self.check_mac(frame, 6)?;
        if start.starts_with(&BRIDGES) && start[5] <= 0xf {
            return Err(Drop::Forbidden);
        }
        let (mut at, mut ethertype) = (14, frame.u16(12)?);
        if VLAN.contains(&ethertype) {
            // The VLAN 0 is none: such a tag has a priority only.
            let id = frame.u16(14)? & 0xfff;
            if id != 0 && !self.identity.vlans.contains(&id) {
                return Err(Drop::ForbiddenVlan);
            }
            (at, ethertype) = (18, frame.u16(16)?);
        }
        let packet = frame.from(at)?;
        match ethertype {
            IPV4 => self.check_ipv4(packet),
            IPV6 => self.check_ipv6(packet),
            ARP | RARP => self.check_arp(packet),
            // A tag within a tag would be the next switch's to read.
            inner if VLAN.contains(&inner) => Err(Drop::ForbiddenVlan),
            _ => Err(Drop::Forbidden),
        }
    }

    fn check_mac(&self, bytes: Bytes<'_>, at: usize) -> Result<(), Drop> {
        let mac = MacAddress(bytes.array(at)?);
        if self.identity.macs.contains(&mac) { Ok(()) } else { Err(Drop::SpoofedMac) }
    }

    fn check_address(&self, address: IpAddr) -> Result<(), Drop> {
        let addresses = &self.identity.addresses;
        let own = addresses.is_empty()
            || addresses.iter().any(|net| net.contains(&address))
            || matches!(address, IpAddr::V6(address) if self.link_local.contains(&address));
        if own { Ok(()) } else { Err(Drop::SpoofedAddress) }
    }

    fn check_arp(&self, packet: Bytes<'_>) -> Result<(), Drop> {
        // Ethernet and IPv4, six and four bytes long.
        if packet.array(0)? != [0, 1, 8, 0, 6, 4] {
            return Err(Drop::Forbidden);
        }
        self.check_mac(packet, 8)?;
        let sender = Ipv4Addr::from(packet.array::<4>(14)?);
        // A probe (RFC 5227) has no address yet.
        if sender.is_unspecified() { Ok(()) } else { self.check_address(sender.into()) }
    }

    fn check_ipv4(&self, packet: Bytes<'_>) -> Result<(), Drop> {
        let first = packet.u8(0)?;
        let header_length = usize::from(first & 0xf) * 4;
        if first >> 4 != 4 || header_length < 20 {
            return Err(Drop::Forbidden);
        }
        let length = usize::from(packet.u16(2)?);
        if length < header_length {
            return Err(Drop::Forbidden);
        }
        // Receivers cut off what follows the packet: padding holds no headers.
        let packet = packet.up_to(length);
        let source = Ipv4Addr::from(packet.array::<4>(12)?);
        let is_first = packet.u16(6)? & 0x1fff == 0;
        if is_first && packet.u8(9)? == UDP {
            let from = packet.u16(header_length)?;
            let to = packet.u16(header_length + 2)?;
            if from == DHCP_SERVER {
                return Err(Drop::Forbidden);
            }
            if source.is_unspecified() && from == DHCP_CLIENT && to == DHCP_SERVER {
                return Ok(());
            }
        }
        self.check_address(source.into())
    }

    fn check_ipv6(&self, packet: Bytes<'_>) -> Result<(), Drop> {
        if packet.u8(0)? >> 4 != 6 {
            return Err(Drop::Forbidden);
        }
        let packet = packet.up_to(40 + usize::from(packet.u16(4)?));
        let source = Ipv6Addr::from(packet.array::<16>(8)?);
        let upper = skip_extensions(packet)?;
        let icmp = upper.payload.filter(|_| upper.protocol == ICMPV6);
        if let Some(message) = icmp {
            self.check_icmpv6(message, packet, &upper, source)?;
        } else if let Some(udp) = upper.payload.filter(|_| upper.protocol == UDP)
            && udp.u16(0)? == DHCPV6_SERVER
        {
            return Err(Drop::Forbidden);
        }
        // Of a guest that has no address yet, and looks whether somebody else has it.
        if source.is_unspecified() && icmp.is_some() {
            return Ok(());
        }
        self.check_address(source.into())
    }

    fn check_icmpv6(
        &self,
        message: Bytes<'_>,
        packet: Bytes<'_>,
        upper: &Upper<'_>,
        source: Ipv6Addr,
    ) -> Result<(), Drop> {
        let kind = message.u8(0)?;
        let options = match kind {
            ROUTER_ADVERTISEMENT | REDIRECT => return Err(Drop::Forbidden),
            ROUTER_SOLICITATION => 8,
            NEIGHBOUR_SOLICITATION | NEIGHBOUR_ADVERTISEMENT => 24,
            _ => return Ok(()),
        };
        if upper.is_fragment {
            return Err(Drop::Forbidden);
        }
        // An advertisement claims its target, and so does a solicitation by nobody.
        let claims = kind == NEIGHBOUR_ADVERTISEMENT
            || (kind == NEIGHBOUR_SOLICITATION && source.is_unspecified());
        if claims {
            self.check_address(Ipv6Addr::from(message.array::<16>(8)?).into())?;
        }
        // Link-layer addresses of source and target, up to the packet's end.
        let end = 40 + usize::from(packet.u16(4)?);
        if packet.0.len() < end {
            return Err(Drop::Forbidden);
        }
        let mut at = options;
        while at < message.0.len() {
            let length = usize::from(message.u8(at + 1)?) * 8;
            if length == 0 {
                return Err(Drop::Forbidden);
            }
            if matches!(message.u8(at)?, 1 | 2) {
                self.check_mac(message, at + 2)?;
            }
            at += length;
        }
        Ok(())
    }
}

/// The interface's link-local address by modified EUI-64.
fn link_local(mac: &MacAddress) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.0.map(u16::from);
    Ipv6Addr::new(0xfe80, 0, 0, 0, (a ^ 2) << 8 | b, c << 8 | 0xff, 0xfe00 | d, e << 8 | f)
}

/// Walks over the extension headers of an IPv6 packet (RFC 8200, section 4).
fn skip_extensions(packet: Bytes<'_>) -> Result<Upper<'_>, Drop> {
    const OPTIONS: [u8; 6] = [0, 43, 60, 135, 139, 140];
    const FRAGMENT: u8 = 44;
    const AUTHENTICATION: u8 = 51;
    let (mut protocol, mut rest) = (packet.u8(6)?, packet.from(40)?);
    let mut is_fragment = false;
    for _ in 0..MAX_EXTENSIONS {
        let length = match protocol {
            FRAGMENT => {
                if rest.u16(2)? >> 3 != 0 {
                    return Ok(Upper { protocol: rest.u8(0)?, payload: None, is_fragment: true });
                }
                is_fragment = true;
                8
            }
            AUTHENTICATION => (usize::from(rest.u8(1)?) + 2) * 4,
            extension if OPTIONS.contains(&extension) => (usize::from(rest.u8(1)?) + 1) * 8,
            _ => return Ok(Upper { protocol, payload: Some(rest), is_fragment }),
        };
        (protocol, rest) = (rest.u8(0)?, rest.from(length)?);
    }
    Err(Drop::Forbidden)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
    const OTHER: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x57];

    fn rules(addresses: &[&str], vlans: &[u16]) -> Rules {
        let addresses = addresses.iter().map(|net| net.parse().unwrap()).collect();
        Rules::new(Identity { macs: vec![MacAddress(MAC)], addresses, vlans: vlans.to_vec() })
    }

    fn strict() -> Rules {
        rules(&["192.0.2.5/32", "2001:db8::/64"], &[])
    }

    fn ethernet(ethertype: u16, packet: &[u8]) -> Vec<u8> {
        [&[0x33, 0x33, 0, 0, 0, 1], &MAC[..], &ethertype.to_be_bytes(), packet].concat()
    }

    fn ipv4(source: [u8; 4], protocol: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, (20 + payload.len()) as u8, 0, 0, 0, 0, 64, protocol];
        packet.extend([0, 0]);
        packet.extend(source);
        packet.extend([198, 51, 100, 1]);
        packet.extend(payload);
        ethernet(IPV4, &packet)
    }

    fn ipv6(source: &str, protocol: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x60, 0, 0, 0, 0, payload.len() as u8, protocol, 255];
        packet.extend(source.parse::<Ipv6Addr>().unwrap().octets());
        packet.extend("ff02::1".parse::<Ipv6Addr>().unwrap().octets());
        packet.extend(payload);
        ethernet(IPV6, &packet)
    }

    fn arp(mac: [u8; 6], address: [u8; 4]) -> Vec<u8> {
        let rest = [&[0, 1, 8, 0, 6, 4, 0, 2], &mac[..], &address[..], &[0; 10]].concat();
        ethernet(ARP, &rest)
    }

    /// A solicitation or advertisement with one option.
    fn neighbour(kind: u8, target: &str, option: u8, mac: [u8; 6]) -> Vec<u8> {
        let target = target.parse::<Ipv6Addr>().unwrap().octets();
        [&[kind, 0, 0, 0, 0, 0, 0, 0], &target[..], &[option, 1], &mac[..]].concat()
    }

    fn udp(from: u16, to: u16) -> Vec<u8> {
        [from.to_be_bytes(), to.to_be_bytes(), [0, 8], [0, 0]].concat()
    }

    #[test]
    fn a_guest_may_speak_for_itself() {
        let frames = [
            ipv4([192, 0, 2, 5], 6, &[0; 20]),
            ipv4([192, 0, 2, 5], UDP, &udp(68, 67)),
            ipv4([0; 4], UDP, &udp(68, 67)),
            arp(MAC, [192, 0, 2, 5]),
            arp(MAC, [0; 4]),
            ipv6("2001:db8::7", 6, &[0; 20]),
            // Its own link-local address, by its MAC address.
            ipv6("fe80::5054:ff:fe12:3456", UDP, &udp(546, 547)),
            ipv6("::", ICMPV6, &neighbour(135, "2001:db8::7", 14, [0; 6])),
            ipv6("2001:db8::7", ICMPV6, &neighbour(135, "2001:db8::1", 1, MAC)),
            ipv6("2001:db8::7", ICMPV6, &neighbour(136, "2001:db8::7", 2, MAC)),
            ipv6("::", ICMPV6, &[133, 0, 0, 0, 0, 0, 0, 0]),
            // A listener report, behind a hop-by-hop header.
            ipv6("::", 0, &[&[ICMPV6, 0, 5, 2, 0, 0, 1, 0][..], &[143, 0, 0, 0]].concat()),
            // A later fragment.
            ipv6("2001:db8::7", 44, &[UDP, 0, 0, 8, 0, 0, 0, 1, 9, 9]),
        ];
        for frame in frames {
            assert_eq!(strict().check(&frame), Ok(()), "{frame:x?}");
        }
    }

    #[test]
    fn a_guest_may_not_speak_for_others() {
        let mut other_mac = ipv4([192, 0, 2, 5], 6, &[0; 20]);
        other_mac[6..12].copy_from_slice(&OTHER);
        let frames = [
            (other_mac, Drop::SpoofedMac),
            (ipv4([192, 0, 2, 6], 6, &[0; 20]), Drop::SpoofedAddress),
            (ipv4([0; 4], UDP, &udp(9, 67)), Drop::SpoofedAddress),
            (arp(OTHER, [192, 0, 2, 5]), Drop::SpoofedMac),
            (arp(MAC, [192, 0, 2, 1]), Drop::SpoofedAddress),
            (ipv6("2001:db8:1::7", 6, &[0; 20]), Drop::SpoofedAddress),
            (ipv6("fe80::1", 6, &[0; 20]), Drop::SpoofedAddress),
            (ipv6("::", UDP, &udp(1, 2)), Drop::SpoofedAddress),
            (ipv6("2001:db8::7", ICMPV6, &neighbour(136, "fe80::1", 2, MAC)), Drop::SpoofedAddress),
            (
                ipv6("2001:db8::7", ICMPV6, &neighbour(136, "2001:db8::7", 2, OTHER)),
                Drop::SpoofedMac,
            ),
            (ipv6("::", ICMPV6, &neighbour(135, "fe80::1", 14, [0; 6])), Drop::SpoofedAddress),
            (
                ipv6("2001:db8::7", ICMPV6, &[133, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1]),
                Drop::SpoofedMac,
            ),
        ];
        for (frame, reason) in frames {
            assert_eq!(strict().check(&frame), Err(reason), "{frame:x?}");
        }
    }

    #[test]
    fn headers_in_padding_are_forbidden() {
        let mut frame = ipv4([192, 0, 2, 5], UDP, &udp(9, 9));
        frame[17] = 20;
        assert_eq!(strict().check(&frame), Err(Drop::Forbidden));
        frame[17] = 19;
        assert_eq!(strict().check(&frame), Err(Drop::Forbidden));
        // A first fragment that holds an extension header only, and a harmless message behind it.
        let message = [&[60, 0, 0, 1, 0, 0, 0, 9], &[ICMPV6, 0, 1, 4, 0, 0, 0, 0], &[128; 16][..]];
        let mut frame = ipv6("2001:db8::7", 44, &message.concat());
        assert_eq!(strict().check(&frame), Ok(()));
        frame[19] = 16;
        assert_eq!(strict().check(&frame), Err(Drop::Forbidden));
    }

    #[test]
    fn a_guest_is_no_router_no_server_and_no_bridge() {
        let advertisement = [134, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let hidden = |extension: u8, header: &[u8]| {
            ipv6("2001:db8::7", extension, &[header, &advertisement].concat())
        };
        let mut spanning_tree = ethernet(0x26, &[0x42, 0x42, 3]);
        spanning_tree[..6].copy_from_slice(&[1, 0x80, 0xc2, 0, 0, 0]);
        let frames = [
            ipv4([192, 0, 2, 5], UDP, &udp(67, 68)),
            ipv6("2001:db8::7", UDP, &udp(547, 546)),
            ipv6("2001:db8::7", ICMPV6, &advertisement),
            ipv6("2001:db8::7", ICMPV6, &[137, 0, 0, 0]),
            hidden(0, &[ICMPV6, 0, 0, 0, 0, 0, 0, 0]),
            hidden(44, &[ICMPV6, 0, 0, 1, 0, 0, 0, 1]),
            // A destination header that reaches beyond what was copied.
            hidden(60, &[ICMPV6, 200, 0, 0, 0, 0, 0, 0]),
            // A neighbour's solicitation in a fragment, and an option without a length.
            ipv6(
                "2001:db8::7",
                44,
                &[&[ICMPV6, 0, 0, 1, 0, 0, 0, 1], &neighbour(135, "::", 1, MAC)[..]].concat(),
            ),
            ipv6("2001:db8::7", ICMPV6, &[133, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]),
            // UDP whose ports are in the next fragment.
            ipv4([192, 0, 2, 5], UDP, &[0]),
            ethernet(0x88cc, &[0; 40]),
            ethernet(0x0806, &[0, 6, 8, 0, 6, 4, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            ethernet(IPV6, &[0x45; 60]),
            ethernet(IPV4, &[0x44; 60]),
            spanning_tree,
        ];
        for frame in frames {
            assert_eq!(strict().check(&frame), Err(Drop::Forbidden), "{frame:x?}");
        }
    }

    #[test]
    fn a_frame_cut_short_at_any_byte_is_dropped_or_shows_enough() {
        let whole = ipv6("2001:db8::7", ICMPV6, &neighbour(136, "2001:db8::7", 2, MAC));
        for length in 14..whole.len() {
            assert!(strict().check(&whole[..length]).is_err(), "{length}");
        }
    }

    #[test]
    fn a_guest_sets_the_tags_it_was_given() {
        let tagged = |tags: &[u16]| {
            let mut frame = ipv4([192, 0, 2, 5], 6, &[0; 20]);
            for &tag in tags {
                let tag = [0x8100_u16.to_be_bytes(), tag.to_be_bytes()].concat();
                frame.splice(12..12, tag);
            }
            frame
        };
        let rules = rules(&["192.0.2.0/24"], &[7]);
        for (tags, verdict) in [
            (&[][..], Ok(())),
            (&[7], Ok(())),
            (&[0xe007], Ok(())),
            (&[0x2000], Ok(())),
            (&[8], Err(Drop::ForbiddenVlan)),
            (&[7, 7], Err(Drop::ForbiddenVlan)),
            (&[7, 0], Err(Drop::ForbiddenVlan)),
        ] {
            assert_eq!(rules.check(&tagged(tags)), verdict, "{tags:x?}");
        }
    }

    #[test]
    fn without_addresses_any_is_the_guests() {
        let rules = rules(&[], &[]);
        assert_eq!(rules.check(&ipv4([203, 0, 113, 1], 6, &[0; 20])), Ok(()));
        assert_eq!(rules.check(&arp(MAC, [203, 0, 113, 1])), Ok(()));
        assert_eq!(rules.check(&arp(OTHER, [203, 0, 113, 1])), Err(Drop::SpoofedMac));
    }
}
