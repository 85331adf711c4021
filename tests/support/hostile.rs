//! What all hostile cases share: a daemon with a port under attack and a quiet neighbour, and what
//! must hold afterwards.

use std::collections::HashMap;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use vhost::vhost_user::message::FrontendReq;

use super::daemon::{Daemon, port};
use super::driver::{Card, HEADER, Options};
use super::eventually;
use super::frontend::Frontend;
use super::network::{
    Wire, enter_namespace_with_tap, enter_namespace_with_veth, ip, wait_for_carrier,
};
use super::traffic::{check_both_ways, datagram};

/// Frames of the neighbour's that are on their way at once, at the most.
const ECHO: usize = 64;
/// Resident memory in kB that may come and go with what the allocator keeps.
const SLACK: usize = 1024;
/// The log's limit for lines of one kind in ten seconds.
const LOG_BURST: usize = 20;

/// Notes how a case ended, for the table that tests/run prints.
pub(crate) fn note(case: u8, outcome: &str) {
    println!("hostile case {case}: {outcome}");
    if let Some(path) = std::env::var_os("HOSTILE_CASES") {
        let mut file = OpenOptions::new().create(true).append(true).open(path).unwrap();
        writeln!(file, "{case} {outcome}").unwrap();
    }
}

/// A guest that sends frames to itself all the time and misses none.
struct Neighbour {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<usize>>,
}

