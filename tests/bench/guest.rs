//! TCP between the host and a real Linux guest: this daemon against QEMU's own virtio-net, both on
//! a TAP.

use std::time::{Duration, Instant};

use super::{ROUNDS, median};
use crate::support::daemon::Daemon;
use crate::support::network::{enter_new_namespace, ip, output};
use crate::support::vm::{HOST_ADDRESS, Vm, check_ping, iperf, make_guest};

/// Mbit/s guest to host and host to guest.
fn throughput() -> [f64; 2] {
    check_ping();
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(2) {
        iperf("-n 32M");
    }
    [["-t 3 -R"; ROUNDS], ["-t 3"; ROUNDS]]
        .map(|rounds| median(rounds.iter().map(|options| iperf(options)).collect()))
}

pub(super) fn run() {
    make_guest();
    enter_new_namespace();
    ip("tuntap add dev tap0 mode tap vnet_hdr");
    ip("link set tap0 up");
    ip(&format!("address add {HOST_ADDRESS}/24 dev tap0"));
    let ours = {
        let daemon = Daemon::start(&["--tap=tap0"]);
        let mut vm = Vm::start(&daemon.socket(), &[]);
        vm.wait_ready();
        throughput()
    };
    assert!(output("ip", "link show tap0").contains("tap0"));
    let theirs = {
        let netdev = "tap,ifname=tap0,script=no,downscript=no,vhost=off";
        let mut vm = Vm::start("/nonexistent".as_ref(), &[("NETDEV", netdev)]);
        vm.wait_ready();
        throughput()
    };
    println!("\nTCP with a Linux guest, Mbit/s {:>22} {:>10}", "to host", "to guest");
    println!("  {:<34} {:>16.0} {:>10.0}", "vhost-user-net", ours[0], ours[1]);
    println!("  {:<34} {:>16.0} {:>10.0}", "QEMU's own virtio-net", theirs[0], theirs[1]);
    println!("  {:<34} {:>16.2} {:>10.2}", "ratio", ours[0] / theirs[0], ours[1] / theirs[1]);
}
