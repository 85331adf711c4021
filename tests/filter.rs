//! Packet filters by protocol, port and prefix. A denied frame reaches neither the wire nor guest memory.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vhost_user_net::port::tap::TapFilter;
use vhost_user_net::sys::tap::Queue;

use crate::support::daemon::{Daemon, port};
use crate::support::driver::{CSUM, Card, HEADER, HOST_TSO, Options};
use crate::support::frontend::Frontend;
use crate::support::network::{
    Wire, enter_namespace_for, enter_namespace_with_tap, enter_namespace_with_veth,
    enter_quiet_namespace, ip, make_veth, output, wait_for_carrier,
};
use crate::support::traffic::{Flood, datagram, flip_ports, frame, tcp_frame};
use crate::support::{eventually, needs_root};

/// Filter that denies the frames of [`denied`].
const RULES: &str = "deny udp dport 53; deny tcp dport 20-29 to 192.0.2.0/24; deny icmp; \
                     default allow";

/// Builds a numbered datagram to a port.
fn to_port(number: u8, port: u16) -> Vec<u8> {
    let (_, mut bytes) = datagram(40);
    bytes[36..38].copy_from_slice(&port.to_be_bytes());
    bytes[42] = number;
    bytes
}

/// Builds frames that the filter denies.
fn denied(number: u8) -> Vec<Vec<u8>> {
    let dns = to_port(number, 53);
    let mut ping = dns.clone();
    ping[23] = 1;
    let mut smtp = to_port(number, 25);
    smtp[23] = 6;
    let tagged = [&dns[..12], &[0x81, 0, 0, 7], &dns[12..]].concat();
    // A later fragment of a datagram, whose port is unknown.
    let mut fragment = to_port(number, 80);
    fragment[21] = 1;
    vec![dns, ping, smtp, tagged, fragment]
}

const PORTS: [&str; 2] = ["--tap=tap0", "--af-xdp=veth0"];

fn card(daemon: &Daemon, options: Options) -> Card {
    let mut card = Card::start(Frontend::new(daemon.connect()), options);
    // On AF_XDP the socket is open then.
    card.send(0, &[0; 5]);
    if Wire::try_open("tap0").is_some() {
        wait_for_carrier("tap0");
    }
    card
}

/// Returns the number of frames that the device dropped before its reader.
fn tx_dropped(device: &str) -> u64 {
    let text = output("ip", &format!("-s link show {device}"));
    text.lines().last().unwrap().split_whitespace().nth(3).unwrap().parse().unwrap()
}

/// Sends all denied frames, then an allowed one, which must be the next frame that the guest receives.
#[track_caller]
fn check_rx(wire: &Wire, card: &mut Card, rounds: u8) {
    for number in 0..rounds {
        denied(number).iter().for_each(|frame| wire.send(frame));
        wire.send(&to_port(number, 80));
        assert_eq!(card.receive(0)[HEADER..], to_port(number, 80), "the first that comes");
    }
    assert!(card.try_receive(0).is_none());
}

#[test]
fn denied_frames_never_reach_the_guest() {
    needs_root!("denied_frames_never_reach_the_guest");
    for port in PORTS {
        let wire = enter_namespace_for(port);
        let daemon = Daemon::start(&[port, &format!("--rx-filter={RULES}")]);
        let before = if port == "--tap=tap0" { tx_dropped("tap0") } else { 0 };
        let mut card = card(&daemon, Options::default());
        check_rx(&wire, &mut card, 50);
        drop(card);
        if port == "--tap=tap0" {
            assert_eq!(tx_dropped("tap0") - before, 250);
        } else {
            let counted = "250 frames, 20700 bytes dropped by its filter";
            eventually("the expected count appears", || daemon.log().contains(counted));
        }
    }
}

