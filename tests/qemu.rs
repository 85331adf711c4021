//! A stock Linux guest under an unmodified QEMU, as a tenant has it.

use std::process::Command;

use crate::support::daemon::Daemon;
use crate::support::network::{enter_namespace_with_veth, enter_new_namespace, ip, output};
use crate::support::vm::{GUEST_ADDRESS, HOST_ADDRESS, Vm, check_ping, iperf, needs_guest};
use crate::support::{eventually, one_at_a_time};

/// Starts a daemon on a TAP with the host's address, in a new namespace.
fn daemon(options: &[&str]) -> Daemon {
    enter_new_namespace();
    let client = options.iter().any(|option| option.starts_with("--connect"));
    let all = [&["--tap=tap0"], options].concat();
    let daemon = if client { Daemon::spawn(&all) } else { Daemon::start(&all) };
    eventually("the TAP is there", || output("ip", "link show tap0").contains("UP"));
    ip(&format!("address add {HOST_ADDRESS}/24 dev tap0"));
    daemon
}

/// Returns frames and bytes that the guest has sent and received.
fn counters() -> [u64; 4] {
    let text = output("ip", "-s link show tap0");
    let numbers = |line: usize| -> Vec<u64> {
        let line = text.lines().nth(line).unwrap();
        line.split_whitespace().map(|word| word.parse().unwrap()).collect()
    };
    let (sent, got) = (numbers(3), numbers(5));
    [sent[1], sent[0], got[1], got[0]]
}

#[test]
fn tcp_uses_large_segments_both_ways() {
    needs_guest!("tcp_uses_large_segments_both_ways");
    let _alone = one_at_a_time();
    let daemon = daemon(&[]);
    let mut vm = Vm::start(&daemon.socket(), &[]);
    vm.wait_ready();
    check_ping();
    assert!(iperf("-u -b 50M -l 1400 -t 1") > 40.0);
    assert!(iperf("-u -b 50M -l 1400 -t 1 -R") > 40.0);
    for (options, frames) in [("-t 3 -R", 0), ("-t 3", 2)] {
        let before = counters();
        iperf(options);
        let after = counters();
        let mean = (after[frames + 1] - before[frames + 1]) / (after[frames] - before[frames]);
        assert!(mean > 30_000, "iperf3 {options}: {mean} bytes per frame");
    }
}

#[test]
fn queue_pair_count_changes_under_traffic() {
    needs_guest!("queue_pair_count_changes_under_traffic");
    let _alone = one_at_a_time();
    let daemon = daemon(&["--queue-pairs=2"]);
    let mut vm = Vm::start(&daemon.socket(), &[("QUEUES", "2"), ("RING", "1024")]);
    vm.wait_ready();
    check_ping();
    // QEMU would not tell us of a ring's reset, so the guest must not try.
    vm.run("! ethtool -G eth0 rx 256 tx 128");
    check_ping();
    vm.run("ethtool -L eth0 combined 2");
    iperf("-P 8 -t 2");
    iperf("-P 8 -t 2 -R");
    // Connections that live over all the changes.
    for direction in ["", "-R"] {
        iperf("-n 1M");
        std::thread::sleep(std::time::Duration::from_millis(500));
        let traffic = Command::new("iperf3")
            .args(["-c", GUEST_ADDRESS, "-P", "4", "-t", "6"])
            .args(direction.split_whitespace())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        for round in 0..8 {
            std::thread::sleep(std::time::Duration::from_millis(500));
            vm.run(&format!("ethtool -L eth0 combined {}", 1 + round % 2));
        }
        let ended = traffic.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&ended.stdout);
        assert!(ended.status.success(), "{text}");
        // No connection stood still for a second after the last change.
        // Intervals begin some hundredths of a second late.
        let is_last = |line: &&str| {
            line.split_whitespace().any(|word| word.starts_with("5.0") && word.contains("-6."))
        };
        let last: Vec<&str> = text.lines().filter(is_last).collect();
        assert!(!last.is_empty() && !last.iter().any(|line| line.contains(" 0.00 bits")), "{text}");
    }
    check_ping();
    drop(vm);
    for pair in 0..2 {
        for side in ["rx", "tx"] {
            eventually("its traffic is counted", || {
                let log = daemon.log();
                let prefix = format!("tap0/{pair}: {side} ");
                let count = log.lines().rev().find_map(|line| line.split_once(&prefix));
                count.is_some_and(|(_, rest)| {
                    rest.split(' ').next().unwrap().parse::<u64>().unwrap() > 500
                })
            });
        }
    }
}

/// Returns the frames of a direction in the daemon's last counters, and the copied ones.
fn moved_and_copied(daemon: &Daemon, direction: &str) -> (u64, u64) {
    let log = daemon.log();
    let prefix = format!("veth0/0: {direction} ");
    let line = log.lines().rev().find_map(|line| line.split_once(&prefix)).unwrap().1;
    let number = |words: &str| words.split(' ').next().unwrap().parse::<u64>().unwrap();
    let copied = line.split(", ").filter(|part| part.contains(" copied ")).map(number).sum();
    (number(line), copied)
}

