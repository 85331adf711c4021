//! What settings of the daemon, of QEMU's card and of the guest do to TCP with a real Linux guest;
//! what cutting datagrams late saves (the `UDP_SEGMENT` of QUIC's servers); and what a TAP's queue
//! holds. All guests run all the time, and are measured in turns.

use std::fs;
use std::net::UdpSocket;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt::UdpGsoSegment};
use vhost_user_net::sys::process::pin_this_thread;

use super::measure::{cost, median};
use crate::support::daemon::Daemon;
use crate::support::driver::{Card, GUEST_CSUM, MRG_RXBUF, Options};
use crate::support::frontend::Frontend;
use crate::support::network::{enter_new_namespace, enter_quiet_namespace, ip};
use crate::support::traffic::datagram;
use crate::support::vm::{Vm, iperf_with, make_guest};

const ROUNDS: usize = 5;

/// What differs from how things are by themselves.
struct Setting {
    name: &'static str,
    daemon: &'static [&'static str],
    /// Of `qemu/run-guest`.
    guest: &'static [(&'static str, &'static str)],
    /// A command in the guest.
    command: &'static str,
    mtu: u16,
}

const USUAL: Setting =
    Setting { name: "as things are", daemon: &[], guest: &[], command: "true", mtu: 1500 };

const SETTINGS: [Setting; 11] = [
    USUAL,
    Setting { name: "another as things are", ..USUAL },
    Setting { name: "--guest-tso=off", daemon: &["--guest-tso=off"], ..USUAL },
    Setting { name: "guest: tso off", command: "ethtool -K eth0 tso off", ..USUAL },
    Setting { name: "guest: tx off, rx off", command: "ethtool -K eth0 tx off rx off", ..USUAL },
    Setting { name: "mrg_rxbuf=off", guest: &[("CARD", "mrg_rxbuf=off")], ..USUAL },
    Setting { name: "rings of 1024", guest: &[("RING", "1024")], ..USUAL },
    Setting {
        name: "MTU 9000",
        daemon: &["--mtu=9000"],
        guest: &[("CARD", "host_mtu=9000")],
        mtu: 9000,
        ..USUAL
    },
    Setting {
        name: "MTU 9000, no TSO either way",
        daemon: &["--mtu=9000", "--guest-tso=off"],
        guest: &[("CARD", "host_mtu=9000")],
        command: "ethtool -K eth0 tso off gso off",
        mtu: 9000,
    },
    Setting { name: "--busy-poll=50", daemon: &["--busy-poll=50"], ..USUAL },
    Setting { name: "--tx-method=io-uring", daemon: &["--tx-method=io-uring"], ..USUAL },
];

/// A guest, its daemon, and what was measured of them.
struct Party {
    tap: String,
    address: String,
    daemon: Daemon,
    _guest: Vm,
    /// Mbit/s, the daemon's nanoseconds per KiB and bytes per frame; to the host, to the guest.
    figures: [[Vec<f64>; 3]; 2],
    /// Round trips in microseconds.
    trips: Vec<f64>,
}

/// Bytes and frames that a device has received and sent, as the kernel counts them.
fn moved(device: &str) -> [[u64; 2]; 2] {
    let text = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let device = format!("{device}:");
    let line = text.lines().find_map(|line| line.trim_start().strip_prefix(&device)).unwrap();
    let numbers: Vec<u64> = line.split_whitespace().map(|word| word.parse().unwrap()).collect();
    [[numbers[0], numbers[1]], [numbers[8], numbers[9]]]
}

/// What a hundred pings take, in microseconds.
pub(super) fn round_trips(address: &str) -> Vec<f64> {
    round_trips_of(address, 100, 0.01)
}

/// What so many pings take, in microseconds, of which one is sent each so many seconds.
pub(super) fn round_trips_of(address: &str, count: u32, interval: f64) -> Vec<f64> {
    let words = ["-c", &count.to_string(), "-i", &interval.to_string(), "-W", "1", address];
    let ping = Command::new("ping").args(words).output().unwrap();
    let text = String::from_utf8(ping.stdout).unwrap();
    let times = text.split("time=").skip(1).filter_map(|rest| rest.split(' ').next());
    times.map(|time| 1000.0 * time.parse::<f64>().unwrap()).collect()
}

/// The values that half of these, and 99 of a hundred, are not above.
pub(super) fn half_and_most(mut values: Vec<f64>) -> [f64; 2] {
    values.sort_by(f64::total_cmp);
    [50, 99].map(|share| values[(values.len() - 1) * share / 100])
}

fn tap(name: &str, address: &str, mtu: u16) {
    ip(&format!("tuntap add dev {name} mode tap vnet_hdr"));
    ip(&format!("link set {name} mtu {mtu} up"));
    ip(&format!("address add {address}/24 dev {name}"));
}

