//! The TAP port: frames between a test driver and the host's end of the device. Each test has its own network
//! namespace.

use std::fs;
use std::sync::RwLock;
use std::time::Instant;

use crate::support::daemon::{Daemon, port};
use crate::support::driver::{
    CSUM, Card, EVENT_IDX, GUEST_CSUM, GUEST_TSO, HEADER, HOST_TSO, Options, PROTOCOL, VERSION_1,
};
use crate::support::frontend::Frontend;
use crate::support::network::{
    ETHERTYPE, Wire, enter_namespace_with_tap, enter_new_namespace, enter_quiet_namespace, ip,
    output, wait_for_carrier,
};
use crate::support::traffic::{check_both_ways, frame, tcp_frame};
use crate::support::{SOON, eventually, needs_root};

const OFFLOADS: u64 = CSUM | GUEST_CSUM | HOST_TSO | GUEST_TSO;

/// Starts a daemon on a TAP in a new, quiet namespace.
fn start(options: &[&str], card: Options) -> (Daemon, Wire, Card) {
    enter_namespace_with_tap(card.pairs > 1);
    let queues = format!("--queue-pairs={}", card.pairs);
    let mut all = vec!["--tap=tap0", &queues];
    all.extend(options);
    let daemon = Daemon::start(&all);
    let card = Card::start(Frontend::new(daemon.connect()), card);
    wait_for_carrier("tap0");
    (daemon, Wire::open("tap0"), card)
}

#[test]
fn frames_pass_unchanged_in_order() {
    needs_root!("frames_pass_unchanged_in_order");
    for features in
        [Options::default().features, Options::default().features | OFFLOADS, VERSION_1 | PROTOCOL]
    {
        for size in [64, 1024] {
            let (_daemon, wire, mut card) =
                start(&[], Options { features, size, ..Options::default() });
            check_both_ways(&wire, &mut card, 2000);
        }
    }
}

#[test]
fn bursts_are_sent_by_io_uring_or_writev() {
    needs_root!("bursts_are_sent_by_io_uring_or_writev");
    let _uring = URING_IS_ON.read().unwrap();
    for method in ["io-uring", "writev"] {
        let option = format!("--tx-method={method}");
        let (daemon, wire, mut card) = start(&[&option], Options::default());
        let logged = format!("tx by {} (as configured)", method.replace('-', "_"));
        assert!(daemon.log().contains(&logged), "{}", daemon.log());
        check_both_ways(&wire, &mut card, 2000);
    }
}

/// Lock for io_uring: written by the test that disables it, read by the tests that need it.
static URING_IS_ON: RwLock<()> = RwLock::new(());

/// A guard that disables io_uring on the whole machine until it is dropped.
struct NoUring(String);

const URING: &str = "/proc/sys/kernel/io_uring_disabled";

impl NoUring {
    fn new() -> Self {
        let before = fs::read_to_string(URING).unwrap();
        fs::write(URING, "2").unwrap();
        NoUring(before)
    }
}

impl Drop for NoUring {
    fn drop(&mut self) {
        let _ = fs::write(URING, &self.0);
    }
}

#[test]
fn writev_is_used_where_io_uring_is_forbidden() {
    needs_root!("writev_is_used_where_io_uring_is_forbidden");
    let _uring = URING_IS_ON.write().unwrap();
    let without = NoUring::new();
    let (daemon, wire, mut card) = start(&[], Options::default());
    drop(without);
    assert!(daemon.log().contains("tx by writev (io_uring is not available"), "{}", daemon.log());
    check_both_ways(&wire, &mut card, 500);
}

#[test]
fn busy_polling_passes_all_frames() {
    needs_root!("busy_polling_passes_all_frames");
    let (_daemon, wire, mut card) =
        start(&["--busy-poll=200", "--cpu-affinity=0"], Options::default());
    check_both_ways(&wire, &mut card, 1000);
}

