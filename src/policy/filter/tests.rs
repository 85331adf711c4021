//! The three judges agree, whatever the filter and the frame; and what they say is what was meant.

#[allow(unreachable_pub)]
#[path = "../../../tests/fuzz/receiver.rs"]
mod receiver;

use std::cell::RefCell;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::ifaddrs::{InterfaceAddress, getifaddrs};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, bind, send, socket,
};
use nix::unistd::geteuid;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

use super::*;
use receiver::{check_received, received, run};

use crate::sys::bpf::Program;
use crate::sys::bpf::instructions::{add, copy, exit};
use crate::sys::tap::{ProgramMemory, Queue};

/// The filter as an XDP program that passes what is allowed.
fn load(filter: &Filter) -> std::io::Result<Program> {
    let mut program = vec![copy(9, 1)];
    program.extend(extended(filter));
    // XDP_DROP is 1, XDP_PASS 2.
    program.extend([add(0, 1), exit()]);
    Program::load("vun_test", &program)
}

/// Whether this machine lets us load programs.
fn can_load() -> bool {
    let can = load(&Filter::default()).is_ok();
    if !can {
        eprintln!("XDP programs are not tried: that takes CAP_BPF and CAP_NET_ADMIN");
    }
    can
}

fn term() -> impl Strategy<Value = String> {
    let protocol = select(vec![
        "tcp",
        "udp",
        "sctp",
        "icmp",
        "icmp6",
        "ip",
        "ip6",
        "arp",
        "other",
        "proto 47",
        "proto 50",
        "proto 89",
        "ethertype 0x88cc",
    ]);
    let prefix = select(vec![
        "0.0.0.0/0",
        "192.0.2.0/24",
        "192.0.2.1",
        "192.0.2.128/25",
        "::/0",
        "2001:db8::/32",
        "2001:db8::1",
        "2001:db8:0:0:8000::/65",
        "2001:db8::/127",
    ]);
    let ports = select(vec!["1", "2", "0-1", "1-3", "65535", "0-65535", "3-65535"]);
    prop_oneof![
        protocol.prop_map(String::from),
        (select(vec!["from", "to"]), prefix).prop_map(|(word, net)| format!("{word} {net}")),
        (select(vec!["sport", "dport"]), ports).prop_map(|(word, range)| format!("{word} {range}")),
    ]
}

/// Filters, of whose rules the senseless ones are left out.
fn filters() -> impl Strategy<Value = Filter> {
    let action = || select(vec!["allow", "deny"]);
    let rule = (action(), vec(term(), 1..4)).prop_map(|(word, terms)| {
        let rule = format!("{word} {}", terms.join(" "));
        let sound = format!("{rule}; default deny").parse::<Filter>().is_ok();
        if sound { rule } else { String::new() }
    });
    (vec(rule, 0..12), action()).prop_map(|(rules, default)| {
        format!("{}; default {default}", rules.join(";")).parse().unwrap()
    })
}