impl Party {
    fn start(number: usize, setting: &Setting) -> Self {
        let name = format!("tap{number}");
        tap(&name, &format!("198.18.{number}.1"), setting.mtu);
        let option = format!("--tap={name}");
        let options: Vec<&str> = [&*option].into_iter().chain(setting.daemon.to_vec()).collect();
        let daemon = Daemon::start(&options);
        let address = format!("198.18.{number}.2");
        let own = format!("{address}/24");
        let mac = format!("52:54:00:00:03:{number:02x}");
        let environment = [("ADDRESS", &*own), ("MAC", &*mac)];
        let environment: Vec<_> =
            environment.into_iter().chain(setting.guest.iter().copied()).collect();
        let mut guest = Vm::start(&daemon.socket(), &environment);
        guest.wait_ready();
        guest.run(setting.command);
        let (figures, trips) = Default::default();
        Party { tap: name, address, daemon, _guest: guest, figures, trips }
    }

    fn measure(&mut self, round: usize) {
        for (direction, options) in ["-t 2 -R", "-t 2"].into_iter().enumerate() {
            let (cpu, before) = (self.daemon.cpu_nanoseconds(), moved(&self.tap)[direction]);
            let rate = iperf_with(&self.address, options);
            let used = (self.daemon.cpu_nanoseconds() - cpu) as f64;
            let after = moved(&self.tap)[direction];
            let [bytes, frames] = [0, 1].map(|what| (after[what] - before[what]) as f64);
            // The first round warms up the guest's translated code.
            if round > 0 {
                let figures = [rate, used / (bytes / 1024.0), bytes / frames];
                for (values, value) in self.figures[direction].iter_mut().zip(figures) {
                    values.push(value);
                }
            }
        }
        self.trips.extend(round_trips(&self.address));
    }

    fn idle(&self) -> f64 {
        let before = self.daemon.cpu_nanoseconds();
        std::thread::sleep(Duration::from_secs(1));
        (self.daemon.cpu_nanoseconds() - before) as f64 / 1e9
    }
}

fn tcp() {
    enter_new_namespace();
    let mut parties: Vec<Party> =
        SETTINGS.iter().enumerate().map(|(number, it)| Party::start(number, it)).collect();
    for round in 0..=ROUNDS {
        parties.iter_mut().for_each(|party| party.measure(round));
    }
    println!("\nTCP with a Linux guest: ratio of Mbit/s to the first, the daemon's ns per KiB,");
    println!("bytes per frame; round trips, us; the daemon's processors while the guest is idle");
    println!("{:<30} {:>22} {:>24} {:>13} {:>6}", "", "to host", "to guest", "p50   p99", "idle");
    let ratio = |party: &Party, direction: usize| {
        let rates = |party: &Party| party.figures[direction][0].clone();
        let ratios = rates(party).into_iter().zip(rates(&parties[0])).map(|(a, b)| a / b);
        median(ratios.collect())
    };
    for (setting, party) in SETTINGS.iter().zip(&parties) {
        print!("  {:<28}", setting.name);
        for direction in [0, 1] {
            let [_, cpu, length] = party.figures[direction].clone().map(median);
            print!("   {:5.2} {cpu:6.0} {length:8.0}", ratio(party, direction));
        }
        let [half, most] = half_and_most(party.trips.clone());
        println!("   {half:5.0} {most:5.0} {:6.3}", party.idle());
    }
    let usual = parties[0].figures.clone().map(|direction| median(direction[0].clone()));
    println!("  the first: {:.0} Mbit/s to the host, {:.0} to the guest", usual[0], usual[1]);
}

/// Datagrams that come in bursts to a guest which takes them slowly.
fn queue() {
    enter_new_namespace();
    let usual = [("ADDRESS", "198.18.0.2/24")];
    tap("tap0", "198.18.0.1", 1500);
    println!("\nUDP to the guest, bursts of {BURST} datagrams: lost on the TAP, of 100");
    for length in [500, 1000, 4000] {
        ip(&format!("link set tap0 txqueuelen {length}"));
        let daemon = Daemon::start(&["--tap=tap0"]);
        let mut guest = Vm::start(&daemon.socket(), &usual);
        guest.wait_ready();
        let before = lost("tap0");
        let socket = UdpSocket::bind("198.18.0.1:0").unwrap();
        for _ in 0..20 {
            for _ in 0..BURST {
                let _ = socket.send_to(&[0; PAYLOAD], "198.18.0.2:9");
            }
            std::thread::sleep(Duration::from_millis(500));
        }
        let after = lost("tap0");
        let [lost, sent] = [0, 1].map(|what| (after[what] - before[what]) as f64);
        println!("  txqueuelen {length:<18} {:8.1}", 100.0 * lost / (lost + sent));
    }
}

