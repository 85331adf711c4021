//! Cases 31 to 39, 60 to 63 and 65: frames and their headers in both directions, and the device's
//! configuration space.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vhost::vhost_user::message::FrontendReq;

use crate::support::daemon::{Daemon, port as named};
use crate::support::driver::{
    CSUM, Card, GUEST_CSUM, GUEST_TSO, HEADER, HOST_TSO, Options, PROTOCOL, VERSION_1,
};
use crate::support::frontend::Frontend;
use crate::support::hostile::{Scene, note};
use crate::support::network::{Wire, enter_namespace_for, ip, output, wait_for_carrier};
use crate::support::traffic::{check_both_ways, datagram, frame, tcp_frame};
use crate::support::{eventually, needs_root, skip};

/// Builds a virtio header from flags, GSO type, header length, GSO size, csum_start and csum_offset.
fn header(flags: u8, gso: u8, length: u16, size: u16, start: u16, offset: u16) -> Vec<u8> {
    let mut header = vec![flags, gso];
    for number in [length, size, start, offset, 0] {
        header.extend(number.to_le_bytes());
    }
    header
}

const NEEDS_CSUM: u8 = 1;
const TCPV4: u8 = 1;
const TCPV6: u8 = 4;
const ECN: u8 = 0x80;

/// Starts a guest that has negotiated all offloads.
fn offloading(scene: &Scene) -> Card {
    let features = Options::default().features | CSUM | GUEST_CSUM | HOST_TSO | GUEST_TSO;
    scene.card_with(Options { features, ..Options::default() })
}

/// Sends a frame with each header. All must be dropped for `reason`, and the next frame must come back.
fn all_dropped(scene: &Scene, mut card: Card, frames: &[(Vec<u8>, Vec<u8>)], reason: &str) {
    for (header, frame) in frames {
        card.send_with(0, header, frame);
    }
    card.send(0, &[7; 100]);
    assert_eq!(card.receive(0)[HEADER..], [7; 100], "the first that comes back is the good one");
    assert!(card.try_receive(0).is_none());
    drop(card);
    scene.says(&format!("{} dropped ({reason})", frames.len()));
}

#[test]
fn hostile_31_too_short_and_too_long_frames_are_dropped() {
    let scene = Scene::new(31);
    let plain = |length: usize| (vec![0; HEADER], vec![1; length]);
    let short: Vec<_> = (0..14).map(plain).collect();
    all_dropped(&scene, scene.card(), &short, "too_short");
    let long: Vec<_> = [1523, 1600, 2000].into_iter().map(plain).collect();
    all_dropped(&scene, scene.card(), &long, "too_long");
    let mut card = scene.card();
    // 64 KiB and more, in several buffers.
    for length in [65536, 70_000, 1_000_000] {
        let area = card.tx[0].buffer_area();
        let pieces: Vec<(u64, u32)> =
            (0..length / 8192 + 1).map(|_| (area, 8192)).take(200).collect();
        card.tx[0].add(&pieces, false).unwrap();
        card.tx[0].publish();
        card.tx[0].wait_used();
    }
    for length in [14, 1522] {
        card.send(0, &vec![5; length]);
        assert_eq!(card.receive(0)[HEADER..], vec![5; length]);
    }
    drop(card);
    scene.says("3 dropped (too_long)");
    scene.ends("D");
}

#[test]
fn hostile_32_checksum_outside_the_frame_is_dropped() {
    let scene = Scene::new(32);
    let places = [
        (34, 80),
        (33, 16),
        (34, 15),
        (2, 16),
        (0, 0),
        (13, 0),
        (58, 16),
        (59, 0),
        (60, 0),
        (65535, 65535),
        (65535, 1),
        (1, 65535),
    ];
    let frames =
        places.map(|(start, offset)| (header(NEEDS_CSUM, 0, 0, 0, start, offset), vec![1; 60]));
    all_dropped(&scene, offloading(&scene), &frames, "bad_header");
    scene.ends("D");
}

