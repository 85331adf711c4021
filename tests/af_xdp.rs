//! The AF_XDP port: frames between a test driver and the far end of a veth. Each test has its own network
//! namespace.

use std::os::fd::AsFd;

use crate::support::daemon::{Daemon, port, program};
use crate::support::driver::{
    CSUM, Card, EVENT_IDX, HEADER, HOST_TSO, MRG_RXBUF, Options, PROTOCOL, VERSION_1,
};
use crate::support::frontend::Frontend;
use crate::support::guest::Ram;
use crate::support::network::{Wire, enter_namespace_with_veth, ip, output};
use crate::support::traffic::{
    Check, Flood, check_both_ways, datagram, frame, sum, tcp_frame, transport_sum,
};
use crate::support::{eventually, needs_root};

/// Starts a daemon on one end of a veth, and a guest with running rings.
pub(crate) fn start(options: &[&str], card: Options) -> (Daemon, Wire, Card) {
    enter_namespace_with_veth(card.pairs);
    let queues = format!("--queue-pairs={}", card.pairs);
    let mut all = vec!["--af-xdp=veth0", queues.as_str()];
    if options.iter().any(|option| option.starts_with("--af-xdp")) {
        all.remove(0);
    }
    all.extend(options);
    let daemon = Daemon::start(&all);
    let mut card = Card::start(Frontend::new(daemon.connect()), card);
    (0..card.tx.len()).for_each(|pair| wait_until_open(&mut card, pair));
    (daemon, Wire::open("veth1"), card)
}

/// Waits until the AF_XDP socket is open, with a frame too short to be sent. A queue is busy for some 30 ms
/// after its last socket, and the guest's frames wait that long.
#[track_caller]
pub(crate) fn wait_until_open(card: &mut Card, pair: usize) {
    card.send(pair, &[0; 5]);
}

/// Disconnects the guest, and waits until the daemon has logged its counters.
#[track_caller]
fn counted(daemon: &Daemon, card: Card, text: &str) {
    drop(card);
    eventually(text, || daemon.log().contains(text));
}

#[test]
fn frames_pass_in_order_without_copies() {
    needs_root!("frames_pass_in_order_without_copies");
    let split = VERSION_1 | PROTOCOL;
    for features in [Options::default().features, split, split | EVENT_IDX, PROTOCOL | MRG_RXBUF] {
        for (size, indirect) in [(64, false), (1024, false), (256, true)] {
            let features = if indirect { Options::default().features } else { features };
            let options = Options { features, size, indirect, ..Options::default() };
            let (daemon, wire, mut card) = start(&[], options);
            check_both_ways(&wire, &mut card, 2000);
            counted(&daemon, card, "tx 2000 frames");
            assert!(!daemon.log().contains("copied"), "{}", daemon.log());
        }
    }
}

