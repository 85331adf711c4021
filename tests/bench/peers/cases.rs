//! What is measured.

use std::cell::RefCell;
use std::fs;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use super::kernel_guest::KernelGuest;
use super::machine;
use super::own_guest::{self, PACE};
use super::party::{Kind, Party, memory_of};
use super::report::{ROUNDS, Report};
use crate::af_xdp;
use crate::guest;
use crate::measure::{
    Cost, GUEST, all_in_turns, cost, frame, receive_frames, received, send_frames,
};
use crate::support::daemon::{Daemon, port, program};
use crate::support::driver::HEADER;
use crate::support::eventually;
use crate::support::network::Wire;
use crate::support::testpmd::Testpmd;
use crate::support::vm::{iperf_with, make_guest};
use crate::tap;
use crate::tuning::round_trips_of;

type OfAll = fn(&[Party], &mut Report);
type Alone = fn(&mut Report);

/// What is measured of all parties, in turns.
pub(super) const WITH_PARTIES: [(&str, OfAll); 8] = [
    ("tx", tx),
    ("rx", rx),
    ("lean", own_guest::lean_rx),
    ("loop", echo),
    ("both", own_guest::both_ways),
    ("paced", own_guest::paced),
    ("segments", own_guest::segments),
    ("guests", guests),
];

/// What needs none of them.
pub(super) const ALONE: [(&str, Alone); 4] =
    [("calls", machine::calls), ("ready", ready), ("ports", ports), ("vm", vm)];

/// Lengths of frames in bytes.
const LENGTHS: [usize; 3] = [64, 512, 1500];
/// Entries of the guest's rings: QEMU's default for what is sent, and what can be had for the rest.
const TX_RING: u16 = 256;
const RING: u16 = 1024;

/// Those that are to be measured by what a frame costs: not twice for another way of sleeping.
pub(super) fn without_busy_poll(parties: &[Party]) -> Vec<&Party> {
    let is_twin = |party: &Party| matches!(party.contestant.kind, Kind::Ours([_, ..]));
    parties.iter().filter(|party| !is_twin(party)).collect()
}

/// Measures a party with its guest, both of which stand still before and after.
fn turn(party: &Party, guest: &mut Testpmd, measure: impl FnOnce(&mut Testpmd) -> Cost) -> Cost {
    party.resume();
    guest.resume();
    let cost = measure(guest);
    guest.pause();
    party.pause();
    cost
}

/// Starts testpmd as each party's guest.
fn testpmds(parties: &[&Party], ring: u16, prepare: impl Fn(&mut Testpmd)) -> Vec<Testpmd> {
    let start = |party: &&Party| {
        party.resume();
        let mut guest = Testpmd::start_on("0", party.socket(), 1, ring, GUEST);
        prepare(&mut guest);
        guest.pause();
        party.pause();
        guest
    };
    parties.iter().map(start).collect()
}

/// Ends the guests, which take leave of their backends.
fn dismiss(parties: &[&Party], guests: Vec<Testpmd>) {
    for (party, guest) in parties.iter().zip(guests) {
        party.resume();
        drop(guest);
        party.pause();
    }
}

/// What is measured in turns, and the names of the rows.
pub(super) type Measurements<'a> = Vec<(&'a str, Box<dyn FnMut() -> Cost + 'a>)>;

/// Measures all of it in turns, and notes what each frame costs, and how many there were in a second.
pub(super) fn compare(case: &str, all: Measurements<'_>, report: &mut Report) {
    let (names, measurements): (Vec<&str>, Vec<_>) = all.into_iter().unzip();
    for (name, costs) in names.into_iter().zip(all_in_turns(report.rounds(), measurements)) {
        report.add_costs(case, name, &costs);
    }
}

/// Measures bare loops, and parties with a testpmd each.
fn compare_with_testpmd<'a>(
    case: &str,
    mut all: Measurements<'a>,
    parties: &[&'a Party],
    guests: &'a mut [Testpmd],
    measure: impl Fn(&Party, &mut Testpmd) -> Cost + Copy + 'a,
    report: &mut Report,
) {
    for (&party, guest) in parties.iter().zip(guests) {
        let measure = move || turn(party, guest, |guest| measure(party, guest));
        all.push((party.contestant.name, Box::new(measure)));
    }
    compare(case, all, report);
}

