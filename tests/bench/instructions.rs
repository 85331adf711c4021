//! A guard of what a frame costs in instructions, which, other than time, are nearly the same in every
//! run: counted by callgrind, and compared with what is written down in `instructions.toml`.
//!
//! What has grown by more than 3 % fails. If it was meant to, `UPDATE_INSTRUCTIONS=1` writes down what
//! there is now, and the commit says why.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::process::{Command, Stdio, exit};
use std::sync::Arc;
use std::time::Duration;
use std::{env, fs};

use nix::sys::signal::Signal;
use vhost_user_net::features::{Offer, OfferOptions, PortOffloads};
use vhost_user_net::policy::FilterView;
use vhost_user_net::port::{Completions, TxStages};
use vhost_user_net::vnet_header::HeaderCopy;
use vmm_sys_util::tempdir::TempDir;

use super::ring;
use crate::support::daemon::Daemon;
use crate::support::driver::{CSUM, Card, HEADER, HOST_TSO, Options};
use crate::support::eventually;
use crate::support::frontend::Frontend;
use crate::support::network::{Wire, enter_namespace_for, enter_new_namespace, wait_for_carrier};
use crate::support::traffic::{datagram, frame, tcp_frame};

const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/bench/instructions.toml");
/// How many times what is written down is too much.
const TOLERANCE: f64 = 1.03;
/// Calls of [`TxStages::check`] that are counted.
const CHECKS: usize = 10_000;
/// Chains of a ring, which are all made available at once.
const LAP: u16 = 256;
/// Frames of a lap each of which wakes the worker.
const WAKES: usize = 8;
/// Frames of a burst.
const BURST: usize = 64;
/// How often that is, in a short run and in a long one: what they have in common does not count.
const LAPS: [usize; 2] = [8, 40];

/// Runs of each kind, of which the least counts: a worker that wakes once more than it has to takes
/// some instructions more.
const RUNS: usize = 5;

/// Instructions for each chain or frame.
type Counts = BTreeMap<String, f64>;

pub(super) fn run() {
    let valgrind = Command::new("valgrind").arg("--version").stdout(Stdio::null()).status();
    if !valgrind.is_ok_and(|status| status.success()) {
        crate::support::skip("instructions", "valgrind is not installed");
        return;
    }
    let counts = count_all();
    let said = fs::read_to_string(PATH).unwrap_or_default();
    let expected: Counts = toml::from_str(&said).unwrap();
    println!("\ninstructions in user space {:>24} {:>12}", "now", "written down");
    let mut grown = Vec::new();
    for (name, count) in &counts {
        let before = expected.get(name);
        println!("  {name:<34} {count:>14.1} {:>12.1}", before.copied().unwrap_or(f64::NAN));
        if before.is_none_or(|before| *count > TOLERANCE * before) {
            grown.push(&**name);
        }
    }
    if env::var_os("UPDATE_INSTRUCTIONS").is_some() {
        let lines: String =
            counts.iter().map(|(name, count)| format!("{name} = {count:.1}\n")).collect();
        fs::write(PATH, format!("{HEAD}{lines}")).unwrap();
    } else if !grown.is_empty() {
        eprintln!(
            "more than is written down in tests/bench/instructions.toml: {}; if that is meant, \
             write it down with UPDATE_INSTRUCTIONS=1 cargo bench -- instructions",
            grown.join(", ")
        );
        exit(1);
    }
}

const HEAD: &str = "\
# Instructions in user space for each chain or frame: UPDATE_INSTRUCTIONS=1 cargo bench -- instructions
";

fn count_all() -> Counts {
    let mut counts = Counts::new();
    let mut note = |name: &str, count: f64| counts.insert(name.into(), count);
    note("ring", of_this_program("ring") / f64::from(ring::COUNTED));
    for (name, _) in frames() {
        let admitted = of_this_program(name);
        note(name, admitted / CHECKS as f64);
    }
    if nix::unistd::geteuid().is_root() {
        let lap = usize::from(LAP);
        for (name, port, way, lap) in [
            ("worker-tap-tx", "--tap=tap0", worker_tx as FrameDirection, lap),
            ("worker-tap-tx-woken", "--tap=tap0", worker_tx_woken, WAKES),
            ("worker-tap-rx", "--tap=tap0", worker_rx, lap),
            ("worker-af-xdp-tx", "--af-xdp=veth0", worker_tx, lap),
            ("worker-af-xdp-rx", "--af-xdp=veth0", worker_rx_posted, lap),
            ("worker-loopback", "--loopback", worker_tx, lap),
        ] {
            // In a thread, for it moves into a network namespace.
            let measure = |laps| {
                std::thread::spawn(move || of_a_worker(name, port, way, laps)).join().unwrap()
            };
            let frames = (LAPS[1] - LAPS[0]) * lap;
            let least = |laps| {
                let runs = (0..RUNS).map(|_| measure(laps));
                runs.reduce(|a, b| (a.0.min(b.0), a.1.min(b.1))).unwrap()
            };
            let [short, long] = LAPS.map(least);
            note(name, (long.0 - short.0) / frames as f64);
            // Ports share the C library's arena, and its lock: no burst allocates memory.
            assert!(short.1 > 0, "allocations are not counted");
            let bursts = (frames / BURST).max(LAPS[1] - LAPS[0]);
            assert!(long.1 < short.1 + bursts, "{name} allocates: {short:?}, {long:?}");
        }
    } else {
        crate::support::skip("instructions of workers", "needs root for network namespaces");
    }
    counts
}