#[test]
fn hostile_33_inconsistent_segmentation_is_dropped() {
    let scene = Scene::new(33);
    let (good, tcp) = tcp_frame(4000, 1448);
    let with = |place: usize, value: u8| {
        let mut header = good.clone();
        header[place] = value;
        header
    };
    let sized = |size: u16| {
        let mut header = good.clone();
        header[4..6].copy_from_slice(&size.to_le_bytes());
        header
    };
    let changed = |place: usize, value: u8| {
        let mut frame = tcp.clone();
        frame[place] = value;
        frame
    };
    let tagged = |depth: usize| {
        let mut frame = tcp[..12].to_vec();
        (0..depth).for_each(|_| frame.extend([0x81, 0, 0, 1]));
        frame.extend(&tcp[12..]);
        frame
    };
    let frames = [
        // Unknown GSO types, and types that were not negotiated.
        (with(1, 2), tcp.clone()),
        (with(1, 5), tcp.clone()),
        (with(1, 0x7f), tcp.clone()),
        (with(1, TCPV4 | ECN), tcp.clone()),
        (sized(0), tcp.clone()),
        // A header length beyond the frame.
        (with(3, 0xff), tcp.clone()),
        // Without a partial checksum.
        (with(0, 0), tcp.clone()),
        // The type of the other IP version.
        (with(1, TCPV6), tcp.clone()),
        (good.clone(), changed(12, 0x86)),
        (good.clone(), changed(14, 0x65)),
        // A protocol other than TCP.
        (good.clone(), changed(23, 17)),
        // An IPv4 header of 16 bytes, and one longer than the frame.
        (good.clone(), changed(14, 0x44)),
        // A TCP header of 4 bytes, and one of 60 bytes whose frame ends at the checksum.
        (good.clone(), changed(14 + 20 + 12, 0x10)),
        // The header names another position than the protocol's checksum.
        (good.clone(), tagged(1)),
        (good.clone(), tagged(3)),
        (good.clone(), tcp[..40].to_vec()),
    ];
    all_dropped(&scene, offloading(&scene), &frames, "bad_header");
    scene.ends("D, by the daemon's own checks");
}

#[test]
fn hostile_34_unnegotiated_offloads_are_dropped() {
    let scene = Scene::new(34);
    let (good, tcp) = tcp_frame(1000, 500);
    let checksum = (header(NEEDS_CSUM, 0, 0, 0, 34, 16), vec![1; 60]);
    all_dropped(&scene, scene.card(), &[checksum, (good, tcp)], "bad_header");
    // The device ignores num_buffers, which only a device writes, and flags that have no meaning from
    // a driver.
    let mut card = scene.card();
    for (place, value) in [(10, 0xff), (11, 0xff), (0, 2), (0, 4)] {
        let mut header = [0; HEADER];
        header[place] = value;
        card.send_with(0, &header, &[2; 60]);
        assert_eq!(card.receive(0)[HEADER..], [2; 60], "byte {place} is {value}");
    }
    drop(card);
    scene.ends("D, or ignored");
}

#[test]
fn hostile_35_frames_refused_by_host_are_dropped() {
    needs_root!("hostile_35_frames_refused_by_host_are_dropped");
    let scene = Scene::on_tap(35);
    let mut card = scene.card();
    for round in 0..20 {
        ip("link set tap0 down");
        (0..5).for_each(|number| card.send(0, &frame(number, 100)));
        ip("link set tap0 up");
        if round % 5 == 0 {
            ip("link set tap0 mtu 1400");
            ip("link set tap0 mtu 1500");
        }
    }
    check_both_ways(&Wire::open("tap0"), &mut card, 50);
    drop(card);
    scene.says("100 dropped (host_refused)");
    scene.ends_on(Wire::open("tap0"), "D, and counted; traffic resumes");

    // The device is deleted: only its own port stops.
    let mut scene = Scene::on_tap(35);
    let mut card = scene.card();
    ip("link delete tap0");
    (0..100).for_each(|number| card.send(0, &frame(number, 100)));
    scene.daemon_says("tap tap0: the device is gone");
    assert_eq!(scene.daemon.log().matches("the device is gone").count(), 1, "once");
    let before = scene.worker_nanoseconds();
    std::thread::sleep(Duration::from_millis(300));
    let used = scene.worker_nanoseconds() - before;
    assert!(used < 30_000_000, "{used} ns of 0.3 s without a device");
    drop(card);
    scene.lives();
}