/// Frames of few kinds, in every way that headers can follow each other, and cut short.
fn frames() -> impl Strategy<Value = Vec<u8>> {
    let tags = vec(select(vec![0x8100u16, 0x88a8, 0x9100]), 0..4);
    let ethertype = prop_oneof![
        8 => Just(0x0800u16), 8 => Just(0x86dd), 1 => Just(0x0806), 1 => Just(0x88cc), 1 => Just(38),
        1 => Just(0x8035), 1 => Just(0x8847), 1 => Just(0x9200),
    ];
    let protocol = select(vec![6u8, 17, 132, 33, 136, 1, 58, 50, 89, 59, 0, 44, 51, 60, 4, 41, 47]);
    let extension = (select(vec![0u8, 43, 60, 135, 139, 140, 44, 51]), 0u8..4, any::<u16>());
    let version = prop_oneof![12 => Just(None), 1 => any::<u8>().prop_map(Some)];
    let fragment = prop_oneof![3 => Just(0u16), 1 => any::<u16>(), 1 => Just(0x2000)];
    let addresses = select(vec![0u8, 1, 2, 127, 128, 255]);
    let ports = select(vec![0u8, 1, 2, 3, 4, 255]);
    let cut = prop_oneof![2 => Just(None), 1 => any::<u16>().prop_map(Some)];
    // How many bytes the IP packet is shorter than what follows, or any other length.
    let lie = prop_oneof![4 => Just(0u16), 2 => Just(8), 2 => 0u16..80, 1 => any::<u16>()];
    (
        tags,
        ethertype,
        protocol,
        vec(extension, 0..8),
        version,
        (fragment, 5u8..16),
        [addresses.clone(), addresses],
        [ports.clone(), ports],
        (cut, lie, 0usize..30),
    )
        .prop_map(
            |(tags, ethertype, protocol, extensions, version, ip, addresses, ports, ends)| {
                let (cut, lie, padding) = ends;
                let mut frame = vec![2; 12];
                for tag in tags {
                    frame.extend(tag.to_be_bytes());
                    frame.extend([0, 7]);
                }
                frame.extend(ethertype.to_be_bytes());
                let network = frame.len();
                let (fragment, words) = ip;
                if ethertype == 0x0800 {
                    frame.extend([0x40 | words, 0, 0, 0, 0, 0]);
                    frame.extend(fragment.to_be_bytes());
                    frame.extend([
                        64,
                        protocol,
                        0,
                        0,
                        192,
                        0,
                        2,
                        addresses[0],
                        192,
                        0,
                        2,
                        addresses[1],
                    ]);
                    frame.resize(network + usize::from(words) * 4, 1);
                } else if ethertype == 0x86dd {
                    frame.extend([0x60, 0, 0, 0, 0, 0, 0, 64]);
                    for last in addresses {
                        frame
                            .extend([0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, last, 0, 0, 0, 0, 0, 0, last]);
                    }
                    let mut next = network + 6;
                    for (kind, length, fragment) in extensions {
                        frame[next] = kind;
                        next = frame.len();
                        let offset = if fragment & 3 == 0 { fragment } else { fragment & 7 };
                        frame.extend([0, length]);
                        frame.extend(offset.to_be_bytes());
                        let size = match kind {
                            44 => 8,
                            51 => (usize::from(length) + 2) * 4,
                            _ => (usize::from(length) + 1) * 8,
                        };
                        frame.resize(next + size.max(4), 0);
                    }
                    frame[next] = protocol;
                }
                if let Some(version) = version {
                    frame.resize(frame.len().max(network + 1), 0);
                    frame[network] = version;
                }
                frame.extend([0, ports[0], 0, ports[1], 0, 0, 0, 0]);
                let length = (frame.len() - network) as u16;
                let place = match ethertype {
                    0x0800 => Some((network + 2, length)),
                    0x86dd => Some((network + 4, length - 40)),
                    _ => None,
                };
                if let Some((at, length)) = place {
                    frame[at..at + 2].copy_from_slice(&length.wrapping_sub(lie).to_be_bytes());
                }
                frame.resize(frame.len() + padding, 1);
                if let Some(cut) = cut {
                    frame.truncate((usize::from(cut) % (frame.len() + 1)).max(14));
                }
                frame
            },
        )
}

fn passes(filter: &str, frame: &[u8]) -> bool {
    filter.parse::<Filter>().unwrap().check(frame).is_ok()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn no_receiver_sees_what_was_denied(frames in vec(frames(), 1..20)) {
        frames.iter().for_each(|frame| check_received(frame, passes));
    }

    #[test]
    fn the_judges_agree(filter in filters(), frames in vec(frames(), 1..20)) {
        prop_assert_eq!(filter.to_string().parse::<Filter>(), Ok(filter.clone()));
        let program = classic(&filter);
        prop_assert!(program.len() <= MAX_INSTRUCTIONS);
        for frame in frames {
            let passes = filter.check(&frame).is_ok();
            prop_assert_eq!(run(&program, &frame) != 0, passes, "{} of {:02x?}", filter, frame);
        }
    }
}

#[test]
fn the_kernel_s_xdp_program_agrees_too() {
    use proptest::test_runner::TestRunner;
    if !can_load() {
        return;
    }
    let mut runner = TestRunner::new(ProptestConfig::with_cases(100));
    runner
        .run(&(filters(), vec(frames(), 40)), |(filter, frames)| {
            let program = load(&filter).unwrap_or_else(|error| panic!("{filter}: {error}"));
            for frame in frames {
                let passes = filter.check(&frame).is_ok();
                let verdict = program.verdict(&frame).unwrap();
                prop_assert_eq!(verdict == 2, passes, "{} of {:02x?}", filter, frame);
            }
            Ok(())
        })
        .unwrap();
}

/// A TAP in a fresh namespace, and a socket that sends frames to whoever reads it.
fn tap() -> (Queue, OwnedFd) {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    // The host's own frames would come between.
    std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
    let queue = Queue::open("tap0", false).unwrap();
    crate::sys::device::set_up(&queue.identity().name).unwrap();
    let protocol = Some(SockProtocol::EthAll);
    let wire =
        socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_NONBLOCK, protocol).unwrap();
    let is_tap = |interface: &InterfaceAddress| interface.interface_name == "tap0";
    let mut addresses = getifaddrs().unwrap().filter(is_tap);
    let address = addresses.find_map(|interface| interface.address?.as_link_addr().copied());
    bind(wire.as_raw_fd(), &address.unwrap()).unwrap();
    // The kernel drops frames until it has noticed that there is a carrier.
    while !queue.discard() {
        send(wire.as_raw_fd(), &[0; 60], MsgFlags::empty()).unwrap();
    }
    while queue.discard() {}
    (queue, wire)
}