impl Neighbour {
    fn start(mut card: Card) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut echoed = 0;
            while !stopped.load(Ordering::Relaxed) {
                card.check_echo(ECHO);
                echoed += ECHO;
            }
            echoed
        });
        Neighbour { stop, thread: Some(thread) }
    }

    /// Lets it fail: its daemon is gone.
    fn abandon(&mut self) {
        self.thread = None;
    }

    /// Stops it; returns the frames that came back.
    fn stop(&mut self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().expect("the neighbour lost a frame")
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        if self.thread.is_some() && !std::thread::panicking() {
            self.stop();
        }
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Anti-spoofing for a guest that may send [`datagram`]s.
const RULES: &str = "anti-spoofing = true
mac = \"52:54:00:00:02:01\"
source-ip = [\"192.0.2.2\", \"2001:db8::2\"]
";

/// Puts a device into a bridge, `br0`.
fn bridge(device: &str) {
    // One that joins no groups: all that comes is a guest's.
    ip("link add br0 type bridge mcast_snooping 0");
    ip(&format!("link set {device} master br0"));
    ip("link set br0 up");
}

/// A guest whose rings refill themselves: whatever is used is available again at once.
pub(crate) struct Refilling {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Card>>,
}

impl Refilling {
    pub(crate) fn start(mut card: Card) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let stopped = stop.clone();
        // None, if it has run before: then all is used, or will be.
        for slot in 0..card.tx[0].free() as u64 {
            card.queue_tx(0, slot, &[0; HEADER], &[slot as u8; 60]);
        }
        card.tx[0].publish();
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                for ring in [&mut card.tx[0], &mut card.rx[0]] {
                    if ring.recycle() > 0 {
                        ring.publish();
                    }
                }
            }
            card
        });
        Refilling { stop, thread: Some(thread) }
    }

    pub(crate) fn stop(mut self) -> Card {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

/// One case under way.
pub(crate) struct Scene {
    pub(crate) daemon: Daemon,
    case: u8,
    /// The host's end of the attacked port, if it is not a loopback.
    wire: Option<Wire>,
    neighbour: Neighbour,
    /// Frames must be such as a guest may send that only speaks for itself.
    guarded: bool,
    /// Descriptors, threads and resident kB while nobody attacks.
    baseline: (usize, usize, usize),
}

impl Scene {
    /// A daemon with a port named `attacked`, and its neighbour.
    pub(crate) fn new(case: u8) -> Self {
        Self::between(case, "loopback = true\nqueue-pairs = 2\n", None)
    }

    /// The same with another number of queue pairs.
    pub(crate) fn of_pairs(case: u8, pairs: u32) -> Self {
        Self::between(case, &format!("loopback = true\nqueue-pairs = {pairs}\n"), None)
    }

    /// The same with further options of the attacked port.
    pub(crate) fn limited(case: u8, options: &str) -> Self {
        Self::between(case, &format!("loopback = true\nqueue-pairs = 2\n{options}"), None)
    }

    /// The same with a control socket, `control`.
    pub(crate) fn operated(case: u8) -> Self {
        let control = "control = \"{}/control\"\n";
        Self::described(case, control, "loopback = true\n", None)
    }

    /// The same, with a fault point of `src/fault_point.rs`, and the attacked port as given.
    pub(crate) fn failing(case: u8, fault: &str, attacked: &str, wire: Option<Wire>) -> Self {
        Self::with_fault(case, "control = \"{}/control\"\n", attacked, wire, fault)
    }

    /// The same on `attacked`, whose host's end is `wire`.
    pub(crate) fn operated_on(case: u8, attacked: &str, wire: Option<Wire>) -> Self {
        Self::described(case, "control = \"{}/control\"\n", attacked, wire)
    }

    /// The same on a TAP, in a fresh namespace.
    pub(crate) fn on_tap(case: u8) -> Self {
        enter_namespace_with_tap(false);
        Self::between(case, "tap = \"tap0\"\n", Some(Wire::open("tap0")))
    }

    /// The same on a veth's end, `veth0`, in a fresh namespace.
    pub(crate) fn on_veth(case: u8) -> Self {
        enter_namespace_with_veth(1);
        Self::between(case, "af-xdp = \"veth0\"\n", Some(Wire::open("veth1")))
    }

    /// The same, and a port named `other` on `veth2`.
    pub(crate) fn on_two_veths(case: u8) -> Self {
        enter_namespace_with_veth(1);
        ip("link add veth2 type veth peer name veth3");
        ip("link set veth2 up");
        ip("link set veth3 up");
        let ports = "af-xdp = \"veth0\"\n".to_owned() + &port("other", "af-xdp = \"veth2\"");
        Self::between(case, &ports, Some(Wire::open("veth1")))
    }

    /// On a TAP, with rules for a guest that is who [`datagram`]s are from, and its host's end in a
    /// bridge, `br0`, which learns who sends.
    ///
    /// [`datagram`]: super::traffic::datagram
    pub(crate) fn guarded_tap(case: u8) -> Self {
        enter_namespace_with_tap(false);
        bridge("tap0");
        Self::between(case, &format!("tap = \"tap0\"\n{RULES}"), Some(Wire::open("tap0")))
    }

    /// The same on a veth's end.
    pub(crate) fn guarded_veth(case: u8) -> Self {
        enter_namespace_with_veth(1);
        bridge("veth1");
        Self::between(case, &format!("af-xdp = \"veth0\"\n{RULES}"), Some(Wire::open("veth1")))
    }

    fn between(case: u8, attacked: &str, wire: Option<Wire>) -> Self {
        Self::described(case, "", attacked, wire)
    }

    fn described(case: u8, daemon: &str, attacked: &str, wire: Option<Wire>) -> Self {
        Self::with_fault(case, daemon, attacked, wire, "")
    }

    fn with_fault(case: u8, daemon: &str, attacked: &str, wire: Option<Wire>, fault: &str) -> Self {
        let ports = port("attacked", attacked) + &port("quiet", "loopback = true\n");
        let contents = daemon.to_owned() + &ports;
        let daemon = Daemon::failing(&contents, "quiet", fault);
        if attacked.starts_with("tap") {
            wait_for_carrier("tap0");
        }
        let quiet = Frontend::new(daemon.connect_to("quiet"));
        let neighbour = Neighbour::start(Card::start(quiet, Options::default()));
        let guarded = attacked.contains(RULES);
        let mut scene = Scene { daemon, case, wire, neighbour, guarded, baseline: (0, 0, 0) };
        scene.check(&mut scene.card());
        scene.baseline = scene.resources();
        scene
    }

    /// A frontend of the attacked port's.
    pub(crate) fn frontend(&self) -> Frontend {
        Frontend::new(self.daemon.connect_to("attacked"))
    }

    /// A card on the attacked port, running.
    pub(crate) fn card(&self) -> Card {
        self.card_with(Options::default())
    }

    pub(crate) fn card_with(&self, options: Options) -> Card {
        Card::start(self.frontend(), options)
    }

    /// The host's end of the attacked port.
    pub(crate) fn wire(&self) -> &Wire {
        self.wire.as_ref().expect("not a loopback")
    }

    /// Whether the attacked port is a loopback.
    pub(crate) fn has_no_host(&self) -> bool {
        self.wire.is_none()
    }

    /// Checks that the attacked port moves frames.
    #[track_caller]
    pub(crate) fn check(&self, card: &mut Card) {
        match &self.wire {
            None => card.check_echo(100),
            Some(wire) => {
                // What is under way since before belongs to nobody.
                let mut quiet = 0;
                while quiet < 3 {
                    std::thread::sleep(Duration::from_millis(10));
                    let mut left = false;
                    while wire.receive_any(1).is_some() || card.try_receive(0).is_some() {
                        left = true;
                    }
                    quiet = if left { 0 } else { quiet + 1 };
                }
                if self.guarded {
                    let (_, frame) = datagram(100);
                    card.send(0, &frame);
                    assert_eq!(wire.receive_any(1000), Some(frame));
                } else {
                    check_both_ways(wire, card, 100);
                }
            }
        }
    }

    /// What the daemon has, with one idle frontend that has done nothing.
    fn resources(&self) -> (usize, usize, usize) {
        // It is answered when its predecessor has been cleared away.
        self.frontend().get(FrontendReq::GET_FEATURES);
        self.daemon.resources()
    }

    /// Waits for a line of the attacked port's in the log that says `what`.
    #[track_caller]
    pub(crate) fn says(&self, what: &str) {
        let said =
            || self.daemon.log().lines().any(|line| is_about_it(line) && line.contains(what));
        eventually(&format!("the log says {what:?}"), said);
    }

    /// Waits for a line of anybody's.
    #[track_caller]
    pub(crate) fn daemon_says(&self, what: &str) {
        eventually(&format!("the log says {what:?}"), || self.daemon.log().contains(what));
    }

    /// The thread of the attacked port's first worker.
    pub(crate) fn worker(&self) -> u32 {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.daemon.process())).unwrap();
        let number = |task: std::io::Result<fs::DirEntry>| {
            let task = task.unwrap();
            let name = fs::read_to_string(task.path().join("comm")).unwrap();
            let number = task.file_name().to_str().unwrap().parse().unwrap();
            (name.trim() == "attacked/0").then_some(number)
        };
        tasks.filter_map(number).next().expect("the worker's thread")
    }

    /// On-CPU nanoseconds of the attacked port's first worker.
    pub(crate) fn worker_nanoseconds(&self) -> u64 {
        let path = format!("/proc/{}/task/{}/schedstat", self.daemon.process(), self.worker());
        let used = fs::read_to_string(path).unwrap();
        used.split(' ').next().unwrap().parse().unwrap()
    }

    /// The daemon lives, and the neighbour has missed nothing.
    #[track_caller]
    pub(crate) fn lives(&mut self) {
        assert!(self.daemon.is_alive(), "the daemon has died");
        assert!(self.neighbour.stop() > 0, "the neighbour was not served");
    }

    /// The daemon was stopped, and the neighbour with it.
    pub(crate) fn stopped(mut self) {
        self.neighbour.abandon();
    }

    /// What every case must come to: the daemon lives, the neighbour has missed nothing, the port
    /// serves the next frontend, nothing is left behind, and the log was not flooded.
    #[track_caller]
    pub(crate) fn ends(mut self, outcome: &str) {
        assert!(self.daemon.is_alive(), "the daemon has died");
        self.check(&mut self.card());
        let (files, threads, memory) = self.baseline;
        let mut now = (0, 0, 0);
        eventually("descriptors, threads and memory are back", || {
            now = self.resources();
            (now.0, now.1) == (files, threads) && now.2 <= memory + SLACK
        });
        self.lives();
        self.check_log();
        note(self.case, outcome);
    }

    /// The same, if the host's end is another than at the beginning.
    #[track_caller]
    pub(crate) fn ends_on(mut self, wire: Wire, outcome: &str) {
        self.wire = Some(wire);
        self.ends(outcome);
    }

    fn check_log(&self) {
        let log = self.daemon.log();
        let mut kinds: HashMap<String, usize> = HashMap::new();
        for line in log.lines().filter(|line| is_about_it(line)) {
            // Without its time, and the numbers behind what it is about.
            let text = line.split_once("] ").map_or(line, |(_, text)| text);
            let (about, what) = text.split_once(": ").unwrap_or((text, ""));
            let what = what.split(|c: char| c.is_ascii_digit()).next().unwrap_or_default();
            *kinds.entry(format!("{about}: {what}")).or_default() += 1;
        }
        // A case may last over a few windows of the log's.
        let flooded = kinds.iter().find(|(_, count)| **count > 3 * LOG_BURST);
        assert!(flooded.is_none(), "{flooded:?} in the log");
    }
}

/// Whether a line of the log is about the attacked port.
fn is_about_it(line: &str) -> bool {
    line.contains("] attacked")
}