/// Returns a copy of `frame` with `changes`, each an offset and its new bytes.
fn changed(frame: &[u8], changes: &[(usize, &[u8])]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    for (at, bytes) in changes {
        frame[*at..at + bytes.len()].copy_from_slice(bytes);
    }
    frame
}

/// Builds an IPv6 frame of the guarded guest.
fn ipv6(source: &[u8; 16], protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = changed(&datagram(0).1[..14], &[(12, &[0x86, 0xdd])]);
    frame.extend([0x60, 0, 0, 0, 0, payload.len() as u8, protocol, 255]);
    frame.extend(source);
    frame.extend([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    frame.extend(payload);
    frame
}

/// A virtio header and its frame.
type Framed = (Vec<u8>, Vec<u8>);

fn spoofing_by_policy(scene: Scene) -> Scene {
    const OWN: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];
    const OTHER: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3];
    const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 2, 1];
    const OTHER_MAC: [u8; 6] = [0x52, 0x54, 0, 0, 2, 9];
    let (checksum, good) = datagram(20);
    let plain = || vec![0; HEADER];
    let mut arp = changed(&good[..14], &[(12, &[8, 6])]);
    arp.extend([0, 1, 8, 0, 6, 4, 0, 2]);
    arp.extend(MAC);
    arp.extend([192, 0, 2, 2, 0, 0, 0, 0, 0, 0, 192, 0, 2, 2]);
    let neighbour = |target: &[u8; 16], mac: &[u8; 6]| {
        let message = [&[136, 0, 0, 0, 0x20, 0, 0, 0], &target[..], &[2, 1], &mac[..]].concat();
        ipv6(&OWN, 58, &message)
    };
    let tagged = |tag: u8| [&good[..12], &[0x81, 0, 0, tag], &good[12..]].concat();
    let (gso, segmented) = tcp_frame(3000, 1000);
    let allowed =
        [(plain(), good.clone()), (plain(), arp.clone()), (plain(), neighbour(&OWN, &MAC))];
    let spoofed: [(&str, &[Framed]); 4] = [
        (
            "spoofed_mac",
            &[
                (plain(), changed(&good, &[(6, &OTHER_MAC)])),
                (checksum.clone(), changed(&good, &[(6, &OTHER_MAC)])),
                (gso.clone(), changed(&segmented, &[(6, &OTHER_MAC)])),
                (plain(), changed(&arp, &[(22, &OTHER_MAC)])),
                (plain(), neighbour(&OWN, &OTHER_MAC)),
            ],
        ),
        (
            "spoofed_address",
            &[
                (plain(), changed(&good, &[(26, &[192, 0, 2, 3])])),
                (checksum, changed(&good, &[(26, &[192, 0, 2, 3])])),
                (gso, changed(&segmented, &[(26, &[192, 0, 2, 3])])),
                (plain(), changed(&arp, &[(28, &[192, 0, 2, 1])])),
                (plain(), ipv6(&OTHER, 17, &[0, 9, 0, 9, 0, 8, 0, 0])),
                (plain(), neighbour(&OTHER, &MAC)),
            ],
        ),
        (
            "forbidden_vlan",
            &[
                (plain(), tagged(7)),
                (plain(), [&good[..12], &[0x81, 0, 0, 0, 0x81, 0, 0, 7], &good[12..]].concat()),
            ],
        ),
        (
            "forbidden",
            &[
                // An offer of a DHCP server, and of a DHCPv6 server.
                (plain(), changed(&good, &[(34, &[0, 67, 0, 68])])),
                (plain(), ipv6(&OWN, 17, &[2, 35, 2, 34, 0, 8, 0, 0])),
                // A router advertisement, and one after an extension header.
                (plain(), ipv6(&OWN, 58, &[134, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])),
                (plain(), ipv6(&OWN, 60, &[58, 0, 1, 4, 0, 0, 0, 0, 134, 0, 0, 0, 0, 0, 0, 0])),
                // Spanning tree and LLDP.
                (plain(), changed(&good, &[(0, &[1, 0x80, 0xc2, 0, 0, 0]), (12, &[0, 0x26])])),
                (plain(), changed(&good, &[(0, &[1, 0x80, 0xc2, 0, 0, 14]), (12, &[0x88, 0xcc])])),
            ],
        ),
    ];
    let mut card = scene.card_with(Options {
        features: Options::default().features | CSUM | HOST_TSO,
        ..Options::default()
    });
    while scene.wire().receive_any(20).is_some() {}
    for (header, frame) in spoofed.iter().flat_map(|(_, frames)| *frames) {
        card.send_with(0, header, frame);
    }
    for (header, frame) in &allowed {
        card.send_with(0, header, frame);
        let received = scene.wire().receive_any(1000);
        assert_eq!(received.as_ref(), Some(frame), "the first that arrives is allowed");
    }
    drop(card);
    for (reason, frames) in spoofed {
        scene.says(&format!("{} dropped ({reason})", frames.len()));
    }
    scene
}