#[test]
fn adaptive_polling_saves_kicks() {
    needs_root!("adaptive_polling_saves_kicks");
    let features = Options::default().features;
    for (more, features, looks) in [
        ("", features, true),
        ("", features & !EVENT_IDX, true),
        ("busy-poll = 0", features, false),
    ] {
        enter_namespace_with_tap(false);
        let one = port("one", &format!("tap = \"tap0\"\n{more}"));
        let daemon = Daemon::with_config(&format!("control = \"{{}}/control\"\n{one}"), "one");
        let options = Options { features, ..Options::default() };
        let mut card = Card::start(Frontend::new(daemon.connect_to("one")), options);
        wait_for_carrier("tap0");
        let wire = Wire::open("tap0");
        let frame = frame(1, 60);
        let (mut answers, mut kicks) = (0, 0);
        let mut answer = || {
            wire.send(&frame);
            // As soon as it is there.
            let started = Instant::now();
            let received = loop {
                assert!(started.elapsed() < SOON);
                if let Some(received) = card.try_receive(0) {
                    break received;
                }
            };
            assert_eq!(received[HEADER..], frame);
            card.queue_tx(0, answers % 8, &[0; HEADER], &frame);
            answers += 1;
            kicks += u64::from(card.tx[0].publish());
            assert_eq!(wire.receive(1000), Some(frame.clone()));
            card.tx[0].wait_used();
        };
        let told = |what: &str| daemon.show("one")["queue_pairs"][0][what].as_u64().unwrap();
        if looks {
            eventually("it is looked for answers, and they come", || {
                answer();
                told("replies") > 10
            });
            assert!(kicks < answers, "{kicks} kicks, {answers} answers");
        } else {
            (0..200).for_each(|_| answer());
            assert_eq!(told("looks"), 0);
        }
    }
}

#[test]
fn tap_offloads_follow_negotiated_features() {
    needs_root!("tap_offloads_follow_negotiated_features");
    let base = Options::default().features;
    let (daemon, wire, mut card) =
        start(&[], Options { features: base | OFFLOADS, ..Options::default() });
    check_both_ways(&wire, &mut card, 10);
    let offloads = || output("ethtool", "-k tap0");
    let is = |what: &str, state: &str| offloads().contains(&format!("{what}: {state}"));
    assert!(is("tx-checksumming", "on") && is("tx-tcp-segmentation", "on"), "{}", offloads());
    assert!(is("tx-tcp6-segmentation", "on") && is("tx-tcp-ecn-segmentation", "off"));
    drop(card);
    // Another driver, which accepts checksums only.
    let mut card = Card::start(
        Frontend::new(daemon.connect()),
        Options { features: base | GUEST_CSUM, ..Options::default() },
    );
    check_both_ways(&wire, &mut card, 10);
    assert!(is("tx-checksumming", "on") && is("tx-tcp-segmentation", "off"), "{}", offloads());
    drop(card);
    let mut card = Card::start(Frontend::new(daemon.connect()), Options::default());
    check_both_ways(&wire, &mut card, 10);
    assert!(is("tx-checksumming", "off"), "{}", offloads());
}

#[test]
fn ten_byte_legacy_header_is_accepted() {
    needs_root!("ten_byte_legacy_header_is_accepted");
    let (_daemon, wire, mut card) =
        start(&[], Options { features: PROTOCOL, ..Options::default() });
    card.send_with(0, &[0; 10], &frame(1, 100));
    assert_eq!(wire.receive(1000).unwrap(), frame(1, 100));
    wire.send(&frame(2, 100));
    assert_eq!(card.rx[0].wait_used().1, 110);
    assert_eq!(card.ram.read(card.rx[0].buffer_area() + 10, 100), frame(2, 100));
}

#[test]
fn tap_mtu_change_is_followed() {
    needs_root!("tap_mtu_change_is_followed");
    let (_daemon, wire, mut card) = start(&[], Options::default());
    card.send(0, &frame(1, 2000));
    assert_eq!(wire.receive(50), None, "longer than the MTU");
    ip("link set tap0 mtu 4000");
    card.send(0, &frame(2, 2000));
    assert_eq!(wire.receive(1000).unwrap(), frame(2, 2000));
    // What comes to the guest is known to be longer from the first frame that was.
    wire.send(&frame(3, 3000));
    (4..6).for_each(|number| wire.send(&frame(number, 3000)));
    let first = card.receive(0);
    if first[HEADER..] == frame(3, 3000) {
        assert_eq!(card.receive(0)[HEADER..], frame(4, 3000));
    }
    assert_eq!(card.receive(0)[HEADER..], frame(5, 3000));
}

#[test]
fn session_starts_after_its_device_is_deleted() {
    needs_root!("session_starts_after_its_device_is_deleted");
    enter_namespace_with_tap(false);
    let mut daemon = Daemon::start(&["--tap=tap0"]);
    ip("link delete tap0");
    let mut card = Card::start(Frontend::new(daemon.connect()), Options::default());
    (0..10).for_each(|number| card.send(0, &frame(number, 100)));
    assert!(daemon.is_alive());
    eventually("the log has the line", || daemon.log().contains("the device is gone"));
}