#[test]
fn the_kernel_s_classic_program_agrees_too() {
    use proptest::test_runner::TestRunner;
    if !geteuid().is_root() {
        eprintln!("classic programs are not tried: that takes root, for a TAP");
        return;
    }
    let (queue, wire) = tap();
    let memory = RefCell::new(ProgramMemory::new().unwrap());
    let mut runner = TestRunner::new(ProptestConfig::with_cases(200));
    runner
        .run(&(filters(), vec(frames(), 40)), |(filter, frames)| {
            memory
                .borrow_mut()
                .set(&queue, &classic(&filter))
                .unwrap_or_else(|error| panic!("{filter}: {error}"));
            for frame in frames {
                let passes = filter.check(&frame).is_ok();
                send(wire.as_raw_fd(), &frame, MsgFlags::empty()).unwrap();
                prop_assert_eq!(queue.discard(), passes, "{} of {:02x?}", filter, frame);
            }
            Ok(())
        })
        .unwrap();
}

#[test]
fn the_longest_filters_are_taken() {
    for rule in [
        "deny tcp sport 1-9 dport 1-9 from 2001:db8::1 to 2001:db8::2;",
        "deny sport 1-9 dport 1-9 from 2001:db8::/63 to 2001:db8::/127;",
        "allow udp sport 1-9 dport 1-9 from 192.0.2.0/25 to 192.0.2.0/25;",
    ] {
        let filter = (rule.repeat(MAX_RULES) + "default allow").parse::<Filter>().unwrap();
        let program = classic(&filter);
        assert!(program.len() <= MAX_INSTRUCTIONS, "{} instructions", program.len());
        // The ethertype is that of no rule, and carries nothing.
        assert_eq!(run(&program, &[0x88; 60]), u32::MAX);
        if can_load() {
            load(&filter).unwrap_or_else(|error| panic!("{filter}: {error}"));
        }
    }
}

/// An IPv4 frame of a protocol, its first bytes behind the header, and how far from the start of
/// the packet it is (in units of eight bytes).
fn ipv4(protocol: u8, transport: &[u8], fragment: u8) -> Vec<u8> {
    let mut frame = vec![2; 12];
    let length = 20 + transport.len() as u8;
    frame.extend([8, 0, 0x45, 0, 0, length, 0, 0, 0, fragment, 64, protocol, 0, 0]);
    frame.extend([192, 0, 2, 1, 198, 51, 100, 1]);
    frame.extend(transport);
    frame
}

#[test]
fn what_can_t_be_known_counts_against_the_frame() {
    let passes =
        |filter: &str, frame: &[u8]| filter.parse::<Filter>().unwrap().check(frame).is_ok();
    let (deny, allow) = ("deny tcp dport 25; default allow", "allow tcp dport 25; default deny");
    let smtp = ipv4(6, &[0, 9, 0, 25], 0);
    assert!(!passes(deny, &smtp));
    assert!(passes(allow, &smtp));
    let web = ipv4(6, &[0, 9, 0, 80], 0);
    assert!(passes(deny, &web));
    assert!(!passes(allow, &web));
    let mut thrice = web.clone();
    (0..3).for_each(|_| drop(thrice.splice(12..12, [0x81, 0, 0, 7])));
    for unknown in [ipv4(6, &[0, 9, 0, 80], 1), ipv4(6, &[0, 9, 0], 0), thrice, web[..30].to_vec()]
    {
        assert!(!passes(deny, &unknown), "{unknown:02x?}");
        assert!(!passes(allow, &unknown), "{unknown:02x?}");
    }
    // Of another protocol: it has no such port.
    for other in [ipv4(17, &[0, 9, 0, 25], 1), ipv4(1, &[8, 0, 0, 25], 0)] {
        assert!(passes(deny, &other));
        assert!(!passes(allow, &other));
    }
    // Two tags are looked behind.
    let mut twice = smtp;
    (0..2).for_each(|_| drop(twice.splice(12..12, [0x88, 0xa8, 0, 7])));
    assert!(!passes(deny, &twice));
    assert!(passes(allow, &twice));
}