#[test]
fn hostile_36_spoofed_sources_are_dropped() {
    needs_root!("hostile_36_spoofed_sources_are_dropped");
    spoofing_by_policy(Scene::guarded_veth(36)).ends("D");
    spoofing_by_policy(Scene::guarded_tap(36)).ends("D");
}

/// Sends `count` frames whose source addresses another thread rewrites all the time. The bridge must learn
/// only the guest's own address.
fn spoofing_by_race(scene: Scene, count: usize) -> Scene {
    const SLOTS: u64 = 128;
    let (_, good) = datagram(20);
    let mut card = scene.card();
    let area = card.tx[0].buffer_area();
    let place = |slot: u64| area + slot * 2048 + HEADER as u64 + 6;
    for slot in 0..SLOTS {
        card.queue_tx(0, slot, &[0; HEADER], &good);
    }
    card.tx[0].publish();
    let stop = AtomicBool::new(false);
    let mut sent = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut number = 0_u8;
            while !stop.load(Ordering::Relaxed) {
                number = number.wrapping_add(1);
                let mac = if number & 1 == 0 {
                    [0x52, 0x54, 0, 0, 2, 1]
                } else {
                    [2, 9, 9, 9, 9, number]
                };
                (0..SLOTS).for_each(|slot| card.ram.write(place(slot), &mac));
            }
        });
        let ring = &mut card.tx[0];
        while sent < count {
            let recycled = ring.recycle();
            sent += recycled;
            if recycled > 0 {
                ring.publish();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    let learned = output("bridge", "fdb show br br0 dynamic");
    assert!(learned.contains("52:54:00:00:02:01"), "{learned}");
    assert_eq!(learned.lines().count(), 1, "{learned}");
    drop(card);
    scene.says("dropped (spoofed_mac)");
    scene
}

#[test]
fn hostile_37_rewritten_sources_never_reach_the_wire() {
    needs_root!("hostile_37_rewritten_sources_never_reach_the_wire");
    spoofing_by_race(Scene::guarded_veth(37), 1_000_000).ends("D");
    spoofing_by_race(Scene::guarded_tap(37), 10_000_000).ends("D: 0 of 10^7 on the wire");
}

#[test]
fn hostile_38_frames_that_fit_no_buffer_are_dropped() {
    needs_root!("hostile_38_frames_that_fit_no_buffer_are_dropped");
    let scene = Scene::on_tap(38);
    // Without mergeable buffers a frame needs one buffer that holds it.
    let options = Options { features: VERSION_1 | PROTOCOL, buffer: 200, ..Options::default() };
    let mut card = scene.card_with(options);
    (0..20).for_each(|number| scene.wire().send(&frame(number, 1000)));
    scene.wire().send(&frame(21, 188));
    assert_eq!(card.receive(0)[HEADER..], frame(21, 188));
    drop(card);
    scene.says("20 dropped (no_room)");
    // Without buffers under a flood the worker sleeps. It resumes with the next buffers.
    let mut card = Card::prepare(scene.frontend(), Options::default());
    card.run();
    for number in 0..2000 {
        let _ = scene.wire().try_send(&frame(number, 100));
    }
    let before = scene.worker_nanoseconds();
    std::thread::sleep(Duration::from_secs(1));
    let used = scene.worker_nanoseconds() - before;
    assert!(used < 20_000_000, "{used} ns of a second without a buffer");
    card.fill();
    assert_eq!(card.receive(0)[HEADER..], frame(0, 100));
    drop(card);
    scene.ends("D, and counted; without buffers it sleeps");
}

#[test]
fn hostile_39_config_space_bounds_are_enforced() {
    let scene = Scene::new(39);
    let mut frontend = scene.frontend();
    frontend.begin();
    frontend.ask(FrontendReq::NET_SET_MTU, &9000u64.to_ne_bytes(), &[]);
    let request = |offset: u32, size: u32| -> Vec<u8> {
        let words = [offset, size, 0];
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        bytes.extend(vec![0; size as usize]);
        bytes
    };
    for (offset, size, expected) in [
        (10, 2, Some(9000u16.to_le_bytes().to_vec())),
        (0, 18, None),
        (17, 1, None),
        (16, 2, None),
        (u32::MAX, 1, None),
        (0, 0, None),
    ] {
        frontend.send(FrontendReq::GET_CONFIG, &request(offset, size));
        let reply = frontend.reply(FrontendReq::GET_CONFIG);
        let bytes = reply.get(12..).map(<[u8]>::to_vec);
        assert_eq!(bytes, expected, "{offset} {size}");
    }
    frontend.refused(FrontendReq::SET_CONFIG, &request(0, 6), &[]);
    // Longer than any request.
    frontend.send(FrontendReq::GET_CONFIG, &request(0, 4097));
    assert!(frontend.is_closed());
    scene.says("read outside the configuration space");
    scene.says("a payload of 4109 bytes is too long");
    scene.ends("R");
}

/// Builds IPv4 and IPv6 frames of a guarded guest with partial TCP or UDP checksums.
fn with_partial_checksums() -> Vec<Framed> {
    const OWN: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];
    let udp = [&[0, 9, 0, 9, 0, 28, 0, 0][..], &[7; 20]].concat();
    let tcp = [&[0, 9, 0, 9, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 1, 0, 0, 0, 0][..], &[7; 20]];
    let behind_options = [&[17, 0, 1, 4, 0, 0, 0, 0][..], &udp].concat();
    vec![
        datagram(20),
        (header(NEEDS_CSUM, 0, 54, 0, 34, 16), tcp_frame(20, 1000).1),
        (header(NEEDS_CSUM, 0, 62, 0, 54, 6), ipv6(&OWN, 17, &udp)),
        (header(NEEDS_CSUM, 0, 74, 0, 54, 16), ipv6(&OWN, 6, &tcp.concat())),
        (header(NEEDS_CSUM, 0, 70, 0, 62, 6), ipv6(&OWN, 60, &behind_options)),
    ]
}