#[test]
fn af_xdp_guest_frames_are_not_copied() {
    needs_guest!("af_xdp_guest_frames_are_not_copied");
    let _alone = one_at_a_time();
    enter_namespace_with_veth(1);
    ip(&format!("address add {HOST_ADDRESS}/24 dev veth1"));
    // What the host sends must be whole: an XDP socket gets it as it is.
    output("ethtool", "-K veth1 tx off");
    // The second guest sums for itself and puts its frames into one piece each.
    for guest_sums in [false, true] {
        let daemon = Daemon::start(&["--af-xdp=veth0"]);
        let mut vm = Vm::start(&daemon.socket(), &[]);
        vm.wait_ready();
        if guest_sums {
            vm.run("ethtool -K eth0 tx off sg off");
        }
        check_ping();
        assert!(iperf("-u -b 50M -l 1400 -t 1") > 40.0);
        assert!(iperf("-u -b 50M -l 1400 -t 1 -R") > 40.0);
        iperf("-t 3");
        iperf("-t 3 -R");
        check_ping();
        drop(vm);
        eventually("the expected count appears", || {
            daemon.log().matches("veth0/0: tx ").count() == 2
        });
        let (received, copied) = moved_and_copied(&daemon, "rx");
        assert!(received > 10_000, "{received}");
        // The guest's buffers take every frame, unless it had none left: a slow guest, now and then.
        assert!(!daemon.log().contains("copied (unsuitable_buffer)"), "{}", daemon.log());
        assert!(copied * 10 < received, "rx: {copied} of {received}");
        let (sent, copied) = moved_and_copied(&daemon, "tx");
        if guest_sums {
            // A few were sent before.
            assert!(sent > 10_000 && copied < 100, "tx: {copied} of {sent}");
        } else {
            // It leaves its TCP to be segmented.
            assert!(sent > 1000 && daemon.log().contains("copied (segmentation)"), "tx: {sent}");
        }
    }
}

/// Number of restarts of the guest, and of QEMU.
const RESTARTS: usize = 20;

fn traffic() {
    check_ping();
    iperf("-n 4M");
    iperf("-n 4M -R");
}

/// Restarts guests and QEMUs on one daemon, and checks that its resources do not grow. `environment` is for
/// `qemu/run-guest`.
fn check_restarts(daemon: &mut Daemon, times: usize, environment: &[(&str, &str)]) {
    let socket = daemon.socket();
    let start = || Vm::start(&socket, environment);
    let mut vm = start();
    vm.wait_ready();
    traffic();
    let mut before = None;
    for round in 0..times {
        vm.type_line("reboot -f");
        vm.wait_ready();
        traffic();
        if round == times.min(3) - 1 {
            before = Some((daemon.resources(), daemon.private_kilobytes()));
        }
    }
    for _ in 0..times {
        vm.kill();
        drop(vm);
        vm = start();
        vm.wait_ready();
        traffic();
    }
    let ((before, before_kilobytes), after) = (before.unwrap(), daemon.resources());
    assert_eq!((after.0, after.1), (before.0, before.1), "descriptors and threads");
    // Not the guest's pages, which come and go.
    let kilobytes = daemon.private_kilobytes();
    assert!(kilobytes < before_kilobytes + 256, "{kilobytes} kB after {before_kilobytes} kB");
    assert!(daemon.is_alive());
}

/// Restarts guests and QEMUs on a daemon that listens.
pub(crate) fn check_restarts_and_listen(times: usize, environment: &[(&str, &str)]) {
    check_restarts(&mut daemon(&[]), times, environment);
}

#[test]
fn guests_and_qemu_restart_against_one_listening_daemon() {
    needs_guest!("guests_and_qemu_restart_against_one_listening_daemon");
    check_restarts_and_listen(RESTARTS, &[]);
}

#[test]
fn guests_and_qemu_restart_against_one_connecting_daemon() {
    needs_guest!("guests_and_qemu_restart_against_one_connecting_daemon");
    let mut daemon = daemon(&["--connect={}"]);
    check_restarts(&mut daemon, RESTARTS, &[("SERVER", "1")]);
}

/// Kills the daemon twice under a guest's TCP connection. `environment` is for `qemu/run-guest`.
pub(crate) fn check_kills(environment: &[(&str, &str)]) {
    let _alone = one_at_a_time();
    enter_new_namespace();
    ip("tuntap add dev tap0 mode tap vnet_hdr");
    ip("link set tap0 up");
    ip(&format!("address add {HOST_ADDRESS}/24 dev tap0"));
    let options = ["--tap=tap0"];
    let mut daemon = Daemon::start(&options);
    let mut vm = Vm::start(&daemon.socket(), environment);
    vm.wait_ready();
    check_ping();
    let traffic = Command::new("iperf3")
        .args(["-c", GUEST_ADDRESS, "-t", "8", "-i", "1"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    for _ in 0..2 {
        std::thread::sleep(std::time::Duration::from_secs(1));
        daemon.kill();
        daemon.run(&options);
    }
    let ended = traffic.wait_with_output().unwrap();
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stdout));
    check_ping();
}

#[test]
fn guest_tcp_connection_survives_daemon_kill() {
    needs_guest!("guest_tcp_connection_survives_daemon_kill");
    check_kills(&[]);
}