#[test]
fn carriers_match_every_rule_that_denies() {
    let smtp = ipv4(6, &[0, 9, 0, 25, 0, 0, 0, 0], 0);
    let (ethernet, packet) = (&smtp[..12], &smtp[14..]);
    let in_ethernet = |before: &[u8]| [ethernet, before, packet].concat();
    let in_ip = |protocol: u8, before: &[u8]| ipv4(protocol, &[before, packet].concat(), 0);
    let carriers = [
        in_ethernet(&[0, 36, 0xaa, 0xaa, 3, 0, 0, 0, 8, 0]),
        in_ethernet(&[0x92, 0, 0, 7, 8, 0]),
        in_ethernet(&[0x88, 0x47, 0, 0, 1, 64]),
        in_ethernet(&[0x88, 0x48, 0, 0, 0, 64, 0, 0, 1, 64]),
        in_ethernet(&[0x88, 0x64, 0x11, 0, 0, 1, 0, 30, 0, 0x21]),
        in_ethernet(&[0x89, 0x4f, 0x0f, 1, 2, 1, 0, 0, 1, 0xff]),
        in_ip(4, &[]),
        in_ip(47, &[0, 0, 8, 0]),
        ipv4(51, &[&[6, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &packet[20..]].concat(), 0),
    ];
    for frame in carriers {
        assert_eq!(received(&frame), Some((6, [9, 25])), "{frame:02x?}");
        for denied in ["deny tcp dport 25", "deny ip; deny ip6", "deny arp", "deny udp from ::1"] {
            let filter: Filter = format!("{denied}; default allow").parse().unwrap();
            assert_eq!(filter.check(&frame), Err(DropReason::Filtered), "{denied}: {frame:02x?}");
            assert_eq!(run(&classic(&filter), &frame), 0, "{denied}: {frame:02x?}");
        }
        let filter: Filter = "allow tcp; allow arp; default deny".parse().unwrap();
        assert_eq!(filter.check(&frame), Err(DropReason::Filtered), "{frame:02x?}");
        // Who names the carrier means it.
        let named = if frame[12..14] == [8, 0] { "ip" } else { "other" };
        let filter: Filter = format!("allow {named}; deny tcp; default deny").parse().unwrap();
        assert_eq!(filter.check(&frame), Ok(()), "{frame:02x?}");
    }
    let passes =
        |filter: &str, frame: &[u8]| filter.parse::<Filter>().unwrap().check(frame).is_ok();
    let rarp = [&[2; 12][..], &[0x80, 0x35], &[0; 46]].concat();
    assert!(!passes("deny arp; default allow", &rarp));
    assert!(!passes("allow arp; default deny", &rarp));
    assert!(passes("deny tcp; default allow", &rarp));
    let lldp = [&[2; 12][..], &[0x88, 0xcc], &[0; 46]].concat();
    assert!(passes("deny ip; deny tcp; default allow", &lldp));
    assert!(!passes("deny other; default allow", &lldp));
    assert!(passes("deny other; default allow", &smtp));
}

#[test]
fn padding_shows_nothing() {
    let passes =
        |filter: &str, frame: &[u8]| filter.parse::<Filter>().unwrap().check(frame).is_ok();
    let (deny, allow) = ("deny tcp dport 25; default allow", "allow tcp dport 80; default deny");
    // The packet ends before the ports, which look as if they were 80.
    let mut hidden = ipv4(6, &[0, 9, 0, 80, 0, 0, 0, 0], 0);
    assert!(passes(deny, &hidden) && passes(allow, &hidden));
    hidden[17] = 20;
    assert!(!passes(deny, &hidden) && !passes(allow, &hidden));
    // An IPv6 first fragment of eight bytes: an extension header, whose follower is in the next one.
    let mut fragment = [&[2; 12][..], &[0x86, 0xdd, 0x60, 0, 0, 0, 0, 16, 44, 64]].concat();
    fragment.extend([1; 32]);
    fragment.extend([60, 0, 0, 1, 0, 0, 0, 9, 6, 0, 1, 4, 0, 0, 0, 0]);
    fragment.extend([0, 9, 0, 80, 0, 0, 0, 0]);
    assert!(!passes(deny, &fragment) && !passes(allow, &fragment));
}

#[test]
fn the_first_rule_that_matches_decides() {
    let filter: Filter =
        "allow tcp from 192.0.2.1; deny tcp; allow ip; default deny".parse().unwrap();
    assert_eq!(filter.check(&ipv4(6, &[0; 4], 0)), Ok(()));
    let mut other = ipv4(6, &[0; 4], 0);
    other[29] = 9;
    assert_eq!(filter.check(&other), Err(DropReason::Filtered));
    assert_eq!(filter.check(&ipv4(17, &[0; 4], 0)), Ok(()));
    assert_eq!(filter.check(&[0; 60]), Err(DropReason::Filtered));
}