/// Builds frames whose partial checksum is not their own TCP or UDP checksum.
fn checksums_over_headers() -> Vec<Framed> {
    let partial = |start: u16, offset: u16, frame: &[u8]| {
        (header(NEEDS_CSUM, 0, 0, 0, start, offset), frame.to_vec())
    };
    let (_, good) = datagram(30);
    let mut arp = changed(&good[..14], &[(12, &[8, 6])]);
    arp.extend([0, 1, 8, 0, 6, 4, 0, 2, 0x52, 0x54, 0, 0, 2, 1, 192, 0, 2, 2]);
    arp.extend([0x52, 0x54, 0, 0, 2, 2, 192, 0, 2, 9]);
    arp.resize(60, 0);
    let tagged = [&good[..12], &[0x81, 0, 0, 0], &good[12..]].concat();
    let tcp = tcp_frame(20, 1000).1;
    vec![
        // Over the IPv4 source, an ARP sender, both ports, and a VLAN tag.
        partial(20, 8, &good),
        partial(20, 10, &arp),
        partial(34, 0, &good),
        partial(34, 2, &good),
        partial(14, 0, &tagged),
        // At another protocol's offset, and at an untagged frame's offset in a tagged frame.
        partial(34, 16, &good),
        partial(34, 6, &tcp),
        partial(34, 6, &tagged),
        // In a later fragment, and in a packet that ends before its checksum.
        partial(34, 6, &changed(&good, &[(20, &[0, 8])])),
        partial(34, 16, &changed(&tcp, &[(16, &[0, 36])])),
    ]
}

