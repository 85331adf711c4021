use super::*;
use crate::frame::ethertype::{ARP, IPV4, IPV6};
use crate::frame::protocol::{ICMPV6, UDP};

const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const OTHER: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x57];

fn rules(addresses: &[&str], vlans: &[u16]) -> AntiSpoofing {
    let addresses = addresses.iter().map(|net| net.parse().unwrap()).collect();
    AntiSpoofing::new(AllowedSources {
        macs: vec![MacAddress(MAC)],
        addresses,
        vlans: vlans.to_vec(),
    })
}

fn strict() -> AntiSpoofing {
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
        (other_mac, DropReason::SpoofedMac),
        (ipv4([192, 0, 2, 6], 6, &[0; 20]), DropReason::SpoofedAddress),
        (ipv4([0; 4], UDP, &udp(9, 67)), DropReason::SpoofedAddress),
        (arp(OTHER, [192, 0, 2, 5]), DropReason::SpoofedMac),
        (arp(MAC, [192, 0, 2, 1]), DropReason::SpoofedAddress),
        (ipv6("2001:db8:1::7", 6, &[0; 20]), DropReason::SpoofedAddress),
        (ipv6("fe80::1", 6, &[0; 20]), DropReason::SpoofedAddress),
        (ipv6("::", UDP, &udp(1, 2)), DropReason::SpoofedAddress),
        (
            ipv6("2001:db8::7", ICMPV6, &neighbour(136, "fe80::1", 2, MAC)),
            DropReason::SpoofedAddress,
        ),
        (
            ipv6("2001:db8::7", ICMPV6, &neighbour(136, "2001:db8::7", 2, OTHER)),
            DropReason::SpoofedMac,
        ),
        (ipv6("::", ICMPV6, &neighbour(135, "fe80::1", 14, [0; 6])), DropReason::SpoofedAddress),
        (
            ipv6("2001:db8::7", ICMPV6, &[133, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1]),
            DropReason::SpoofedMac,
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
    assert_eq!(strict().check(&frame), Err(DropReason::Forbidden));
    frame[17] = 19;
    assert_eq!(strict().check(&frame), Err(DropReason::Forbidden));
    // A first fragment that holds an extension header only, and a harmless message behind it.
    let message = [&[60, 0, 0, 1, 0, 0, 0, 9], &[ICMPV6, 0, 1, 4, 0, 0, 0, 0], &[128; 16][..]];
    let mut frame = ipv6("2001:db8::7", 44, &message.concat());
    assert_eq!(strict().check(&frame), Ok(()));
    frame[19] = 16;
    assert_eq!(strict().check(&frame), Err(DropReason::Forbidden));
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
        assert_eq!(strict().check(&frame), Err(DropReason::Forbidden), "{frame:x?}");
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
        (&[8], Err(DropReason::ForbiddenVlan)),
        (&[7, 7], Err(DropReason::ForbiddenVlan)),
        (&[7, 0], Err(DropReason::ForbiddenVlan)),
    ] {
        assert_eq!(rules.check(&tagged(tags)), verdict, "{tags:x?}");
    }
}

#[test]
fn without_addresses_any_is_the_guests() {
    let rules = rules(&[], &[]);
    assert_eq!(rules.check(&ipv4([203, 0, 113, 1], 6, &[0; 20])), Ok(()));
    assert_eq!(rules.check(&arp(MAC, [203, 0, 113, 1])), Ok(()));
    assert_eq!(rules.check(&arp(OTHER, [203, 0, 113, 1])), Err(DropReason::SpoofedMac));
}
