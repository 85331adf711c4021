//! The AF_XDP port when its session, its daemon or its device ends under traffic. The kernel must not write
//! to buffers that the daemon has returned to the guest.

use std::time::{Duration, Instant};

use crate::af_xdp::{start, wait_until_open};
use crate::support::daemon::Daemon;
use crate::support::driver::{Card, Options};
use crate::support::frontend::Frontend;
use crate::support::network::{Wire, enter_namespace_with_veth, ip, make_veth, output};
use crate::support::traffic::{Check, Flood, check_canaries, check_reset, frame, plant_canaries};
use crate::support::{eventually, needs_root, one_at_a_time};

const ROUNDS: usize = 100;

/// Checks that frames pass in both directions.
#[track_caller]
fn check_traffic(card: &mut Card, check: &mut Check) {
    card.send(0, &frame(1, 100));
    check.wait(card, 0, 20);
}

/// Returns the number of frames that a device has received.
fn arrived(device: &str) -> u64 {
    let text = output("ip", &format!("-s link show {device}"));
    text.lines().nth(3).unwrap().split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Returns the daemon's descriptors, threads, and private memory in kB. Guest memory varies, so it does not
/// count.
fn resources(daemon: &Daemon) -> (usize, usize, usize) {
    let (descriptors, threads, _) = daemon.resources();
    (descriptors, threads, daemon.private_kilobytes())
}

#[track_caller]
fn check_resources(daemon: &Daemon, before: (usize, usize, usize)) {
    let after = resources(daemon);
    assert_eq!((after.0, after.1), (before.0, before.1), "descriptors and threads");
    // A bounce area has 768 KiB, so a leak in each round exceeds this.
    assert!(after.2 < before.2 + 1024, "{} kB after {} kB", after.2, before.2);
}

#[test]
fn nothing_is_written_after_guest_reset() {
    needs_root!("nothing_is_written_after_guest_reset");
    let _alone = one_at_a_time();
    let (daemon, _wire, mut card) = start(&[], Options::default());
    let _flood = Flood::start("veth1");
    let mut check = Check::default();
    check_traffic(&mut card, &mut check);
    let mut before = None;
    for round in 0..ROUNDS {
        check_reset(&mut card, &mut check, 20);
        check_traffic(&mut card, &mut check);
        if round == 2 {
            before = Some(resources(&daemon));
        }
    }
    check_resources(&daemon, before.unwrap());
}

#[test]
fn nothing_is_written_after_kill_and_traffic_resumes() {
    needs_root!("nothing_is_written_after_kill_and_traffic_resumes");
    let _alone = one_at_a_time();
    let (mut daemon, _wire, mut card) = start(&[], Options::default());
    let _flood = Flood::start("veth1");
    let mut check = Check::default();
    for _ in 0..ROUNDS {
        check_traffic(&mut card, &mut check);
        daemon.kill();
        check.take(&mut card, 0);
        plant_canaries(&card, 0);
        check_canaries(&card, 0, 10);
        daemon.run(&["--af-xdp=veth0"]);
        daemon.wait_until_it_listens();
        card.resume(Frontend::new(daemon.connect()));
    }
    check_traffic(&mut card, &mut check);
}

#[test]
fn traffic_resumes_after_device_goes_down_and_up() {
    needs_root!("traffic_resumes_after_device_goes_down_and_up");
    let _alone = one_at_a_time();
    let (daemon, _, mut card) = start(&[], Options::default());
    let _flood = Flood::start("veth1");
    let mut check = Check::default();
    check_traffic(&mut card, &mut check);
    let mut before = None;
    for round in 0..ROUNDS {
        ip("link set veth0 down");
        // The guest sends on, into nothing.
        (0..3).for_each(|number| card.send(0, &frame(number, 100)));
        ip("link set veth0 up");
        let started = Instant::now();
        check.wait(&mut card, 0, 20);
        let before_sending = arrived("veth1");
        eventually("the guest's frames arrive", || {
            card.send(0, &frame(round, 77));
            arrived("veth1") > before_sending
        });
        assert!(started.elapsed() < Duration::from_secs(5));
        if round == 2 {
            before = Some(resources(&daemon));
        }
    }
    check_resources(&daemon, before.unwrap());
    let log = daemon.log();
    let [lost, back] = ["does not work", "works again"].map(|text| log.matches(text).count());
    // The log leaves lines out when there are more than twenty of a kind in ten seconds.
    for said in [lost, back] {
        assert!((20..=ROUNDS).contains(&said), "{log}");
    }
}

#[test]
fn device_down_with_disabled_tx_ring_recovers() {
    needs_root!("device_down_with_disabled_tx_ring_recovers");
    let (daemon, wire, mut card) = start(&[], Options::default());
    card.frontend.enable(1, false);
    // They are drained, and never reach the port.
    (0..3).for_each(|number| card.send(0, &frame(number, 100)));
    ip("link set veth0 down");
    eventually("the port has noticed", || daemon.log().contains("does not work"));
    ip("link set veth0 up");
    eventually("the port has noticed", || daemon.log().contains("works again"));
    eventually("frames arrive", || {
        wire.send(&frame(7, 100));
        card.try_receive(0).is_some()
    });
    assert!(!daemon.log().contains("panicked"), "{}", daemon.log());
}

#[test]
fn traffic_resumes_after_device_is_recreated() {
    needs_root!("traffic_resumes_after_device_is_recreated");
    let _alone = one_at_a_time();
    let (mut daemon, wire, mut card) = start(&[], Options::default());
    drop(wire);
    let _flood = Flood::start("veth1");
    let mut check = Check::default();
    check_traffic(&mut card, &mut check);
    let mut before = None;
    for round in 0..ROUNDS {
        ip("link delete veth0");
        (0..3).for_each(|number| card.send(0, &frame(number, 100)));
        make_veth(1);
        check_traffic(&mut card, &mut check);
        if round == 2 {
            before = Some(resources(&daemon));
        }
    }
    check_resources(&daemon, before.unwrap());
    assert!(daemon.is_alive());
    // While it is gone nothing spins.
    ip("link delete veth0");
    daemon.check_idle(Duration::from_millis(5));
}

#[test]
fn idle_port_notices_recreated_device() {
    needs_root!("idle_port_notices_recreated_device");
    let (daemon, wire, mut card) = start(&[], Options::default());
    drop(wire);
    // Without traffic only the kernel's notifications report the device's removal and return.
    ip("link delete veth0");
    eventually("the daemon notices the device", || daemon.log().contains("does not work"));
    make_veth(1);
    eventually("the daemon notices the device", || daemon.log().contains("works again"));
    Wire::open("veth1").send(&frame(1, 100));
    assert_eq!(card.receive(0)[12..], frame(1, 100));
}

#[test]
fn signal_under_load_leaves_rings_consistent() {
    needs_root!("signal_under_load_leaves_rings_consistent");
    enter_namespace_with_veth(1);
    let _flood = Flood::start("veth1");
    let mut daemon = Daemon::start(&["--af-xdp=veth0"]);
    let mut card = Card::start(Frontend::new(daemon.connect()), Options::default());
    let mut check = Check::default();
    for _ in 0..10 {
        wait_until_open(&mut card, 0);
        check_traffic(&mut card, &mut check);
        let started = Instant::now();
        daemon.signal(nix::sys::signal::Signal::SIGTERM);
        assert_eq!(daemon.wait().code(), Some(0));
        assert!(started.elapsed() < Duration::from_secs(1));
        daemon.run(&["--af-xdp=veth0"]);
        daemon.wait_until_it_listens();
        card.resume(Frontend::new(daemon.connect()));
    }
}