fn checksum_offload(scene: Scene) -> Scene {
    let mut card = scene.card_with(Options {
        features: Options::default().features | CSUM | HOST_TSO,
        ..Options::default()
    });
    while scene.wire().receive_any(20).is_some() {}
    let attacks = checksums_over_headers();
    for (header, frame) in &attacks {
        card.send_with(0, header, frame);
    }
    assert_eq!(scene.wire().receive_any(50), None, "no attack reaches the wire");
    for (header, frame) in with_partial_checksums() {
        let start = usize::from(u16::from_le_bytes([header[6], header[7]]));
        let at = start + usize::from(header[8]);
        card.send_with(0, &header, &frame);
        let received = scene.wire().receive_any(1000).expect("an honest frame arrives");
        // The host completes the checksum; on AF_XDP the daemon does.
        let apart = |frame: &[u8]| [&frame[..at], &frame[at + 2..]].concat();
        assert_eq!(apart(&received), apart(&frame));
    }
    drop(card);
    scene.says(&format!("{} dropped (bad_header)", attacks.len()));
    scene
}

#[test]
fn hostile_60_checksum_offload_rewrites_no_checked_header() {
    needs_root!("hostile_60_checksum_offload_rewrites_no_checked_header");
    checksum_offload(Scene::guarded_veth(60)).ends("D");
    checksum_offload(Scene::guarded_tap(60)).ends("D; honest TCP and UDP checksums are completed");
}

#[test]
fn hostile_63_announcements_obey_filter_and_link() {
    needs_root!("hostile_63_announcements_obey_filter_and_link");
    let payload = [0x52, 0x54, 0, 0, 2, 1, 0, 0];
    for (port, on) in [("tap = \"tap0\"", "TAP"), ("af-xdp = \"veth0\"", "AF_XDP")] {
        for (setting, reason) in [
            ("tx-filter = \"deny ethertype 0x8035; default allow\"", "tx filter denies the frame"),
            ("tx-filter = \"default deny\"", "tx filter denies the frame"),
            ("link = false", "the link is off"),
        ] {
            let wire = enter_namespace_for(port);
            let daemon = Daemon::with_config(&named("vm", &format!("{port}\n{setting}\n")), "vm");
            let mut card = Card::start(Frontend::new(daemon.connect_to("vm")), Options::default());
            card.frontend.refused(FrontendReq::SEND_RARP, &payload, &[]);
            eventually(reason, || daemon.log().contains(reason));
            let sent = std::iter::from_fn(|| wire.receive_any(50));
            assert_eq!(sent.filter(|frame| frame[12..14] == [0x80, 0x35]).count(), 0, "{on}");
        }
    }
    note(63, "R: neither past a filter nor with the link off");
}