/// A header of a loop's own.
const APART: Option<&[u8; HEADER]> = Some(&[0; HEADER]);

/// Frames that the guest sends as fast as it can.
fn tx(parties: &[Party], report: &mut Report) {
    let parties = without_busy_poll(parties);
    let bare_tap = RefCell::new(tap::Bare::new());
    af_xdp::veth("wire");
    let bare_veth = RefCell::new(af_xdp::Bare::on("wire0", false));
    let mut guests = testpmds(&parties, TX_RING, |_| ());
    for length in LENGTHS {
        for (party, guest) in parties.iter().zip(&mut guests) {
            party.resume();
            guest.resume();
            send_frames(guest, length);
            guest.pause();
            party.pause();
        }
        let bytes = [&[0; HEADER][..], &frame(length)].concat();
        let bare: Measurements<'_> = vec![
            ("bare write loop", Box::new(|| bare_tap.borrow_mut().write(&bytes))),
            ("bare io_uring loop", Box::new(|| bare_tap.borrow_mut().write_batches(&bytes, None))),
            (
                "bare io_uring loop, fresh frames",
                Box::new(|| bare_tap.borrow_mut().write_fresh(&bytes, None)),
            ),
            (
                "bare io_uring loop, header apart",
                Box::new(|| bare_tap.borrow_mut().write_batches(&bytes, APART)),
            ),
            (
                "bare io_uring loop, header apart, fresh frames",
                Box::new(|| bare_tap.borrow_mut().write_fresh(&bytes, APART)),
            ),
            (
                "bare AF_XDP loop",
                Box::new(|| bare_veth.borrow_mut().send(length, af_xdp::Place::There)),
            ),
            (
                "bare AF_XDP loop, fresh frames",
                Box::new(|| bare_veth.borrow_mut().send_fresh(length)),
            ),
        ];
        let measure =
            |party: &Party, _: &mut Testpmd| cost(|| received(&party.wire()), || party.cpu());
        compare_with_testpmd(&format!("tx {length}"), bare, &parties, &mut guests, measure, report);
    }
    dismiss(&parties, guests);
}

/// Frames that come to a guest as fast as a packet socket sends them.
fn rx(parties: &[Party], report: &mut Report) {
    let parties = without_busy_poll(parties);
    let mut guests = testpmds(&parties, RING, receive_frames);
    for length in LENGTHS {
        let measure = |party: &Party, guest: &mut Testpmd| {
            let _sender = af_xdp::Load::flooding(&party.wire(), length);
            cost(|| guest.counter("RX-packets"), || party.cpu())
        };
        compare_with_testpmd(
            &format!("rx {length}"),
            Vec::new(),
            &parties,
            &mut guests,
            measure,
            report,
        );
    }
    dismiss(&parties, guests);
}

/// Frames that go to a guest, and come back from it.
fn echo(parties: &[Party], report: &mut Report) {
    let parties = without_busy_poll(parties);
    let mut guests = testpmds(&parties, RING, |guest| {
        guest.command("set fwd macswap");
        guest.command("start");
    });
    for length in [64, 1500] {
        let measure = |party: &Party, _: &mut Testpmd| {
            let _sender = af_xdp::Load::flooding(&party.wire(), length);
            cost(|| received(&party.wire()), || party.cpu())
        };
        compare_with_testpmd(
            &format!("loop {length}"),
            Vec::new(),
            &parties,
            &mut guests,
            measure,
            report,
        );
    }
    dismiss(&parties, guests);
}

/// Pings in a turn, one each millisecond.
const PINGS: u32 = 500;
/// Turns of what takes long.
const FEW_ROUNDS: usize = 5;

/// The values that half of these, 99 of a hundred and 999 of a thousand are not above.
fn quantiles(mut values: Vec<f64>) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    [0.5, 0.99, 0.999].map(|share| values[((values.len() - 1) as f64 * share) as usize])
}

/// Pings of many turns.
#[derive(Default)]
struct Pings {
    half: Vec<f64>,
    most: Vec<f64>,
    all: Vec<f64>,
    /// Microseconds of the backend's processor time, each.
    costs: Vec<f64>,
}

