//! Rings on the loopback port, which returns each frame once, unchanged and in order.

use std::os::fd::AsRawFd;

use vhost::vhost_user::message::FrontendReq;

use crate::support::daemon::Daemon;
use crate::support::driver::HUGE;
use crate::support::driver::{
    CSUM, Card, EVENT_IDX, GUEST_CSUM, GUEST_TSO, HEADER, HOST_TSO, IN_ORDER, INDIRECT, MRG_RXBUF,
    Options, PROTOCOL, Ring, VERSION_1,
};
use crate::support::frontend::Frontend;
use crate::support::guest::{HugePages, Ram, huge_memfd};
use crate::support::{eventually, needs_root};

fn start(options: Options) -> (Daemon, Card) {
    let daemon = Daemon::start(&["--loopback", "--queue-pairs=2"]);
    let card = Card::start(Frontend::new(daemon.connect()), options);
    (daemon, card)
}

#[test]
fn frames_echo_on_every_ring_format_and_size() {
    let base = VERSION_1 | PROTOCOL;
    for features in
        [0, EVENT_IDX, INDIRECT | MRG_RXBUF, EVENT_IDX | INDIRECT | MRG_RXBUF | IN_ORDER]
    {
        for size in [8, 64, 256, 1024] {
            for indirect in [false, true] {
                if indirect && features & INDIRECT == 0 {
                    continue;
                }
                let options =
                    Options { features: base | features, size, indirect, ..Options::default() };
                let (_daemon, mut card) = start(options);
                card.check_echo(3 * usize::from(size) + 5);
            }
        }
    }
}

#[test]
fn largest_ring_is_used_over_its_whole_length() {
    let options = Options { size: 32768, buffer: 1600, ..Options::default() };
    let (_daemon, mut card) = start(options);
    card.check_echo(40_000);
}

#[test]
fn ring_indexes_wrap_around() {
    let (_daemon, mut card) = start(Options { size: 64, ..Options::default() });
    card.check_echo(70_000);
    assert!(card.tx[0].used_index < 10_000);
}

#[test]
fn frame_larger_than_a_buffer_is_spread_over_several() {
    let features = Options::default().features | CSUM | GUEST_CSUM | HOST_TSO | GUEST_TSO;
    let (_daemon, mut card) = start(Options { features, buffer: 512, ..Options::default() });
    let frame: Vec<u8> = (0..1400u32).map(|byte| byte as u8).collect();
    card.send(0, &frame);
    let back = card.receive(0);
    assert_eq!(back[HEADER..], frame);
    assert_eq!(back[10..12], 3u16.to_le_bytes(), "num_buffers");
    card.check_echo(500);
}

#[test]
fn without_mergeable_buffers_oversized_frame_is_dropped() {
    let (_daemon, mut card) =
        start(Options { features: VERSION_1 | PROTOCOL, buffer: 512, ..Options::default() });
    card.send(0, &[1; 1400]);
    card.send(0, &[2; 400]);
    let back = card.receive(0);
    assert_eq!(back[HEADER..], [2; 400]);
    assert_eq!(back[10..12], 1u16.to_le_bytes(), "num_buffers is 1 without mergeable buffers");
}

#[test]
fn ten_byte_legacy_header_is_accepted() {
    let (_daemon, mut card) = start(Options { features: PROTOCOL, ..Options::default() });
    card.send_with(0, &[0; 10], &[3; 100]);
    let (_, length) = card.rx[0].wait_used();
    assert_eq!(length, 110);
}

#[test]
fn partial_checksum_never_reaches_guest_without_feature() {
    let features = Options::default().features | CSUM;
    let (_daemon, mut card) = start(Options { features, ..Options::default() });
    let mut header = [0; HEADER];
    header[0] = 1;
    header[6] = 34;
    header[8] = 16;
    card.send_with(0, &header, &[1; 60]);
    card.send(0, &[2; 60]);
    assert_eq!(card.receive(0)[HEADER..], [2; 60]);
}

#[test]
fn calls_are_sent_only_on_request() {
    for event_idx in [0, EVENT_IDX] {
        let features = VERSION_1 | PROTOCOL | event_idx;
        let (_daemon, mut card) = start(Options { features, ..Options::default() });
        card.check_echo(10);
        card.tx[0].want_no_call();
        card.rx[0].want_no_call();
        // Chains in flight at the change may still cause calls.
        card.check_echo(5);
        let _ = (card.tx[0].call.read(), card.rx[0].call.read());
        card.check_echo(200);
        assert!(card.tx[0].call.read().is_err(), "event_idx {event_idx:#x}: tx called");
        assert!(card.rx[0].call.read().is_err(), "event_idx {event_idx:#x}: rx called");
        card.tx[0].want_call();
        card.rx[0].want_call();
        card.send(0, &[1; 60]);
        eventually("a tx call", || card.tx[0].call.read().is_ok());
        eventually("an rx call", || card.rx[0].call.read().is_ok());
    }
}