/// Builds frames with an IPv4 packet to TCP port 25 in encapsulations that the filter does not parse.
fn carriers() -> Vec<Vec<u8>> {
    let (_, good) = datagram(20);
    let mut mail = tcp_frame(20, 1000).1;
    mail[34..38].copy_from_slice(&[0, 9, 0, 25]);
    let (ethernet, packet) = (&mail[..12], &mail[14..]);
    let in_ip = |protocol: u8, before: &[u8]| {
        let length = (20 + before.len() + packet.len()) as u8;
        let outer = changed(&good[..34], &[(17, &[length]), (23, &[protocol])]);
        [&outer, before, packet].concat()
    };
    let before: [&[u8]; 7] = [
        // LLC and SNAP, an old VLAN tag, MPLS, PPPoE, PBB, NSH.
        &[0, 68, 0xaa, 0xaa, 3, 0, 0, 0, 8, 0],
        &[0x92, 0, 0, 7, 8, 0],
        &[0x88, 0x47, 0, 0, 1, 64],
        &[0x88, 0x48, 0, 0, 1, 64],
        &[0x88, 0x64, 0x11, 0, 0, 1, 0, 62, 0, 0x21],
        &[0x88, 0xe7, 0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 8, 0],
        &[0x89, 0x4f, 0x0f, 0xc2, 2, 1, 0, 0, 1, 0xff],
    ];
    let mut frames: Vec<_> = before.map(|before| [ethernet, before, packet].concat()).into();
    let authentication = [4, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1];
    frames.extend([in_ip(4, &[]), in_ip(47, &[0, 0, 8, 0]), in_ip(51, &authentication)]);
    frames
}

/// Checks a port with both filters in a new namespace: only the last frame, which no rule denies, passes in
/// either direction.
fn nothing_passes(port: &str, filter: &str, frames: &[Vec<u8>]) {
    let wire = enter_namespace_for(port);
    let filters = format!("{port}\ntx-filter = \"{filter}\"\nrx-filter = \"{filter}\"\n");
    let daemon = Daemon::with_config(&named("vm", &filters), "vm");
    let mut card = Card::start(Frontend::new(daemon.connect_to("vm")), Options::default());
    card.send(0, &[0; 5]);
    if port.contains("tap0") {
        wait_for_carrier("tap0");
    }
    while wire.receive_any(20).is_some() {}
    frames.iter().for_each(|frame| card.send(0, frame));
    card.send(0, &frame(1, 100));
    assert_eq!(wire.receive_any(1000), Some(frame(1, 100)), "{filter}: the first on the wire");
    frames.iter().for_each(|frame| wire.send(frame));
    wire.send(&frame(2, 100));
    assert_eq!(card.receive(0)[HEADER..], frame(2, 100), "{filter}: the first that arrives");
    drop(card);
    let counted = format!("{} dropped (filtered)", frames.len());
    eventually(&counted, || daemon.log().contains(&counted));
}

const PORTS: [&str; 2] = ["tap = \"tap0\"", "af-xdp = \"veth0\""];

#[test]
fn hostile_61_encapsulated_denied_packets_are_dropped() {
    needs_root!("hostile_61_encapsulated_denied_packets_are_dropped");
    for port in PORTS {
        for filter in
            ["deny ip; deny ip6; deny arp; default allow", "deny tcp dport 25; default allow"]
        {
            nothing_passes(port, filter, &carriers());
        }
        let (_, good) = datagram(60);
        let rarp = changed(&good, &[(12, &[0x80, 0x35])]);
        nothing_passes(port, "deny arp; default allow", std::slice::from_ref(&rarp));
        let unknown = changed(&good, &[(12, &[0x88, 0xcc])]);
        let filter = "allow ethertype 0x88b5; deny other; default allow";
        nothing_passes(port, filter, &[rarp, unknown]);
    }
    note(61, "D, for the guest and from it: a carrier matches every rule that denies");
}

