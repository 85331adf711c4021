//! TCP and pings between the host and a real Linux guest: this daemon against QEMU's own virtio-net,
//! each on a TAP of its own. The guests are measured in turns, and one that is not stands still: an emulated
//! processor takes a real one even for its clock, and two of them have a ping wait for either.

use super::measure::median;
use super::tuning::{half_and_most, round_trips_of};
use crate::support::daemon::Daemon;
use crate::support::network::{enter_namespace_with_veth, enter_new_namespace, ip, output};
use crate::support::vm::{HOST_ADDRESS, Vm, iperf, iperf_with, make_guest};

const ROUNDS: usize = 5;
/// Pings of a round.
const PINGS: u32 = 300;
const OURS: &str = "192.0.2.2";
const THEIRS: &str = "198.51.100.2";

pub(super) fn run() {
    make_guest();
    // Each in a namespace of its own.
    for part in [tap, af_xdp] {
        std::thread::spawn(part).join().unwrap();
    }
}

/// What a guest was measured at.
#[derive(Default)]
pub(super) struct Figures {
    /// TCP in Mbit/s, to the host and to the guest.
    pub(super) rates: [Vec<f64>; 2],
    /// Round trips in microseconds.
    pub(super) trips: Vec<f64>,
}

/// Measures a guest on this daemon's card, and one on QEMU's own.
pub(super) fn measure() -> [(&'static str, Figures); 2] {
    enter_new_namespace();
    for (tap, host) in [("tap0", "192.0.2.1/24"), ("tap1", "198.51.100.1/24")] {
        ip(&format!("tuntap add dev {tap} mode tap vnet_hdr"));
        ip(&format!("link set {tap} up"));
        ip(&format!("address add {host} dev {tap}"));
    }
    let daemon = Daemon::start(&["--tap=tap0"]);
    let ours = [("ADDRESS", "192.0.2.2/24")];
    let theirs = [
        ("ADDRESS", "198.51.100.2/24"),
        ("NETDEV", "tap,ifname=tap1,script=no,downscript=no,vhost=off"),
    ];
    let mut guests =
        [Vm::start(&daemon.socket(), &ours), Vm::start("/nonexistent".as_ref(), &theirs)];
    guests.iter_mut().for_each(|guest| guest.wait_ready());

    guests.iter().for_each(Vm::pause);
    let mut figures = [("vhost-user-net, TAP", OURS), ("QEMU's own virtio-net, TAP", THEIRS)]
        .map(|(name, address)| (name, address, Figures::default()));
    for round in 0..=ROUNDS {
        for (guest, (_, address, figures)) in guests.iter().zip(&mut figures) {
            guest.resume();
            for (direction, options) in ["-t 2 -R", "-t 2"].into_iter().enumerate() {
                let rate = iperf_with(address, options);
                // The first round warms up the guest's translated code.
                if round > 0 {
                    figures.rates[direction].push(rate);
                }
            }
            if round > 0 {
                figures.trips.extend(round_trips_of(address, PINGS, 0.01));
            }
            guest.pause();
        }
    }
    guests.iter().for_each(Vm::resume);
    figures.map(|(name, _, figures)| (name, figures))
}

fn tap() {
    println!("\nTCP with a Linux guest, Mbit/s {:>22} {:>10}", "to host", "to guest");
    let figures = measure();
    let rates = figures.each_ref().map(|(_, figures)| figures.rates.clone().map(median));
    for ((name, _), rates) in figures.iter().zip(rates) {
        println!("  {name:<34} {:>16.0} {:>10.0}", rates[0], rates[1]);
    }
    let [ours, theirs] = rates;
    println!("  {:<34} {:>16.2} {:>10.2}", "ratio", ours[0] / theirs[0], ours[1] / theirs[1]);
    println!("\nround trips, us {:>36} {:>10}", "p50", "p99");
    for (name, figures) in figures {
        let [half, most] = half_and_most(figures.trips);
        println!("  {name:<34} {half:>16.0} {most:>10.0}");
    }
}

/// Who cuts TCP into frames, where the host takes them as they are: the guest or the daemon.
fn af_xdp() {
    enter_namespace_with_veth(1);
    ip(&format!("address add {HOST_ADDRESS}/24 dev veth1"));
    output("ethtool", "-K veth1 tx off");
    let daemon = Daemon::start(&["--af-xdp=veth0"]);
    let mut guest = Vm::start(&daemon.socket(), &[]);
    guest.wait_ready();
    println!("\nTCP over AF_XDP to the host {:>26} {:>24}", "Mbit/s", "daemon's ns per KiB");
    let mut costs: [[Vec<f64>; 2]; 2] = Default::default();
    for round in 0..=ROUNDS {
        for (side, setting) in ["on", "off"].into_iter().enumerate() {
            guest.run(&format!("ethtool -K eth0 tso {setting}"));
            let before = daemon.cpu_nanoseconds();
            let rate = iperf("-t 2 -R");
            let used = (daemon.cpu_nanoseconds() - before) as f64;
            if round > 0 {
                costs[side][0].push(rate);
                costs[side][1].push(used / (rate * 2.0 * 1e6 / 8.0 / 1024.0));
            }
        }
    }
    for (name, cost) in ["cut by the daemon", "cut by the guest"].into_iter().zip(costs) {
        let [rate, cpu] = cost.map(median);
        println!("  {name:<34} {rate:>16.0} {cpu:>24.0}");
    }
}