#[test]
fn socket_rings_wrap_at_any_burst_size() {
    needs_root!("socket_rings_wrap_at_any_burst_size");
    let (_daemon, wire, mut card) = start(&[], Options { size: 256, ..Options::default() });
    let mut first = 0;
    for burst in (1..=100).chain(1..=40) {
        (first..first + burst).for_each(|number| wire.send(&frame(number, 60)));
        for number in first..first + burst {
            assert_eq!(card.receive(0)[HEADER..], frame(number, 60));
        }
        for (slot, number) in (first..first + burst).enumerate() {
            card.queue_tx(0, slot as u64, &[0; HEADER], &frame(number, 60));
        }
        card.tx[0].publish();
        for number in first..first + burst {
            assert_eq!(wire.receive(1000).unwrap(), frame(number, 60));
        }
        for _ in 0..burst {
            card.tx[0].wait_used();
        }
        first += burst;
    }
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
fn every_bind_and_attach_mode_passes_frames() {
    needs_root!("every_bind_and_attach_mode_passes_frames");
    for (mode, attached) in [
        ("mode=copy,attach=native", "attached, native"),
        ("mode=auto,attach=generic", "attached, generic"),
        ("mode=copy,attach=auto", "attached, native"),
    ] {
        let (daemon, wire, mut card) =
            start(&[&format!("--af-xdp=veth0,{mode}")], Options::default());
        assert!(daemon.log().contains(attached), "{mode}: {}", daemon.log());
        assert!(daemon.log().contains("copy mode"), "{mode}: {}", daemon.log());
        check_both_ways(&wire, &mut card, 500);
    }
}

#[test]
fn busy_polling_passes_all_frames() {
    needs_root!("busy_polling_passes_all_frames");
    let (daemon, wire, mut card) =
        start(&["--busy-poll=200", "--cpu-affinity=0", "--log-level=debug"], Options::default());
    check_both_ways(&wire, &mut card, 1000);
    assert!(!daemon.log().contains("does not busy-poll"), "{}", daemon.log());
}

#[test]
fn guest_on_huge_pages_needs_no_copies() {
    needs_root!("guest_on_huge_pages_needs_no_copies");
    let _pages = crate::support::guest::HugePages::reserve(4);
    let (daemon, wire, mut card) = start(&[], Options { huge: true, ..Options::default() });
    check_both_ways(&wire, &mut card, 500);
    counted(&daemon, card, "tx 500 frames");
    assert!(!daemon.log().contains("copied"), "{}", daemon.log());
}

#[test]
fn multi_buffer_tx_frames_are_linearized() {
    needs_root!("multi_buffer_tx_frames_are_linearized");
    let (daemon, wire, mut card) = start(&[], Options::default());
    for (number, pieces) in [2u32, 3, 7, 12].into_iter().enumerate() {
        let bytes = [vec![0; HEADER], frame(number, 1200)].concat();
        let area = card.tx[0].buffer_area();
        let each = bytes.len() as u32 / pieces;
        let mut parts = Vec::new();
        for part in 0..pieces {
            let (start, end) = (
                part * each,
                if part + 1 == pieces { bytes.len() as u32 } else { (part + 1) * each },
            );
            let address = area + u64::from(part) * 2048;
            card.ram.write(address, &bytes[start as usize..end as usize]);
            parts.push((address, end - start));
        }
        card.tx[0].add(&parts, false).unwrap();
        card.tx[0].publish();
        card.tx[0].wait_used();
        assert_eq!(wire.receive(1000).unwrap(), frame(number, 1200), "{pieces} pieces");
    }
    // The header apart from the frame is no reason to copy.
    let area = card.tx[0].buffer_area();
    card.ram.write(area, &[0; HEADER]);
    card.ram.write(area + 0x1000, &frame(9, 900));
    card.tx[0].add(&[(area, HEADER as u32), (area + 0x1000, 900)], false).unwrap();
    card.tx[0].publish();
    card.tx[0].wait_used();
    assert_eq!(wire.receive(1000).unwrap(), frame(9, 900));
    counted(&daemon, card, "4 copied (pieces)");
}

#[test]
fn partial_checksums_are_completed() {
    needs_root!("partial_checksums_are_completed");
    let features = Options::default().features | CSUM;
    let (daemon, wire, mut card) = start(&[], Options { features, ..Options::default() });
    // Has the kernel complete what is still open when it leaves the device.
    output("ethtool", "-K veth0 tx off");
    for payload in [18, 19, 500, 1001, 1472] {
        let (header, bytes) = datagram(payload);
        card.send_with(0, &header, &bytes);
        let received = receive_ipv4(&wire);
        assert_eq!(received[..40], bytes[..40]);
        assert_eq!(received[42..], bytes[42..]);
        assert_eq!(transport_sum(&received), 0xffff, "{payload} bytes");
    }
    // What lies outside the frame is refused.
    let (mut header, bytes) = datagram(100);
    header[6] = 200;
    card.send_with(0, &header, &bytes);
    assert_eq!(wire.receive_any(50), None);
    drop(card);
    eventually("the expected count appears", || daemon.log().contains("5 copied (checksum)"));
    assert!(daemon.log().contains("1 dropped (bad_header)"));
}

/// Returns the next frame with an IPv4 packet.
fn receive_ipv4(wire: &Wire) -> Vec<u8> {
    loop {
        let received = wire.receive_any(1000).unwrap();
        if received[12..14] == [8, 0] {
            return received;
        }
    }
}

#[test]
fn gso_frames_are_segmented() {
    needs_root!("gso_frames_are_segmented");
    let features = Options::default().features | CSUM | HOST_TSO;
    let (daemon, wire, mut card) = start(&[], Options { features, ..Options::default() });
    output("ethtool", "-K veth0 tx off");
    // More segments than can be in flight, many, and one.
    for (payload, size) in [(20_000, 64), (20_000, 1448), (1448, 1448), (100, 1448)] {
        let (header, bytes) = tcp_frame(payload, size);
        card.send_with(0, &header, &bytes);
        let mut got: Vec<u8> = Vec::new();
        while got.len() < payload {
            let received = receive_ipv4(&wire);
            let sequence = u32::from_be_bytes(received[38..42].try_into().unwrap());
            assert_eq!(sequence as usize, got.len());
            assert_eq!(received.len() - 54, usize::from(size).min(payload - got.len()));
            assert_eq!(sum(&received[14..34]), 0xffff);
            assert_eq!(transport_sum(&received), 0xffff);
            got.extend(&received[54..]);
        }
        assert_eq!(got, bytes[54..]);
    }
    // Segments that the device does not take.
    let (header, bytes) = tcp_frame(20_000, 1480);
    card.send_with(0, &header, &bytes);
    assert_eq!(wire.receive_any(50), None);
    drop(card);
    eventually("the expected count appears", || daemon.log().contains("4 copied (segmentation)"));
    assert!(daemon.log().contains("1 dropped (too_long)"));
}

#[test]
fn rx_frames_are_spread_over_small_buffers() {
    needs_root!("rx_frames_are_spread_over_small_buffers");
    for (buffer, size) in [(100, 1024), (500, 256), (1530, 256)] {
        let (daemon, wire, mut card) = start(&[], Options { buffer, size, ..Options::default() });
        wire.send(&frame(1, 1000));
        let received = card.receive(0);
        assert_eq!(received[HEADER..], frame(1, 1000));
        let count = (1000 + HEADER as u32).div_ceil(buffer) as u16;
        assert_eq!(received[10..12], count.to_le_bytes());
        // As many frames at a time as the buffers take.
        for first in (0..200).step_by(10) {
            (first..first + 10).for_each(|number| wire.send(&frame(number, 60 + number * 7)));
            for number in first..first + 10 {
                assert_eq!(card.receive(0)[HEADER..], frame(number, 60 + number * 7));
            }
        }
        drop(card);
        let copied = if buffer < 1530 { "copied (unsuitable_buffer)" } else { "rx 201 frames" };
        eventually(copied, || daemon.log().contains(copied));
        assert_eq!(daemon.log().contains("copied"), buffer < 1530, "{}", daemon.log());
    }
}

#[test]
fn frame_that_fits_no_buffer_is_dropped_alone() {
    needs_root!("frame_that_fits_no_buffer_is_dropped_alone");
    let options = Options { features: VERSION_1 | PROTOCOL, buffer: 200, ..Options::default() };
    let (daemon, wire, mut card) = start(&[], options);
    wire.send(&frame(1, 1000));
    wire.send(&frame(2, 189));
    wire.send(&frame(3, 188));
    // Buffers that hold no frame come back empty: drivers count an error.
    assert_eq!([card.rx[0].wait_used().1, card.rx[0].wait_used().1], [0, 0]);
    assert_eq!(card.receive(0)[HEADER..], frame(3, 188));
    counted(&daemon, card, "2 dropped (no_room)");
}

#[test]
fn suitable_and_unsuitable_buffers_mix() {
    needs_root!("suitable_and_unsuitable_buffers_mix");
    for features in [Options::default().features, VERSION_1 | PROTOCOL] {
        let options = Options { features, ..Options::default() };
        enter_namespace_with_veth(1);
        let daemon = Daemon::start(&["--af-xdp=veth0"]);
        let wire = Wire::open("veth1");
        let mut card = Card::prepare(Frontend::new(daemon.connect()), options);
        // Every third buffer is in two pieces, of which none takes a whole frame.
        let area = card.rx[0].buffer_area();
        for slot in 0..100 {
            let address = area + slot * 2048;
            if slot % 3 == 1 {
                card.post_pieces(0, &[(address, 700), (address + 700, 1348)]);
            } else {
                card.post(0, address);
            }
        }
        card.rx[0].publish();
        card.run();
        wait_until_open(&mut card, 0);
        let frame = |number: usize| frame(number, 60 + number * 13 % 1400);
        // The daemon may not have taken all buffers yet.
        for some in [0..30, 30..60, 60..90] {
            some.clone().for_each(|number| wire.send(&frame(number)));
            some.for_each(|number| {
                assert_eq!(card.receive_once(0)[HEADER..], frame(number), "{number}")
            });
        }
        counted(&daemon, card, "copied (unsuitable_buffer)");
    }
}

#[test]
fn frames_wait_until_guest_posts_buffers() {
    needs_root!("frames_wait_until_guest_posts_buffers");
    enter_namespace_with_veth(1);
    let daemon = Daemon::start(&["--af-xdp=veth0"]);
    let wire = Wire::open("veth1");
    let mut card = Card::prepare(Frontend::new(daemon.connect()), Options::default());
    card.run();
    let area = card.rx[0].buffer_area();
    (0..4).for_each(|slot| card.post(0, area + slot * 2048));
    card.rx[0].publish();
    wait_until_open(&mut card, 0);
    (0..4).for_each(|number| wire.send(&frame(number, 100)));
    (0..4).for_each(|number| assert_eq!(card.receive_once(0)[HEADER..], frame(number, 100)));
    // Four more are received, and handed over when there are buffers.
    (4..8).for_each(|number| wire.send(&frame(number, 100)));
    std::thread::sleep(std::time::Duration::from_millis(50));
    card.fill_from(0, 4);
    (4..8).for_each(|number| assert_eq!(card.receive(0)[HEADER..], frame(number, 100)));
    check_both_ways(&wire, &mut card, 500);
}

#[test]
fn memory_added_under_traffic_carries_frames() {
    needs_root!("memory_added_under_traffic_carries_frames");
    let (daemon, _wire, mut card) = start(&[], Options::default());
    let (flood, mut check) = (Flood::start("veth1"), Check::default());
    check.wait(&mut card, 0, 100);
    let more = Ram::new(1 << 32, 0x20_0000);
    card.frontend.add_mem_reg(&more);
    check.wait(&mut card, 0, 100);
    drop(flood);
    std::thread::sleep(std::time::Duration::from_millis(50));
    check.take(&mut card, 0);
    drop(card);
    eventually("the expected count appears", || daemon.log().contains("frontend disconnected"));
    assert!(!daemon.log().contains("copied"), "{}", daemon.log());
    // Sent from and received into the new region.
    let mut card = Card::prepare(Frontend::new(daemon.connect()), Options::default());
    card.frontend.add_mem_reg(&more);
    let wire = Wire::open("veth1");
    card.tx[0].start(&mut card.frontend, 0);
    card.rx[0].start(&mut card.frontend, 0);
    card.frontend.enable(0, true);
    card.frontend.enable(1, true);
    more.write(1 << 32, &[vec![0; HEADER], frame(5, 300)].concat());
    card.tx[0].add(&[(1 << 32, 312)], false).unwrap();
    card.rx[0].add(&[((1 << 32) + 0x1000, 2048)], true).unwrap();
    card.rx[0].publish();
    card.tx[0].publish();
    card.tx[0].wait_used();
    assert_eq!(wire.receive(1000).unwrap(), frame(5, 300));
    wire.send(&frame(6, 400));
    assert_eq!(card.rx[0].wait_used().1, 412);
    assert_eq!(more.read((1 << 32) + 0x1000 + HEADER as u64, 400), frame(6, 400));
}

#[test]
fn queue_pairs_have_own_queues_and_share_umem() {
    needs_root!("queue_pairs_have_own_queues_and_share_umem");
    let (daemon, wire, mut card) = start(&[], Options { pairs: 2, ..Options::default() });
    for pair in 0..2 {
        card.send(pair, &frame(pair, 200));
        assert_eq!(wire.receive(1000).unwrap(), frame(pair, 200));
    }
    // The kernel spreads what the packet socket sends over the veth's queues.
    let flow = |number: usize| {
        let (_, mut bytes) = datagram(100);
        bytes[34..36].copy_from_slice(&(1000 + number as u16).to_be_bytes());
        bytes
    };
    let mut arrived = [0, 0];
    (0..64).for_each(|number| wire.send(&flow(number)));
    eventually("all arrive", || {
        for (pair, arrived) in arrived.iter_mut().enumerate() {
            while card.try_receive(pair).is_some() {
                *arrived += 1;
            }
        }
        arrived[0] + arrived[1] == 64
    });
    assert!(arrived.iter().all(|count| *count > 5), "{arrived:?}");
    // One queue pair stops and starts again while the other runs.
    for _ in 0..10 {
        card.frontend.enable(2, false);
        card.frontend.enable(2, true);
        card.send(0, &frame(7, 100));
        card.send(1, &frame(8, 100));
        assert_eq!(wire.receive(1000).unwrap(), frame(7, 100));
        assert_eq!(wire.receive(1000).unwrap(), frame(8, 100));
    }
    drop(card);
    eventually("the expected count appears", || daemon.log().contains("frontend disconnected"));
}

#[test]
fn two_daemons_share_device_and_xdp_program() {
    needs_root!("two_daemons_share_device_and_xdp_program");
    enter_namespace_with_veth(2);
    let start = |queue: u32| Daemon::start(&[&format!("--af-xdp=veth0,queue={queue}")]);
    let mut first = start(0);
    let second = start(1);
    let wire = Wire::open("veth1");
    let mut cards = [&first, &second]
        .map(|daemon| Card::start(Frontend::new(daemon.connect()), Options::default()));
    let check = |cards: &mut [Card], wire: &Wire| {
        for (number, card) in cards.iter_mut().enumerate() {
            card.send(0, &frame(number, 100));
            assert_eq!(wire.receive(1000).unwrap(), frame(number, 100));
        }
    };
    check(&mut cards, &wire);
    let attached = || output("ip", "-d link show veth0").contains("prog/xdp");
    assert!(attached());
    // The one that loaded the program dies: the other's frames still come.
    first.kill();
    assert!(attached());
    check(&mut cards[1..], &wire);
    let flow = |number: u16| {
        let (_, mut bytes) = datagram(100);
        bytes[34..36].copy_from_slice(&number.to_be_bytes());
        bytes
    };
    eventually("frames come to the second", || {
        (0..16).for_each(|number| wire.send(&flow(number)));
        cards[1].try_receive(0).is_some()
    });
    // A new daemon joins the attached program.
    let next = start(0);
    let mut card = Card::start(Frontend::new(next.connect()), Options::default());
    card.send(0, &frame(3, 100));
    assert_eq!(wire.receive(1000).unwrap(), frame(3, 100));
    drop((card, cards, next, second));
    assert!(!attached(), "nothing is left behind");
}

#[test]
fn frames_pass_to_host_while_no_guest_runs() {
    needs_root!("frames_pass_to_host_while_no_guest_runs");
    enter_namespace_with_veth(1);
    let daemon = Daemon::start(&["--af-xdp=veth0"]);
    let (wire, host) = (Wire::open("veth1"), Wire::open("veth0"));
    wire.send(&frame(1, 100));
    assert_eq!(host.receive(1000).unwrap(), frame(1, 100));
    let mut card = Card::start(Frontend::new(daemon.connect()), Options::default());
    wait_until_open(&mut card, 0);
    wire.send(&frame(3, 100));
    assert_eq!(card.receive(0)[HEADER..], frame(3, 100));
    drop(card);
    let times = |words| daemon.log().matches(words).count();
    eventually("the socket is closed", || times("bytes passed to") == times("bound in copy mode"));
    assert!(daemon.log().contains("1 frames, 100 bytes passed to the host"));
    wire.send(&frame(4, 100));
    let seen: Vec<_> = std::iter::from_fn(|| host.receive(200)).collect();
    assert_eq!(seen, [frame(4, 100)]);
}

/// Runs a daemon that must fail to start. Returns its error line.
#[track_caller]
pub(crate) fn refused(options: &[&str]) -> String {
    let output = program()
        .args(["--socket-path=/tmp/vhost-user-net-never", "--log-level=error"])
        .args(options)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

#[test]
fn unavailable_device_or_mode_is_refused_with_fix() {
    needs_root!("unavailable_device_or_mode_is_refused_with_fix");
    enter_namespace_with_veth(1);
    let says = |options: &[&str], words: &[&str]| {
        let text = refused(options);
        words.iter().for_each(|word| assert!(text.contains(word), "{word}: {text}"));
    };
    says(&["--af-xdp=nothing0"], &["no network device nothing0"]);
    says(&["--af-xdp=veth0,queue=5"], &["queue 5 of veth0", "ethtool -l"]);
    says(&["--af-xdp=veth0", "--queue-pairs=2"], &["queue 1 of veth0", "ethtool -l"]);
    says(&["--af-xdp=veth0,mode=zero-copy"], &["veth0", "no zero copy", "mode=auto"]);
    let steered = ["--af-xdp=veth0,steer=mac", "--mac=52:54:00:12:34:56"];
    says(&steered, &["52:54:00:12:34:56", "queue 0 of veth0", "takes no such rule", "ntuple on"]);
    ip("link set lo mtu 1500");
    says(&["--af-xdp=lo,attach=native"], &["lo", "attach=generic"]);
    let first = Daemon::start(&["--af-xdp=veth0"]);
    let mut card = Card::start(Frontend::new(first.connect()), Options::default());
    card.send(0, &frame(1, 100));
    says(&["--af-xdp=veth0"], &["queue 0 of veth0", "another AF_XDP socket", "queue=N"]);
    drop((card, first));
    ip("link set veth1 mtu 9000");
    ip("link set veth0 mtu 9000");
    says(&["--af-xdp=veth0"], &["veth0 has an MTU of 9000", "up to 3806"]);
    assert!(!output("ip", "-d link show veth0").contains("prog/xdp"), "nothing is left behind");
}

#[test]
fn foreign_xdp_program_is_named_and_kept() {
    needs_root!("foreign_xdp_program_is_named_and_kept");
    enter_namespace_with_veth(1);
    // r0 = XDP_PASS; exit
    let program = vhost_user_net::sys::bpf::Program::load("somebody_s", &[0x2_0000_00b7, 0x95]);
    let device = vhost_user_net::sys::link::find("veth0").unwrap().index;
    let hook = vhost_user_net::sys::bpf::Hook::Native;
    let link = vhost_user_net::sys::bpf::Link::attach(&program.unwrap(), device, hook).unwrap();
    let text = refused(&["--af-xdp=veth0"]);
    assert!(text.contains("'somebody_s'") && text.contains("xdp off"), "{text}");
    assert_eq!(link.info().unwrap().unwrap().device, device);
}

#[test]
fn low_memlock_limit_is_logged_with_required_size() {
    needs_root!("low_memlock_limit_is_logged_with_required_size");
    enter_namespace_with_veth(1);
    let wrapper = ["prlimit", "--memlock=1048576", "setpriv", "--bounding-set=-ipc_lock"];
    let mut daemon = Daemon::start_under(&wrapper, &["--af-xdp=veth0"]);
    let mut card = Card::start(Frontend::new(daemon.connect()), Options::default());
    card.send(0, &frame(1, 100));
    drop(card);
    eventually("the expected count appears", || daemon.log().contains("1 dropped (host_refused)"));
    let log = daemon.log();
    assert!(log.contains("needs that much locked memory") && log.contains("ulimit -l"), "{log}");
    assert_eq!(log.matches("does not work").count(), 1, "once: {log}");
    assert!(daemon.is_alive());
}

#[test]
fn pinned_memory_is_counted() {
    needs_root!("pinned_memory_is_counted");
    enter_namespace_with_veth(2);
    let file = "control = \"{}/control\"\n".to_owned()
        + &port("one", "af-xdp = \"veth0\"\nqueue-pairs = 2");
    let daemon = Daemon::with_config(&file, "one");
    let pinned = || {
        let metrics = daemon.ask(&["metrics"]);
        let start = "vhost_user_net_pinned_bytes{port=\"one\"} ";
        let found = metrics.lines().find_map(|line| line.strip_prefix(start)).unwrap();
        found.parse::<u64>().unwrap()
    };
    assert_eq!(pinned(), 0);
    let options = Options { pairs: 2, ..Options::default() };
    let card = Card::start(Frontend::new(daemon.connect_to("one")), options);
    // Once, however many queue pairs there are.
    let (guest, arenas) = (card.ram.size, 2 << 20);
    eventually("it is pinned", || pinned() > guest);
    assert!(pinned() < guest + arenas, "{} of {guest}", pinned());
    drop(card);
    eventually("nothing is pinned", || pinned() == 0);
}

#[test]
fn frames_refused_by_device_are_counted() {
    needs_root!("frames_refused_by_device_are_counted");
    let (daemon, wire, mut card) = start(&[], Options::default());
    ip("link set veth1 down");
    (0..10).for_each(|number| card.send(0, &frame(number, 100)));
    ip("link set veth1 up");
    drop(wire);
    let wire = Wire::open("veth1");
    eventually("the link is back", || {
        card.send(0, &frame(10, 100));
        wire.receive(10).is_some()
    });
    drop(card);
    eventually("the expected count appears", || daemon.log().matches("veth0/0: tx ").count() == 2);
    let log = daemon.log();
    let tx = log.lines().rfind(|line| line.contains("veth0/0: tx ")).unwrap();
    let dropped = tx.split(", ").find(|part| part.contains("dropped (host_refused)")).unwrap();
    assert!(dropped.split(' ').next().unwrap().parse::<u64>().unwrap() >= 10, "{tx}");
}

#[test]
fn idle_port_uses_no_cpu() {
    needs_root!("idle_port_uses_no_cpu");
    let (daemon, wire, mut card) = start(&[], Options::default());
    check_both_ways(&wire, &mut card, 100);
    daemon.check_idle(std::time::Duration::from_millis(1));
}

#[test]
fn kernel_rings_point_into_guest_memory() {
    needs_root!("kernel_rings_point_into_guest_memory");
    let (daemon, wire, mut card) = start(&[], Options::default());
    check_both_ways(&wire, &mut card, 600);
    // Seen from outside, in what the kernel has mapped for the daemon.
    let view = daemon.socket_rings();
    let guest = view.guest_memory(card.ram.file.as_fd());
    for (name, addresses) in [("rx", &view.rx), ("tx", &view.tx)] {
        assert!(addresses.len() > 500, "{name}: {}", addresses.len());
        let outside = addresses.iter().filter(|address| !guest.contains(address)).count();
        assert_eq!(outside, 0, "{name}: {outside} of {} are outside {guest:x?}", addresses.len());
    }
}