#[test]
fn hostile_62_headers_in_padding_are_ignored() {
    needs_root!("hostile_62_headers_in_padding_are_ignored");
    const OWN: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];
    // Packets that end before their ports. The padding after them names port 80.
    let mut web = tcp_frame(20, 1000).1;
    web[34..38].copy_from_slice(&[0, 9, 0, 80]);
    let ipv4 = changed(&web, &[(16, &[0, 20])]);
    let (fragment, options) = ([60, 0, 0, 1, 0, 0, 0, 9], [6, 0, 1, 4, 0, 0, 0, 0]);
    let whole = ipv6(&OWN, 44, &[&fragment, &options, &web[34..]].concat());
    let ipv6_fragment = changed(&whole, &[(18, &[0, 16])]);
    for port in PORTS {
        nothing_passes(
            port,
            "deny tcp dport 25; default allow",
            &[ipv4.clone(), ipv6_fragment.clone()],
        );
    }
    // For anti-spoofing: padding must not hide a DHCP server.
    let (_, good) = datagram(20);
    let hidden = [changed(&good, &[(16, &[0, 20])]), changed(&good, &[(16, &[0, 10])])];
    for scene in [Scene::guarded_veth(62), Scene::guarded_tap(62)] {
        let mut card = scene.card();
        while scene.wire().receive_any(20).is_some() {}
        hidden.iter().for_each(|frame| card.send(0, frame));
        card.send(0, &good);
        assert_eq!(scene.wire().receive_any(1000), Some(good.clone()));
        drop(card);
        scene.says("2 dropped (forbidden)");
        scene.ends("D");
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn hostile_65_partial_submission_sends_each_frame_once() {
    use nix::libc::SYS_io_uring_enter;
    use nix::sys::ptrace;
    use nix::sys::wait::{WaitPidFlag, waitpid};
    use nix::unistd::Pid;

    needs_root!("hostile_65_partial_submission_sends_each_frame_once");
    const FRAMES: u64 = 16;
    // The error may come before or after the kernel has taken all frames.
    for taken in [FRAMES / 2, FRAMES] {
        let mut scene = Scene::on_tap(65);
        let mut card = scene.card();
        if !scene.daemon.log().contains("tx by io_uring") {
            skip(
                "hostile_65_partial_submission_sends_each_frame_once",
                "io_uring is not permitted",
            );
            return;
        }
        let worker = Pid::from_raw(scene.worker() as i32);
        let stopped = || waitpid(worker, Some(WaitPidFlag::__WALL)).unwrap();
        let next_stop = || {
            ptrace::syscall(worker, None).unwrap();
            stopped();
            ptrace::getregs(worker).unwrap()
        };
        ptrace::attach(worker).unwrap();
        stopped();
        for number in 0..FRAMES {
            card.queue_tx(0, number, &[0; HEADER], &frame(number as usize, 100));
        }
        card.tx[0].publish();
        let mut calls = 0;
        loop {
            let mut registers = next_stop();
            let enters = registers.rax as i64 == -i64::from(nix::libc::ENOSYS);
            if !enters || registers.orig_rax as i64 != SYS_io_uring_enter {
                continue;
            }
            calls += 1;
            // The first call submits `taken` frames and waits for none. The second fails for invalid flags.
            (registers.rsi, registers.r10) = (taken, if calls == 1 { 0 } else { 1 << 31 });
            ptrace::setregs(worker, registers).unwrap();
            if calls == 2 {
                break;
            }
            if taken == FRAMES {
                let mut registers = next_stop();
                registers.rax = -i64::from(nix::libc::EBUSY) as u64;
                ptrace::setregs(worker, registers).unwrap();
                break;
            }
        }
        ptrace::detach(worker, None).unwrap();
        let wire = scene.wire();
        let arrived: Vec<_> = std::iter::from_fn(|| wire.receive(300)).collect();
        let sent: Vec<_> = (0..FRAMES).map(|number| frame(number as usize, 100)).collect();
        assert_eq!(arrived.len(), sent.len());
        assert!(arrived == sent, "each frame arrives once, in order");
        scene.daemon_says(&format!("io_uring failed after {taken} of 16 frames"));
        // Not `ends`, since the daemon has closed its io_uring descriptor.
        scene.check(&mut card);
        scene.lives();
    }
    note(65, "each frame on the wire once; the port goes on without io_uring");
}