/// What callgrind counts of this program's part `name`.
fn of_this_program(name: &str) -> f64 {
    let program = env::current_exe().unwrap();
    let output = Command::new("valgrind")
        .args(callgrind(&format!("*counted_{}*", name.split('-').next().unwrap())))
        .arg(program)
        .args(["--counted", name])
        .output()
        .unwrap();
    collected(&String::from_utf8_lossy(&output.stderr))
}

/// The options by which callgrind counts what is done in a function, and what that calls.
fn callgrind(function: &str) -> Vec<String> {
    vec![
        "--tool=callgrind".into(),
        // Nothing but the total, which it prints.
        "--callgrind-out-file=/dev/null".into(),
        format!("--toggle-collect={function}"),
    ]
}

fn collected(log: &str) -> f64 {
    let line = log.lines().rev().find_map(|line| line.split_once("Collected :"));
    let (_, number) = line.unwrap_or_else(|| panic!("callgrind said: {log}"));
    number.trim().parse().unwrap()
}

/// What is to be counted, in a process of its own.
pub(crate) fn counted(name: &str) {
    if name == "ring" {
        return ring::count();
    }
    let (_, (header, frame)) = frames().into_iter().find(|(it, _)| *it == name).unwrap();
    let options = OfferOptions { guest_segmentation: true, mac: false, ring_reset: false };
    let offer = Offer::new(PortOffloads::ALL, options);
    let negotiated = offer.accept(offer.bits()).unwrap();
    let mut stages =
        TxStages::new(&negotiated, 1522, None, FilterView::new(Arc::default()), Arc::default());
    stages.headers.copies_small = true;
    stages.begin_burst(&Completions::default());
    ring::with_frame(&header, &frame, |chain| {
        let mut start = HeaderCopy::default();
        counted_header(&mut || {
            stages.check(black_box(chain), &mut start).unwrap();
            black_box(&start);
        });
    });
}

#[inline(never)]
fn counted_header(check: &mut dyn FnMut()) {
    (0..CHECKS).for_each(|_| check());
}

/// A header and the frame behind it.
type Frame = (Vec<u8>, Vec<u8>);