#[test]
fn guest_tso_off_withholds_the_feature() {
    needs_root!("guest_tso_off_withholds_the_feature");
    enter_new_namespace();
    let daemon = Daemon::start(&["--tap=tap0", "--guest-tso=off"]);
    let offered = Frontend::new(daemon.connect()).begin();
    assert_eq!(offered & GUEST_TSO, 0);
    assert_eq!(offered & (HOST_TSO | GUEST_CSUM), HOST_TSO | GUEST_CSUM);
}

#[test]
fn frame_is_spread_over_small_buffers() {
    needs_root!("frame_is_spread_over_small_buffers");
    let (_daemon, wire, mut card) = start(&[], Options { buffer: 100, ..Options::default() });
    wire.send(&frame(1, 1000));
    let received = card.receive(0);
    assert_eq!(received[HEADER..], frame(1, 1000));
    assert_eq!(received[10..12], 11u16.to_le_bytes());
    check_both_ways(&wire, &mut card, 200);
}

#[test]
fn frame_that_fits_no_buffer_is_dropped_alone() {
    needs_root!("frame_that_fits_no_buffer_is_dropped_alone");
    let options = Options { features: VERSION_1 | PROTOCOL, buffer: 200, ..Options::default() };
    let (daemon, wire, mut card) = start(&[], options);
    wire.send(&frame(1, 1000));
    wire.send(&frame(2, 189));
    wire.send(&frame(3, 188));
    assert_eq!(card.receive(0)[HEADER..], frame(3, 188));
    drop(card);
    eventually("the drops are counted", || daemon.log().contains("2 dropped (no_room)"));
}

#[test]
fn buffer_smaller_than_a_header_does_not_stall_the_queue() {
    needs_root!("buffer_smaller_than_a_header_does_not_stall_the_queue");
    for buffer in [1, 11, 12, 13] {
        let options =
            Options { features: VERSION_1 | PROTOCOL, buffer, size: 8, ..Options::default() };
        let (daemon, wire, card) = start(&[], options);
        (0..20).for_each(|number| wire.send(&frame(number, 60)));
        // The kernel does not count what it could not deliver: nothing shows that all were read.
        std::thread::sleep(std::time::Duration::from_millis(300));
        drop(card);
        eventually("the drops are counted", || daemon.log().contains("20 dropped (no_room)"));
    }
}

#[test]
fn guest_with_few_buffers_receives_small_frames() {
    needs_root!("guest_with_few_buffers_receives_small_frames");
    // The largest frame would take 64 KiB, and the guest has 16 KiB of buffers.
    let features = Options::default().features | OFFLOADS;
    let (_daemon, wire, mut card) = start(&[], Options { features, size: 8, ..Options::default() });
    for number in 0..20 {
        wire.send(&frame(number, 600));
        assert_eq!(card.receive(0)[HEADER..], frame(number, 600));
    }
}

#[test]
fn frames_wait_until_guest_posts_buffers() {
    needs_root!("frames_wait_until_guest_posts_buffers");
    enter_new_namespace();
    let daemon = Daemon::start(&["--tap=tap0"]);
    let wire = Wire::open("tap0");
    let mut card = Card::prepare(Frontend::new(daemon.connect()), Options::default());
    card.run();
    (0..100).for_each(|number| wire.send(&frame(number, 100)));
    std::thread::sleep(std::time::Duration::from_millis(100));
    card.fill();
    // Whatever the host sent on its own accord comes in between.
    let mut expected = 0;
    while expected < 100 {
        let received = card.receive(0);
        if received[HEADER + 12..HEADER + 14] == ETHERTYPE {
            assert_eq!(received[HEADER..], frame(expected, 100));
            expected += 1;
        }
    }
}

#[test]
fn valid_gso_frame_reaches_host_and_invalid_one_is_dropped() {
    needs_root!("valid_gso_frame_reaches_host_and_invalid_one_is_dropped");
    let features = Options::default().features | OFFLOADS;
    let (daemon, _wire, mut card) = start(&[], Options { features, ..Options::default() });
    let received = || output("ip", "-s link show tap0").lines().nth(3).unwrap().trim().to_owned();
    let (header, bytes) = tcp_frame(20_000, 1448);
    // The payload lies in pieces anywhere in memory.
    let area = card.tx[0].buffer_area();
    card.ram.write(area, &[header.as_slice(), &bytes].concat());
    let mut pieces = vec![(area, HEADER as u32), (area + HEADER as u64, 70)];
    let rest = (bytes.len() - 70) as u32;
    pieces.extend((0..4).map(|part| {
        (
            area + HEADER as u64 + 70 + u64::from(part * (rest / 4)),
            if part < 3 { rest / 4 } else { rest - 3 * (rest / 4) },
        )
    }));
    card.tx[0].add(&pieces, false).unwrap();
    card.tx[0].publish();
    card.tx[0].wait_used();
    // One frame, of all the bytes.
    assert!(received().starts_with(&format!("{} ", bytes.len())), "{}", received());

    for (at, value) in [(4, 0), (5, 0xff), (1, 4), (6, 36), (8, 6)] {
        let (mut header, bytes) = tcp_frame(1900, 1448);
        header[at] = value;
        if at == 5 {
            header[4] = 0xff;
        }
        if at == 4 {
            header[5] = 0;
        }
        card.send_with(0, &header, &bytes);
    }
    assert!(received().starts_with(&format!("{} ", bytes.len())), "{}", received());
    drop(card);
    eventually("the drops are counted", || daemon.log().contains("5 dropped (bad_header)"));
}