#[test]
fn kicks_are_suppressed_while_worker_is_awake() {
    // With busy polling the worker stays awake after the first frame.
    let daemon = Daemon::start(&["--loopback", "--busy-poll=1000000"]);
    let features = VERSION_1 | PROTOCOL;
    let mut card =
        Card::start(Frontend::new(daemon.connect()), Options { features, ..Options::default() });
    card.check_echo(10);
    let kicked = (0..200).filter(|_| {
        let head = card.queue_tx(0, 0, &[0; HEADER], &[1; 60]);
        let kicked = card.tx[0].publish();
        assert_eq!(card.tx[0].wait_used().0, head);
        card.receive(0);
        kicked
    });
    assert!(kicked.count() < 20);
}

#[test]
fn other_queue_pair_runs_while_one_is_broken() {
    let (_daemon, mut card) = start(Options { pairs: 2, ..Options::default() });
    card.tx[1].offer_head(999);
    card.tx[1].publish();
    eventually("the frontend is told", || card.tx[1].error.read().is_ok());
    card.check_echo(300);
}

#[test]
fn huge_page_memory_works_at_any_file_offset() {
    needs_root!("huge_page_memory_works_at_any_file_offset");
    let _pages = HugePages::reserve(16);
    let (_daemon, mut card) = start(Options { huge: true, ..Options::default() });
    card.check_echo(300);
    // QEMU's second region starts at 0xc0000 of its file, in the middle of a huge page.
    let file = huge_memfd(2 * HUGE).unwrap();
    let region = [0, 1 << 32, HUGE, 1 << 32, 0xc0000u64];
    let payload: Vec<u8> = region.iter().flat_map(|word| word.to_ne_bytes()).collect();
    card.frontend.ask(FrontendReq::ADD_MEM_REG, &payload, &[file.as_raw_fd()]);
    let whole = Ram::of(file, 0, 2 * HUGE);
    whole.write(0xc0000, &[0; HEADER]);
    whole.write(0xc0000 + HEADER as u64, &[8; 80]);
    card.tx[0].add(&[(1 << 32, (HEADER + 80) as u32)], false).unwrap();
    card.tx[0].publish();
    assert_eq!(card.receive(0)[HEADER..], [8; 80]);
}

#[test]
fn rings_without_call_and_kick_descriptors_are_served() {
    let daemon = Daemon::start(&["--loopback"]);
    let mut card = Card::prepare(Frontend::new(daemon.connect()), Options::default());
    card.fill();
    for ring in [&card.rx[0], &card.tx[0]] {
        let frontend = &mut card.frontend;
        frontend.ask(
            FrontendReq::SET_VRING_NUM,
            &crate::support::frontend::pair(ring.index, 256),
            &[],
        );
        let place = crate::support::frontend::addresses(
            ring.index,
            0,
            ring.descriptors,
            ring.used,
            ring.avail,
        );
        frontend.ask(FrontendReq::SET_VRING_ADDR, &place, &[]);
        frontend.event(FrontendReq::SET_VRING_CALL, ring.index, None);
        frontend.event(FrontendReq::SET_VRING_KICK, ring.index, None);
        frontend.enable(ring.index, true);
    }
    card.check_echo(300);
}

#[test]
fn one_ring_is_reset_while_others_run() {
    const RING_RESET: u64 = 1 << 40;
    let offered = |options: &[&str]| {
        let daemon = Daemon::start(options);
        Frontend::new(daemon.connect()).begin() & RING_RESET
    };
    assert_eq!(offered(&["--loopback"]), 0, "QEMU would show it to the guest, and not tell us");

    let daemon = Daemon::start(&["--loopback", "--queue-pairs=2", "--ring-reset=on"]);
    let features = Options::default().features | RING_RESET;
    let options = Options { features, pairs: 2, ..Options::default() };
    let mut card = Card::start(Frontend::new(daemon.connect()), options);
    card.send(1, &[1; 100]);
    card.receive(1);
    card.check_echo(100);
    let mut size = card.options.size;
    for round in 0..20 {
        // The second pair's tx ring goes, and comes back elsewhere with another size.
        card.frontend.enable(3, false);
        card.frontend.get_vring_base(3);
        card.check_echo(20);
        size = if size == 256 { 64 } else { 256 };
        let place = card.tx[1].descriptors + if round % 2 == 0 { 0x100 } else { 0 };
        let before = card.tx[1].descriptors;
        card.tx[1] = Ring::new(&card.ram, 3, place, size, true);
        card.tx[1].start(&mut card.frontend, 0);
        card.frontend.enable(3, true);
        card.send(1, &[round; 100]);
        assert_eq!(card.receive(1)[HEADER..], [round; 100]);
        card.tx[1].descriptors = before;
    }
}

#[test]
fn stopped_ring_is_not_written() {
    let (_daemon, mut card) = start(Options::default());
    card.check_echo(50);
    let bases = [card.frontend.get_vring_base(0), card.frontend.get_vring_base(1)];
    let before = card.ram.read(0, card.ram.size as usize);
    card.tx[0].kick.write(1).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert!(before == card.ram.read(0, card.ram.size as usize), "memory has changed");
    let used = [&card.rx[0], &card.tx[0]].map(|ring| card.ram.load(ring.used + 2));
    assert_eq!(bases, used.map(u32::from));
}