/// Frames that a device has dropped, and sent.
fn lost(device: &str) -> [u64; 2] {
    let text = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let device = format!("{device}:");
    let line = text.lines().find_map(|line| line.trim_start().strip_prefix(&device)).unwrap();
    let numbers: Vec<u64> = line.split_whitespace().map(|word| word.parse().unwrap()).collect();
    [numbers[11], numbers[9]]
}

/// Datagrams in a burst.
const BURST: usize = 3000;
/// Payload of a datagram, and of as many as are cut from one.
const PAYLOAD: usize = 1448;
const WHOLE: usize = 44 * PAYLOAD;
/// `VIRTIO_NET_F_GUEST_USO4`, `_USO6` and `HOST_USO`.
const GUEST_USO: u64 = 1 << 54 | 1 << 55;
const HOST_USO: u64 = 1 << 56;
const CSUM: u64 = 1;

/// What the daemon spends on datagrams, cut before it sees them or not, in ns per KiB.
fn datagrams() {
    enter_quiet_namespace();
    pin_this_thread(0).unwrap();
    tap("tap0", "198.18.0.1", 1500);
    ip("neighbour add 198.18.0.2 lladdr 52:54:00:00:00:02 dev tap0");
    let daemon = Daemon::start(&["--tap=tap0", "--cpu-affinity=1"]);
    let start = |features: u64| {
        let features = Options::default().features | MRG_RXBUF | features;
        let options = Options { size: 1024, features, ..Options::default() };
        Card::start(Frontend::new(daemon.connect()), options)
    };
    let done = AtomicBool::new(false);
    let mut costs: [[Vec<f64>; 2]; 2] = Default::default();
    for _ in 0..3 * ROUNDS {
        for (late, offload) in [0, GUEST_USO].into_iter().enumerate() {
            let mut card = start(GUEST_CSUM | offload);
            done.store(false, Ordering::Relaxed);
            let spent = std::thread::scope(|scope| {
                scope.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        if card.recycle(0) == 0 {
                            std::thread::yield_now();
                        }
                    }
                });
                scope.spawn(|| {
                    let socket = UdpSocket::bind("198.18.0.1:0").unwrap();
                    setsockopt(&socket, UdpGsoSegment, &(PAYLOAD as i32)).unwrap();
                    while !done.load(Ordering::Relaxed) {
                        let _ = socket.send_to(&[0; WHOLE], "198.18.0.2:9");
                    }
                });
                let kibibytes = || moved("tap0")[1][0] / 1024;
                let spent = cost(kibibytes, || daemon.cpu_nanoseconds());
                done.store(true, Ordering::Relaxed);
                spent
            });
            costs[1][late].push(spent.ns());
        }
        for (late, offload) in [0, HOST_USO].into_iter().enumerate() {
            let mut card = start(CSUM | offload);
            let (mut header, frame) = datagram(if late == 1 { WHOLE } else { PAYLOAD });
            if late == 1 {
                header[1] = 5;
                header[2..4].copy_from_slice(&42u16.to_le_bytes());
                header[4..6].copy_from_slice(&(PAYLOAD as u16).to_le_bytes());
            }
            let address = card.tx[0].buffer_area();
            card.ram.write(address, &header);
            card.ram.write(address + header.len() as u64, &frame);
            let pieces = [(address, (header.len() + frame.len()) as u32)];
            for _ in 0..256 {
                card.tx[0].add(&pieces, false).unwrap();
            }
            done.store(false, Ordering::Relaxed);
            let spent = std::thread::scope(|scope| {
                scope.spawn(|| {
                    card.tx[0].publish();
                    while !done.load(Ordering::Relaxed) {
                        match card.tx[0].recycle() {
                            0 => std::thread::yield_now(),
                            _ => drop(card.tx[0].publish()),
                        }
                    }
                });
                let kibibytes = || moved("tap0")[0][0] / 1024;
                let spent = cost(kibibytes, || daemon.cpu_nanoseconds());
                done.store(true, Ordering::Relaxed);
                spent
            });
            costs[0][late].push(spent.ns());
        }
    }
    println!(
        "\nUDP, datagrams of {PAYLOAD} bytes, the daemon's ns per KiB {:>10} {:>10}",
        "cut", "whole"
    );
    for (direction, costs) in ["to host", "to guest"].into_iter().zip(costs) {
        let [cut, whole] = costs.map(median);
        println!("  {direction:<52} {cut:>10.0} {whole:>10.0}   {:.2}", whole / cut);
    }
}

pub(super) fn run() {
    make_guest();
    // Each in a namespace of its own.
    for part in [datagrams, queue, tcp] {
        std::thread::spawn(part).join().unwrap();
    }
}