#[test]
fn denied_frames_never_reach_the_wire() {
    needs_root!("denied_frames_never_reach_the_wire");
    for port in PORTS {
        let wire = enter_namespace_for(port);
        let daemon = Daemon::start(&[port, &format!("--tx-filter={RULES}")]);
        let features = Options::default().features | CSUM | HOST_TSO;
        let mut card = card(&daemon, Options { features, ..Options::default() });
        for number in 0..50 {
            denied(number).iter().for_each(|frame| card.send(0, frame));
            card.send(0, &to_port(number, 80));
            assert_eq!(wire.receive_any(1000).unwrap(), to_port(number, 80), "the first on it");
        }
        // Nor in segments, nor with their checksum open.
        let (gso, mut segmented) = tcp_frame(5000, 1448);
        segmented[36..38].copy_from_slice(&25_u16.to_be_bytes());
        card.send_with(0, &gso, &segmented);
        // Nor behind IPv4 options that look like another port, nor behind the end of the packet.
        let mut optioned = [&segmented[..34], &[0, 9, 0, 80], &segmented[34..]].concat();
        optioned[14] = 0x46;
        let behind_options = [&[1, 1, 58, 0][..], &gso[4..6], &[38, 0, 16, 0, 0, 0]].concat();
        card.send_with(0, &behind_options, &optioned);
        let mut short = tcp_frame(5000, 1448).1;
        short[36..38].copy_from_slice(&80_u16.to_be_bytes());
        short[16..18].copy_from_slice(&[0, 20]);
        card.send_with(0, &gso, &short);
        let (open, _) = datagram(40);
        card.send_with(0, &open, &to_port(1, 53));
        assert_eq!(wire.receive_any(50), None);
        drop(card);
        eventually("the expected count appears", || {
            daemon.log().contains("254 dropped (filtered)")
        });
    }
}

