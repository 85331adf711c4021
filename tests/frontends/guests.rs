//! Guests with drivers other than Linux's usual one: small rings, few buffers, no partial checksums.

use std::net::{TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use crate::support::daemon::Daemon;
use crate::support::driver::{CSUM, Card, GUEST_CSUM, GUEST_TSO, HEADER, Options};
use crate::support::frontend::Frontend;
use crate::support::network::{Wire, enter_namespace_with_tap, ip, output, wait_for_carrier};
use crate::support::traffic::frame;
use crate::support::{eventually, needs_root};

/// Reports whether the kernel passes GSO frames of TCP to the TAP.
fn leaves_segments() -> bool {
    output("ethtool", "-k tap0").contains("tx-tcp-segmentation: on")
}

/// Returns the shortest time of many tries in which a train of frames reached the guest.
fn shortest_train(wire: &Wire, card: &mut Card, frames: usize) -> Duration {
    let train = |_| {
        let started = Instant::now();
        (0..frames).for_each(|number| wire.send(&frame(number, 1000)));
        for number in 0..frames {
            assert_eq!(card.receive(0)[HEADER..], frame(number, 1000));
        }
        started.elapsed()
    };
    (0..20).map(train).min().unwrap()
}

/// Limit well below the 10 ms for which frames wait for more buffers.
const NO_WAIT: Duration = Duration::from_millis(5);
const SEGMENTS: u64 = CSUM | GUEST_CSUM | GUEST_TSO;

#[test]
fn small_rx_ring_delays_no_frame() {
    needs_root!("small_rx_ring_delays_no_frame");
    for (size, pairs) in [(8, 1), (16, 1), (32, 1), (32, 2)] {
        enter_namespace_with_tap(pairs > 1);
        let daemon = Daemon::start(&["--tap=tap0", &format!("--queue-pairs={pairs}")]);
        let options = Options {
            features: Options::default().features | SEGMENTS,
            size,
            pairs,
            buffer: 1526,
            ..Options::default()
        };
        let mut card = Card::prepare(Frontend::new(daemon.connect()), options);
        // One pair has buffers, and gets all frames.
        card.fill_from(0, 0);
        card.run();
        wait_for_carrier("tap0");
        let wire = Wire::open("tap0");
        for frames in [1, 8] {
            let shortest = shortest_train(&wire, &mut card, frames);
            assert!(shortest < NO_WAIT, "{frames} frames, ring of {size}: {shortest:?}");
        }
        eventually("the kernel segments", || !leaves_segments());
        assert!(daemon.log().contains("rx ring too small for segments"), "{}", daemon.log());
        drop(card);
        // The next guest has a ring of the usual size.
        let options = Options { size: 256, ..options };
        let _card = Card::start(Frontend::new(daemon.connect()), options);
        eventually("the guest segments", leaves_segments);
    }
}

#[test]
fn few_posted_buffers_delay_at_most_one_frame() {
    needs_root!("few_posted_buffers_delay_at_most_one_frame");
    enter_namespace_with_tap(false);
    let daemon = Daemon::start(&["--tap=tap0"]);
    let features = Options::default().features | SEGMENTS;
    let options = Options { features, buffer: 1526, ..Options::default() };
    let mut card = Card::prepare(Frontend::new(daemon.connect()), options);
    let area = card.rx[0].buffer_area();
    (0..32).for_each(|slot| card.post(0, area + slot * 1526));
    card.rx[0].publish();
    card.run();
    wait_for_carrier("tap0");
    let wire = Wire::open("tap0");
    for frames in [1, 8] {
        let shortest = shortest_train(&wire, &mut card, frames);
        assert!(shortest < NO_WAIT, "{frames} frames: {shortest:?}");
    }
    assert!(!leaves_segments());
    // It posts the rest, and takes segments from now on.
    card.fill_from(0, 32);
    wire.send(&frame(1, 100));
    card.receive(0);
    eventually("the guest segments", leaves_segments);
}

/// Returns the ones' complement sum of an IPv4 packet's pseudo-header and payload: 0xffff if its TCP or UDP
/// checksum is right.
fn transport_sum(packet: &[u8]) -> u16 {
    let payload = &packet[20..usize::from(u16::from_be_bytes([packet[2], packet[3]]))];
    let words = packet[12..20].chunks(2).chain(payload.chunks(2));
    let mut sum: u32 = words
        .map(|word| u32::from(word[0]) << 8 | u32::from(word.get(1).copied().unwrap_or(0)))
        .sum();
    sum += u32::from(packet[9]) + payload.len() as u32;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[test]
fn guest_without_guest_csum_gets_complete_checksums() {
    needs_root!("guest_without_guest_csum_gets_complete_checksums");
    const GUEST: &str = "10.9.0.2:4000";
    for pairs in [1, 2] {
        enter_namespace_with_tap(pairs > 1);
        ip("address add 10.9.0.1/24 dev tap0");
        ip("neigh add 10.9.0.2 lladdr 52:54:00:00:00:02 dev tap0");
        let daemon = Daemon::start(&["--tap=tap0", &format!("--queue-pairs={pairs}")]);
        let base = Options::default().features;
        let options = Options { features: base, pairs, ..Options::default() };
        let mut card = Card::prepare(Frontend::new(daemon.connect()), options);
        card.fill();
        let all: Vec<usize> = (0..pairs as usize).collect();
        let last = all[all.len() - 1];
        // Guests after each other, on one connection: what each accepts, and the pairs it uses.
        for (accepts, used) in [
            (false, &all[..]),
            (true, &all[..]),
            (false, &all[..]),
            (true, &[0][..]),
            (false, &[last][..]),
        ] {
            for index in 0..2 * pairs {
                card.frontend.enable(index, false);
                card.frontend.get_vring_base(index);
            }
            card.frontend.set_features(base | if accepts { SEGMENTS } else { 0 });
            for &pair in used {
                for ring in [&card.rx[pair], &card.tx[pair]] {
                    ring.start(&mut card.frontend, ring.used_index);
                    card.frontend.enable(ring.index, true);
                }
            }
            wait_for_carrier("tap0");
            let socket = UdpSocket::bind("10.9.0.1:0").unwrap();
            for protocol in [17, 6] {
                let mut received = None;
                eventually("a packet of the protocol arrives", || {
                    if protocol == 17 {
                        let _ = socket.send_to(&[7; 301], GUEST);
                    } else {
                        let soon = Duration::from_millis(20);
                        let _ = TcpStream::connect_timeout(&GUEST.parse().unwrap(), soon);
                    }
                    let frames = used.iter().filter_map(|pair| card.try_receive(*pair));
                    let mut frames = frames.filter(|it| it[HEADER + 23] == protocol);
                    // Those from before the change may wait for the device yet: one of now.
                    received = frames.find(|it| (it[0] & 1 != 0) == accepts);
                    received.is_some()
                });
                let received = received.unwrap();
                if !accepts {
                    assert_eq!(received[0], 0, "flags of {protocol}");
                    let sum = transport_sum(&received[HEADER + 14..]);
                    assert_eq!(sum, 0xffff, "protocol {protocol}, {pairs} pairs");
                }
            }
        }
    }
}