/// Frames whose headers are checked.
fn frames() -> [(&'static str, Frame); 4] {
    [
        ("header-plain-64", (vec![0; HEADER], frame(0, 64))),
        ("header-plain-1514", (vec![0; HEADER], frame(0, 1514))),
        ("header-checksum", datagram(1000)),
        ("header-segmented", tcp_frame(1900, 1448)),
    ]
}

/// The host's end of the port's device, and the daemon.
type Host<'a> = (&'a Wire, &'a Daemon);

/// Moves so many laps of frames, and waits for each.
type FrameDirection = fn(&mut Card, Host, usize);

/// Instructions of a worker's session, and how often it allocates memory. Its profile is kept in the directory
/// that KEEP_PROFILE names.
fn of_a_worker(name: &str, port: &str, way: FrameDirection, laps: usize) -> (f64, usize) {
    let wire = if port == "--loopback" {
        enter_new_namespace();
        Wire::open("lo")
    } else {
        enter_namespace_for(port)
    };
    let mut log_is_stderr = callgrind("*worker*session*serve*");
    // Not opening a socket, nor what the kernel tells of the device, as often as it likes: these switch
    // counting off again.
    for function in ["*XdpPort*::open", "*XdpPort*::host_changed"] {
        log_is_stderr.push(format!("--toggle-collect={function}"));
    }
    let directory = TempDir::new_with_prefix("/tmp/vhost-user-net-bench-").unwrap();
    let profile = directory.as_path().join("profile");
    log_is_stderr.push("--separate-threads=yes".into());
    log_is_stderr.push(format!("--callgrind-out-file={}", profile.display()));
    let mut wrapper = vec!["valgrind"];
    wrapper.extend(log_is_stderr.iter().map(|option| &**option));
    // Valgrind makes calls of its own, and knows no io_uring; and how often a worker looks for frames
    // before it sleeps is a matter of time.
    let options = [port, "--seccomp=none", "--busy-poll=0", "--tx-method=writev"];
    let options = if port.contains("tap") { &options[..] } else { &options[..3] };
    let mut daemon = Daemon::start_under(&wrapper, options);
    if port.contains("tap") {
        wait_for_carrier("tap0");
    }
    let features = Options::default().features | CSUM | HOST_TSO;
    let mut card = Card::start(
        Frontend::new(daemon.connect()),
        Options { size: LAP, features, ..Options::default() },
    );
    way(&mut card, (&wire, &daemon), laps);
    drop(card);
    daemon.signal(Signal::SIGTERM);
    daemon.wait();
    let profiles = fs::read_dir(directory.as_path()).unwrap();
    let profiles = profiles.map(|file| fs::read_to_string(file.unwrap().path()).unwrap());
    // One for each thread, and the worker's is the only one that is not empty.
    let (count, profile) =
        profiles.map(|it| (total(&it), it)).max_by_key(|(count, _)| *count).unwrap();
    if let Some(directory) = env::var_os("KEEP_PROFILE") {
        let name = format!("{}/{name}-{laps}", directory.display());
        fs::write(name, &profile).unwrap();
    }
    (count as f64, allocations(&profile))
}

/// Instructions of a profile.
fn total(profile: &str) -> u64 {
    let total = profile.lines().find_map(|line| line.strip_prefix("totals: "));
    total.map_or(0, |total| total.trim().parse().unwrap())
}

/// Calls of `malloc` in a profile of callgrind's (Valgrind manual, "Callgrind format"): a function that is
/// called has its name once, and a number from then on.
fn allocations(profile: &str) -> usize {
    let mut names = BTreeMap::new();
    let (mut is_malloc, mut calls) = (false, 0);
    for line in profile.lines() {
        let function = line.strip_prefix("cfn=").or_else(|| line.strip_prefix("fn="));
        if let Some((number, name)) = function.and_then(|it| it[1..].split_once(')')) {
            if !name.is_empty() {
                names.insert(number, name.trim() == "malloc");
            }
            is_malloc = line.starts_with("cfn=") && names[number];
        } else if let Some(count) = line.strip_prefix("calls=").filter(|_| is_malloc) {
            calls += count.split(' ').next().unwrap().parse::<usize>().unwrap();
        }
    }
    calls
}

/// The guest sends laps of frames; each is sent before the next.
fn worker_tx(card: &mut Card, _: Host, laps: usize) {
    for slot in 0..u64::from(LAP) {
        card.queue_tx(0, slot, &[0; HEADER], &frame(0, 64));
    }
    for _ in 0..laps {
        let tx = &mut card.tx[0];
        tx.want_no_call();
        tx.publish();
        wait_for_a_lap(|| tx.recycle());
        // What a loopback port brings back.
        card.recycle(0);
    }
}

/// The guest sends one frame after the other, each when the worker sleeps.
fn worker_tx_woken(card: &mut Card, _: Host, laps: usize) {
    card.tx[0].want_no_call();
    for _ in 0..laps * WAKES {
        card.queue_tx(0, 0, &[0; HEADER], &frame(0, 64));
        assert!(card.tx[0].publish(), "it is to be woken");
        card.tx[0].wait_used();
        let tx = &card.tx[0];
        tx.want_no_call();
        eventually("it asks for a kick", || tx.avail_event() == tx.avail_index);
        // And sleeps soon after.
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The host sends laps of frames, each to a guest that has no buffers yet.
fn worker_rx(card: &mut Card, (wire, _): Host, laps: usize) {
    let send_lap = || (0..LAP).for_each(|_| wire.send(&frame(0, 64)));
    send_lap();
    for _ in 0..laps {
        let rx = &mut card.rx[0];
        wait_for_a_lap(|| rx.recycle());
        send_lap();
        rx.publish();
    }
    wait_for_a_lap(|| card.rx[0].recycle());
}

/// The host sends laps of frames to a guest that always has buffers for three of its four parts: elsewhere
/// than in a TAP no frame waits for them.
fn worker_rx_posted(card: &mut Card, (wire, daemon): Host, laps: usize) {
    let part = usize::from(LAP) / 4;
    // A frame too short for its header: when it is used, the socket is open, and buffers are posted next.
    card.send(0, &[0; 5]);
    std::thread::sleep(Duration::from_millis(50));
    for _ in 0..4 * laps {
        // As one burst.
        daemon.signal(Signal::SIGSTOP);
        (0..part).for_each(|_| wire.send(&frame(0, 64)));
        daemon.signal(Signal::SIGCONT);
        let rx = &mut card.rx[0];
        wait_for(part, || rx.recycle());
        rx.publish();
    }
}

fn wait_for_a_lap(done: impl FnMut() -> usize) {
    wait_for(LAP.into(), done);
}

fn wait_for(frames: usize, mut done: impl FnMut() -> usize) {
    let mut all = 0;
    eventually("all frames are moved", || {
        all += done();
        all == frames
    });
}