impl Pings {
    fn take(&mut self, party: &Party) {
        let before = party.cpu();
        let trips = round_trips_of(&party.guest_address().to_string(), PINGS, 0.001);
        self.costs.push((party.cpu() - before) as f64 / 1e3 / f64::from(PINGS));
        let [half, most, _] = quantiles(trips.clone());
        self.half.push(half);
        self.most.push(most);
        self.all.extend(trips);
    }

    fn note(self, case: &str, name: &str, report: &mut Report) {
        report.add(&format!("{case} p50"), name, "us", self.half);
        report.add(&format!("{case} p99"), name, "us", self.most);
        report.add(&format!("{case} p99.9"), name, "us", vec![quantiles(self.all)[2]]);
        report.add(case, name, "us of processor", self.costs);
    }
}

/// Sends a hundred thousand frames a second to the guest, in bursts, until it is dropped.
fn background(party: &Party) -> af_xdp::Load {
    let wire = Wire::open(&party.wire());
    // For its card, and nobody behind it.
    let mut frame = frame(64);
    frame[..6].copy_from_slice(&[0x52, 0x54, 0, 0x77, 0, 2]);
    let mut load = af_xdp::Load::default();
    let mut next = Instant::now();
    load.run(move || {
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
        next += PACE;
        wire.flood(&frame);
    });
    load
}

/// A guest with a kernel's stack, which sleeps when nothing happens: pings (of which some while it
/// polls), TCP both ways, and nothing at all.
fn guests(parties: &[Party], report: &mut Report) {
    let guests: Vec<KernelGuest> = parties
        .iter()
        .map(|party| {
            party.resume();
            let address = format!("{}/24", party.guest_address());
            let guest = KernelGuest::start(party.socket(), &address, party.mac());
            let address = party.guest_address().to_string();
            eventually(&format!("{}: its guest answers", party.contestant.name), || {
                let ping = Command::new("ping").args(["-c", "1", "-W", "1", &address]).output();
                ping.unwrap().status.success()
            });
            party.pause();
            guest
        })
        .collect();
    let mut pings: Vec<[Pings; 3]> = parties.iter().map(|_| Default::default()).collect();
    let mut tcp: Vec<[[Vec<f64>; 2]; 2]> = parties.iter().map(|_| Default::default()).collect();
    let mut idle: Vec<Vec<f64>> = parties.iter().map(|_| Vec::new()).collect();
    for round in 0..ROUNDS {
        for (number, party) in parties.iter().enumerate() {
            let address = party.guest_address().to_string();
            party.resume();
            pings[number][0].take(party);
            let load = background(party);
            pings[number][1].take(party);
            drop(load);
            guests[number].poll(true);
            pings[number][2].take(party);
            guests[number].poll(false);
            if round >= FEW_ROUNDS {
                party.pause();
                continue;
            }
            for (direction, options) in ["-t 1 -R", "-t 1"].into_iter().enumerate() {
                let before = party.cpu();
                let rate = iperf_with(&address, options);
                let used = (party.cpu() - before) as f64;
                tcp[number][direction][0].push(rate / 1000.0);
                tcp[number][direction][1].push(used / (rate * 1e6 / 8.0 / 1024.0));
            }
            std::thread::sleep(Duration::from_millis(200));
            let before = party.cpu();
            std::thread::sleep(Duration::from_millis(500));
            idle[number].push((party.cpu() - before) as f64 / 5e8);
            party.pause();
        }
    }
    for (((party, pings), tcp), idle) in parties.iter().zip(pings).zip(tcp).zip(idle) {
        let name = party.contestant.name;
        for (case, pings) in ["ping", "ping under load", "ping, polling guest"].iter().zip(pings) {
            pings.note(case, name, report);
        }
        for (way, [rates, costs]) in ["to host", "to guest"].into_iter().zip(tcp) {
            report.add(&format!("TCP {way}"), name, "Gbit/s", rates);
            report.add(&format!("TCP {way}"), name, "ns/KiB", costs);
        }
        report.add("idle", name, "cores", idle);
        let [private, resident] = party.memory();
        report.add("private memory", name, "KiB", vec![private as f64]);
        report.add("resident memory", name, "KiB", vec![resident as f64]);
        report.add("start-up", name, "ms", vec![party.started_in.as_secs_f64() * 1e3]);
    }
    for (party, guest) in parties.iter().zip(guests) {
        party.resume();
        drop(guest);
        party.pause();
    }
}