#[test]
fn frames_are_steered_to_queue_pairs_with_buffers() {
    needs_root!("frames_are_steered_to_queue_pairs_with_buffers");
    enter_quiet_namespace();
    let daemon = Daemon::start(&["--tap=tap0", "--queue-pairs=2"]);
    let wire = Wire::open("tap0");
    let options = Options { pairs: 2, ..Options::default() };
    let mut card = Card::prepare(Frontend::new(daemon.connect()), options);
    // cloud-hypervisor enables every ring whatever the guest uses; this guest fills its first.
    let area = card.rx[0].buffer_area();
    (0..256).for_each(|slot| card.post(0, area + slot * 2048));
    card.rx[0].publish();
    card.run();
    // Flows that the kernel would spread over both queues.
    let flow = |number: usize| {
        let (_, mut bytes) = tcp_frame(100, 1448);
        bytes[34..36].copy_from_slice(&(1000 + number as u16).to_be_bytes());
        bytes
    };
    let mut arrived = [0, 0];
    let mut count = |card: &mut Card, expected: usize| {
        eventually(&format!("{expected} frames arrive"), || {
            for (pair, arrived) in arrived.iter_mut().enumerate() {
                while card.try_receive(pair).is_some() {
                    *arrived += 1;
                }
            }
            arrived[0] + arrived[1] == expected
        });
        arrived
    };
    // The device has no queue before the first pair's buffers are seen.
    eventually("the first pair is steered to", || {
        wire.send(&flow(0));
        card.try_receive(0).is_some()
    });
    std::thread::sleep(std::time::Duration::from_millis(50));
    while card.try_receive(0).is_some() {}
    (0..64).for_each(|number| wire.send(&flow(number)));
    assert_eq!(count(&mut card, 64), [64, 0]);
    let area = card.rx[1].buffer_area();
    (0..256).for_each(|slot| card.post(1, area + slot * 2048));
    card.rx[1].publish();
    // Its kick makes the worker attach the second queue.
    std::thread::sleep(std::time::Duration::from_millis(200));
    (0..64).for_each(|number| wire.send(&flow(number)));
    let arrived = count(&mut card, 128);
    assert!(arrived[1] > 10, "the second pair gets its share: {arrived:?}");
    // Disabled again, all go to the first.
    card.frontend.enable(2, false);
    std::thread::sleep(std::time::Duration::from_millis(100));
    (0..64).for_each(|number| wire.send(&flow(number)));
    let before = arrived[1];
    assert_eq!(count(&mut card, 192)[1], before);
}

#[test]
fn inherited_tap_queues_are_used() {
    needs_root!("inherited_tap_queues_are_used");
    enter_quiet_namespace();
    ip("tuntap add dev tap0 mode tap vnet_hdr multi_queue");
    ip("link set tap0 up");
    let open = || {
        use std::os::fd::AsFd;
        let queue = vhost_user_net::sys::tap::Queue::open("tap0", true).unwrap();
        queue.as_fd().try_clone_to_owned().unwrap()
    };
    let daemon = Daemon::inheriting(&["--tap-fd=5,6"], open(), Some(open()));
    daemon.wait_until_it_listens();
    let wire = Wire::open("tap0");
    let mut card =
        Card::start(Frontend::new(daemon.connect()), Options { pairs: 2, ..Options::default() });
    card.send(1, &frame(1, 100));
    assert_eq!(wire.receive(1000).unwrap(), frame(1, 100));
}

#[test]
fn idle_port_uses_no_cpu() {
    needs_root!("idle_port_uses_no_cpu");
    let (daemon, wire, mut card) = start(&[], Options::default());
    check_both_ways(&wire, &mut card, 100);
    // However often its worker was told something before.
    for _ in 0..200 {
        card.frontend.enable(0, false);
        card.frontend.enable(0, true);
    }
    // Nothing is due, but the kernel may see to one thing or another in a thread's name.
    daemon.check_idle(std::time::Duration::from_millis(1));
}