#[test]
fn concurrently_rewritten_ports_are_denied() {
    needs_root!("concurrently_rewritten_ports_are_denied");
    const SLOTS: u64 = 128;
    for port in PORTS {
        let wire = enter_namespace_for(port);
        let daemon = Daemon::start(&[port, "--tx-filter=deny udp dport 53; default allow"]);
        let mut card = card(&daemon, Options::default());
        let area = card.tx[0].buffer_area();
        for slot in 0..SLOTS {
            card.queue_tx(0, slot, &[0; HEADER], &to_port(0, 80));
        }
        card.tx[0].publish();
        let (stop, mut sent, mut seen) = (AtomicBool::new(false), 0, 0);
        std::thread::scope(|scope| {
            scope.spawn(|| flip_ports(&card.ram, area, SLOTS, &stop));
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    while let Some(frame) = wire.receive_any(0) {
                        seen += 1;
                        assert_ne!(frame[36..38], [0, 53], "frame {seen}");
                    }
                }
            });
            let ring = &mut card.tx[0];
            while sent < 200_000 {
                let recycled = ring.recycle();
                sent += recycled;
                if recycled > 0 {
                    ring.publish();
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert!(seen > 1000, "{seen} frames");
        drop(card);
        eventually("the expected count appears", || daemon.log().contains("dropped (filtered)"));
    }
}

#[test]
fn filter_does_not_outlive_its_daemon() {
    needs_root!("filter_does_not_outlive_its_daemon");
    // A TAP that stays, and its very descriptor.
    enter_namespace_with_tap(false);
    let wire = Wire::open("tap0");
    let queue = Queue::open("tap0", false).unwrap();
    let descriptor = || queue.as_fd().try_clone_to_owned().unwrap();
    let filter = format!("--rx-filter={RULES}");
    let mut first = Daemon::inheriting(&["--tap-fd=5", &filter], descriptor(), None);
    first.wait_until_it_listens();
    check_rx(&wire, &mut card(&first, Options::default()), 2);
    first.kill();
    let second = Daemon::inheriting(&["--tap-fd=5"], descriptor(), None);
    second.wait_until_it_listens();
    let mut guest = card(&second, Options::default());
    wire.send(&to_port(1, 53));
    assert_eq!(guest.receive(0)[HEADER..], to_port(1, 53));
    drop((guest, second));

    // A queue of a device whose program another daemon keeps.
    enter_namespace_with_veth(2);
    let wire = Wire::open("veth1");
    let _other = Daemon::start(&["--af-xdp=veth0,queue=1"]);
    let options = |filter: &'static str| ["--af-xdp=veth0", filter];
    let mut first = Daemon::start(&options("--rx-filter=deny udp dport 53; default allow"));
    let mut guest = card(&first, Options::default());
    // Flows of which some come to its queue.
    let send = |port: u16| {
        for source in 0..16_u16 {
            let mut bytes = to_port(1, port);
            bytes[34..36].copy_from_slice(&source.to_be_bytes());
            wire.send(&bytes);
        }
    };
    send(53);
    send(80);
    assert_eq!(guest.receive(0)[HEADER + 36..HEADER + 38], [0, 80]);
    first.kill();
    // The host's, while there is no guest: of both queues.
    let host = Wire::open("veth0");
    while host.receive_any(20).is_some() {}
    send(53);
    assert_eq!(std::iter::from_fn(|| host.receive_any(50)).count(), 16);
    let second = Daemon::start(&options("--log-level=info"));
    let mut guest = card(&second, Options::default());
    send(53);
    assert_eq!(guest.receive(0)[HEADER + 36..HEADER + 38], [0, 53]);
}

#[test]
fn frames_queued_before_the_filter_are_dropped() {
    needs_root!("frames_queued_before_the_filter_are_dropped");
    enter_namespace_with_tap(false);
    let wire = Wire::open("tap0");
    let queue = Queue::open("tap0", false).unwrap();
    wait_for_carrier("tap0");
    (0..10).for_each(|number| wire.send(&to_port(number, 53)));
    let descriptor = queue.as_fd().try_clone_to_owned().unwrap();
    let filter = format!("--rx-filter={RULES}");
    let daemon = Daemon::inheriting(&["--tap-fd=5", &filter], descriptor, None);
    daemon.wait_until_it_listens();
    check_rx(&wire, &mut card(&daemon, Options::default()), 1);
}

#[test]
fn every_active_tap_queue_has_the_filter() {
    needs_root!("every_active_tap_queue_has_the_filter");
    enter_quiet_namespace();
    ip("tuntap add dev tap0 mode tap vnet_hdr multi_queue");
    ip("link set tap0 up");
    let filter = format!("--rx-filter={RULES}");
    let daemon = Daemon::start(&["--tap=tap0", "--queue-pairs=2", &filter]);
    let wire = Wire::open("tap0");
    let options = Options { pairs: 2, ..Options::default() };
    let mut card = Card::start(Frontend::new(daemon.connect()), options);
    let flow = |source: u16, port: u16| {
        let mut bytes = to_port(7, port);
        bytes[34..36].copy_from_slice(&source.to_be_bytes());
        bytes
    };
    // A queue that is being left out loses the frames that wait in it.
    let round = |card: &mut Card, pairs: usize| {
        eventually("the allowed ones arrive", || {
            for source in 0..64 {
                wire.send(&flow(source, 53));
                wire.send(&flow(source, 80));
            }
            std::thread::sleep(Duration::from_millis(20));
            let mut arrived = [0, 0];
            for (pair, arrived) in arrived.iter_mut().enumerate() {
                while let Some(received) = card.try_receive(pair) {
                    assert_eq!(received[HEADER + 36..HEADER + 38], [0, 80]);
                    *arrived += 1;
                }
            }
            arrived.iter().filter(|count| **count > 10).count() == pairs
        });
    };
    round(&mut card, 2);
    card.frontend.enable(2, false);
    round(&mut card, 1);
    card.frontend.enable(2, true);
    round(&mut card, 2);
    drop(card);
    eventually("the guest has gone", || daemon.log().contains("frontend disconnected"));
    daemon.signal(nix::sys::signal::Signal::SIGTERM);
}

/// Sends a frame of 32 flows each to the UDP port `denied`. Returns the number of arrivals by queue.
fn arrivals(wire: &Wire, queues: &[Arc<Queue>], denied: u16) -> [usize; 2] {
    let mut arrived = [0, 0];
    for source in 0..32_u16 {
        let mut bytes = to_port(1, denied);
        bytes[34..36].copy_from_slice(&source.to_be_bytes());
        wire.send(&bytes);
        for (queue, arrived) in queues.iter().zip(&mut arrived) {
            while queue.discard() {
                *arrived += 1;
            }
        }
    }
    arrived
}

#[test]
fn tap_filter_change_reaches_inactive_queues() {
    needs_root!("tap_filter_change_reaches_inactive_queues");
    enter_quiet_namespace();
    ip("tuntap add dev tap0 mode tap vnet_hdr multi_queue");
    ip("link set tap0 up");
    let queues = [(); 2].map(|()| Arc::new(Queue::open("tap0", true).unwrap())).to_vec();
    let wire = Wire::open("tap0");
    wait_for_carrier("tap0");
    let rules = |port: u16| format!("deny udp dport {port}; default allow").parse().unwrap();
    let filter = TapFilter::new(queues.clone(), &rules(53)).unwrap();
    assert_eq!(arrivals(&wire, &queues, 53), [0, 0]);
    assert_eq!(arrivals(&wire, &queues, 54).iter().sum::<usize>(), 32);
    filter.set_attached(&queues[1], false).unwrap();
    assert_eq!(arrivals(&wire, &queues, 54), [32, 0]);
    // Set while the second is not used, and in force when it is.
    filter.set(&rules(54)).unwrap();
    assert!(!queues[1].is_attached().unwrap());
    assert_eq!(arrivals(&wire, &queues, 54), [0, 0]);
    filter.set_attached(&queues[1], true).unwrap();
    assert!(queues[1].is_attached().unwrap());
    assert_eq!(arrivals(&wire, &queues, 54), [0, 0]);
    let both = arrivals(&wire, &queues, 53);
    assert!(both[0] > 0 && both[1] > 0 && both[0] + both[1] == 32, "{both:?}");
    // And so is none.
    filter.set_attached(&queues[0], false).unwrap();
    filter.set(&"none".parse().unwrap()).unwrap();
    filter.set_attached(&queues[0], true).unwrap();
    for port in [53, 54] {
        let both = arrivals(&wire, &queues, port);
        assert!(both[0] > 0 && both[1] > 0 && both[0] + both[1] == 32, "{both:?}");
    }
}

#[test]
fn filter_is_restored_with_recreated_device() {
    needs_root!("filter_is_restored_with_recreated_device");
    let port = "--af-xdp=veth0";
    let wire = enter_namespace_for(port);
    let daemon = Daemon::start(&[port, &format!("--rx-filter={RULES}")]);
    let mut card = card(&daemon, Options::default());
    check_rx(&wire, &mut card, 2);
    ip("link delete veth0");
    std::thread::sleep(Duration::from_millis(50));
    make_veth(1);
    let wire = Wire::open("veth1");
    eventually("the port works again", || {
        wire.send(&to_port(1, 80));
        std::thread::sleep(Duration::from_millis(5));
        card.try_receive(0).is_some()
    });
    std::thread::sleep(Duration::from_millis(50));
    while card.try_receive(0).is_some() {}
    check_rx(&wire, &mut card, 5);
}

#[test]
fn xdp_program_drops_are_counted_while_port_runs() {
    needs_root!("xdp_program_drops_are_counted_while_port_runs");
    let wire = enter_namespace_for("--af-xdp=veth0");
    let contents = format!(
        "control = \"{{}}/control\"\n{}rx-filter = [\"deny udp dport 53\", \"default allow\"]\n",
        port("vm", "af-xdp = \"veth0\"\n")
    );
    let daemon = Daemon::with_config(&contents, "vm");
    let mut card = Card::start(Frontend::new(daemon.connect_to("vm")), Options::default());
    card.send(0, &[0; 5]);
    (0..7).for_each(|number| wire.send(&to_port(number, 53)));
    wire.send(&to_port(0, 80));
    card.receive(0);
    let control = daemon.path("control");
    let shown = || {
        let words = format!("ctl --control={} show vm", control.display());
        output(env!("CARGO_BIN_EXE_vhost-user-net"), &words)
    };
    eventually("they are shown", || {
        std::thread::sleep(Duration::from_millis(100));
        shown().contains("7 dropped (filtered)")
    });
}

#[test]
fn only_allowed_frames_arrive_under_flood() {
    needs_root!("only_allowed_frames_arrive_under_flood");
    for port in PORTS {
        let wire = enter_namespace_for(port);
        let filter = "--rx-filter=deny ethertype 0x88b5; allow udp; default deny";
        let daemon = Daemon::start(&[port, filter]);
        let mut card = card(&daemon, Options::default());
        let _flood = Flood::start(if port == "--tap=tap0" { "tap0" } else { "veth1" });
        for number in 0..200 {
            wire.send(&to_port(number, 80));
            assert_eq!(card.receive(0)[HEADER..], to_port(number, 80));
        }
        wire.send(&frame(1, 100));
        assert!(card.try_receive(0).is_none());
    }
}