/// How soon the daemon can be connected to, in milliseconds.
fn ready_after(configuration: &str, ports: usize) -> (Daemon, f64) {
    let started = Instant::now();
    let daemon = Daemon::with_config(configuration, &format!("p{}", ports - 1));
    (daemon, started.elapsed().as_secs_f64() * 1e3)
}

/// The daemon's start.
fn ready(report: &mut Report) {
    let directory = vmm_sys_util::tempdir::TempDir::new_with_prefix("/tmp/vhost-user-net-test-");
    let directory = directory.unwrap();
    let socket = directory.as_path().join("socket");
    let mut times = Vec::new();
    for round in 0..2 * ROUNDS {
        let started = Instant::now();
        let mut child = program()
            .arg(format!("--socket-path={}", socket.display()))
            // The kernel keeps that of one that was killed for a while.
            .arg(format!("--tap=ready{round}"))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        while UnixStream::connect(&socket).is_err() {
            std::thread::sleep(Duration::from_micros(20));
        }
        times.push(started.elapsed().as_secs_f64() * 1e3);
        child.kill().unwrap();
        child.wait().unwrap();
        let _ = fs::remove_file(&socket);
    }
    report.add("ready", "vhost-user-net, TAP", "ms", times);
}

/// Ports of one daemon, of which one is loaded.
fn ports(report: &mut Report) {
    let counts = [1, 8, 64];
    let daemons: Vec<(Daemon, String)> = counts
        .into_iter()
        .map(|count| {
            let ports = |number: usize| {
                port(
                    &format!("p{number}"),
                    &format!("tap = \"many{count}x{number}\"\ncpu-affinity = \"1\""),
                )
            };
            let text: String = (0..count).map(ports).collect();
            let (daemon, time) = ready_after(&text, count);
            let name = format!("vhost-user-net, {count} ports");
            report.add("ready", &name, "ms", vec![time]);
            (daemon, name)
        })
        .collect();
    let mut guests: Vec<Testpmd> = daemons
        .iter()
        .map(|(daemon, _)| {
            let mut guest = Testpmd::start_on("0", &daemon.path("p0"), 1, TX_RING, GUEST);
            send_frames(&mut guest, 64);
            guest.pause();
            guest
        })
        .collect();
    let measurements =
        daemons.iter().zip(&mut guests).zip(counts).map(|((daemon, guest), count)| {
            let (daemon, name) = daemon;
            let measure = move || {
                guest.resume();
                let cost =
                    cost(|| received(&format!("many{count}x0")), || daemon.cpu_nanoseconds());
                guest.pause();
                cost
            };
            (&**name, Box::new(measure) as Box<dyn FnMut() -> Cost + '_>)
        });
    compare("tx 64, one port of many", measurements.collect(), report);
    guests.iter().for_each(Testpmd::resume);
    drop(guests);
    for (daemon, name) in &daemons {
        report.add("private memory", name, "KiB", vec![memory_of(daemon.process())[0] as f64]);
    }
}

/// A Linux guest in QEMU, on this daemon's virtio-net device and on QEMU's own.
fn vm(report: &mut Report) {
    make_guest();
    // In a namespace of its own, and on all CPUs: guest, backend and host would otherwise share the one of this
    // thread, which is the scheduler's measurement.
    let measure = || {
        let mut all = CpuSet::new();
        (0..CpuSet::count()).for_each(|cpu| all.set(cpu).unwrap());
        sched_setaffinity(Pid::from_raw(0), &all).unwrap();
        guest::measure()
    };
    let figures = std::thread::spawn(measure).join().unwrap();
    for (name, guest::Figures { rates, trips }) in figures {
        for (way, rates) in ["to host", "to guest"].into_iter().zip(rates) {
            report.add(&format!("TCP {way}"), name, "Mbit/s", rates);
        }
        let [half, most, _] = quantiles(trips);
        report.add("ping p50", name, "us in QEMU", vec![half]);
        report.add("ping p99", name, "us in QEMU", vec![most]);
    }
}
