//! The set-up of all hostile cases, a daemon with an attacked port and a neighbour, and the checks at
//! their end.

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

/// Frames in each round of the neighbour.
const ECHO: usize = 64;
/// Growth of resident memory in kB that the allocator may cause.
const SLACK: usize = 1024;
/// The log's limit for lines of one kind in 10 s.
const LOG_BURST: usize = 20;

/// Records a case's outcome, for the table that `tests/run` prints.
pub(crate) fn note(case: u8, outcome: &str) {
    println!("hostile case {case}: {outcome}");
    if let Some(path) = std::env::var_os("HOSTILE_CASES") {
        let mut file = OpenOptions::new().create(true).append(true).open(path).unwrap();
        writeln!(file, "{case} {outcome}").unwrap();
    }
}

/// A guest that sends frames to itself all the time, and must receive each of them.
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

    /// Ignores the outcome, since the daemon has exited.
    fn abandon(&mut self) {
        self.thread = None;
    }

    /// Stops the neighbour. Returns the number of its frames.
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

/// Anti-spoofing options that allow [`datagram`]s.
const RULES: &str = "anti-spoofing = true
mac = \"52:54:00:00:02:01\"
source-ip = [\"192.0.2.2\", \"2001:db8::2\"]
";

/// Puts a device into a new bridge, `br0`.
fn bridge(device: &str) {
    // Without multicast snooping the bridge joins no groups, so each arriving frame is a guest's.
    ip("link add br0 type bridge mcast_snooping 0");
    ip(&format!("link set {device} master br0"));
    ip("link set br0 up");
}

/// A guest whose rings refill themselves: each used chain becomes available again at once.
pub(crate) struct Refilling {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Card>>,
}

impl Refilling {
    pub(crate) fn start(mut card: Card) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let stopped = stop.clone();
        // None if the rings ran before: then all chains are in use.
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

/// A running case.
pub(crate) struct Scene {
    pub(crate) daemon: Daemon,
    case: u8,
    /// Host's end of the attacked port. `None` for a loopback port.
    wire: Option<Wire>,
    neighbour: Neighbour,
    /// Anti-spoofing is on, so frames must have an allowed source.
    guarded: bool,
    /// Descriptors, threads and resident kB before the attack.
    baseline: (usize, usize, usize),
}

impl Scene {
    /// Starts a daemon with a loopback port `attacked` of two queue pairs, and the neighbour.
    pub(crate) fn new(case: u8) -> Self {
        Self::start(case, "loopback = true\nqueue-pairs = 2\n", None)
    }

    /// Starts a case with `pairs` queue pairs.
    pub(crate) fn of_pairs(case: u8, pairs: u32) -> Self {
        Self::start(case, &format!("loopback = true\nqueue-pairs = {pairs}\n"), None)
    }

    /// Starts a case with further options of the attacked port.
    pub(crate) fn limited(case: u8, options: &str) -> Self {
        Self::start(case, &format!("loopback = true\nqueue-pairs = 2\n{options}"), None)
    }

    /// Starts a case with a control socket, `control`.
    pub(crate) fn operated(case: u8) -> Self {
        let control = "control = \"{}/control\"\n";
        Self::start_with(case, control, "loopback = true\n", None)
    }

    /// Starts a case with a fault point of `src/fault_point.rs` and the attacked port's options.
    pub(crate) fn failing(case: u8, fault: &str, attacked: &str, wire: Option<Wire>) -> Self {
        Self::with_fault(case, "control = \"{}/control\"\n", attacked, wire, fault)
    }

    /// Starts a case with a control socket and the attacked port's options. `wire` is the host's end.
    pub(crate) fn operated_on(case: u8, attacked: &str, wire: Option<Wire>) -> Self {
        Self::start_with(case, "control = \"{}/control\"\n", attacked, wire)
    }

    /// Starts a case on a TAP, in a new namespace.
    pub(crate) fn on_tap(case: u8) -> Self {
        enter_namespace_with_tap(false);
        Self::start(case, "tap = \"tap0\"\n", Some(Wire::open("tap0")))
    }

    /// Starts a case on `veth0`, in a new namespace.
    pub(crate) fn on_veth(case: u8) -> Self {
        enter_namespace_with_veth(1);
        Self::start(case, "af-xdp = \"veth0\"\n", Some(Wire::open("veth1")))
    }

    /// Starts a case on `veth0`, with a further port `other` on `veth2`.
    pub(crate) fn on_two_veths(case: u8) -> Self {
        enter_namespace_with_veth(1);
        ip("link add veth2 type veth peer name veth3");
        ip("link set veth2 up");
        ip("link set veth3 up");
        let ports = "af-xdp = \"veth0\"\n".to_owned() + &port("other", "af-xdp = \"veth2\"");
        Self::start(case, &ports, Some(Wire::open("veth1")))
    }

    /// Starts a case on a TAP in a bridge, `br0`, which learns source addresses. Anti-spoofing allows only
    /// the source of [`datagram`]s.
    ///
    /// [`datagram`]: super::traffic::datagram
    pub(crate) fn guarded_tap(case: u8) -> Self {
        enter_namespace_with_tap(false);
        bridge("tap0");
        Self::start(case, &format!("tap = \"tap0\"\n{RULES}"), Some(Wire::open("tap0")))
    }

    /// Starts a case on `veth0`, whose peer is in a bridge, with anti-spoofing as
    /// [`guarded_tap`](Self::guarded_tap) has.
    pub(crate) fn guarded_veth(case: u8) -> Self {
        enter_namespace_with_veth(1);
        bridge("veth1");
        Self::start(case, &format!("af-xdp = \"veth0\"\n{RULES}"), Some(Wire::open("veth1")))
    }

    fn start(case: u8, attacked: &str, wire: Option<Wire>) -> Self {
        Self::start_with(case, "", attacked, wire)
    }

    fn start_with(case: u8, daemon: &str, attacked: &str, wire: Option<Wire>) -> Self {
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

    /// Connects a frontend to the attacked port.
    pub(crate) fn frontend(&self) -> Frontend {
        Frontend::new(self.daemon.connect_to("attacked"))
    }

    /// Starts a guest on the attacked port.
    pub(crate) fn card(&self) -> Card {
        self.card_with(Options::default())
    }

    pub(crate) fn card_with(&self, options: Options) -> Card {
        Card::start(self.frontend(), options)
    }

    /// Returns the host's end of the attacked port.
    pub(crate) fn wire(&self) -> &Wire {
        self.wire.as_ref().expect("not a loopback")
    }

    /// Reports whether the attacked port is a loopback.
    pub(crate) fn has_no_host(&self) -> bool {
        self.wire.is_none()
    }

    /// Checks that the attacked port moves frames.
    #[track_caller]
    pub(crate) fn check(&self, card: &mut Card) {
        match &self.wire {
            None => card.check_echo(100),
            Some(wire) => {
                // Frames of the attack may still arrive.
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

    /// Returns the daemon's resources while an idle frontend is connected.
    fn resources(&self) -> (usize, usize, usize) {
        // The reply shows that the daemon has released the previous frontend.
        self.frontend().get(FrontendReq::GET_FEATURES);
        self.daemon.resources()
    }

    /// Waits for a log line of the attacked port that contains `what`.
    #[track_caller]
    pub(crate) fn says(&self, what: &str) {
        let said =
            || self.daemon.log().lines().any(|line| is_about_it(line) && line.contains(what));
        eventually(&format!("the log says {what:?}"), said);
    }

    /// Waits for any log line that contains `what`.
    #[track_caller]
    pub(crate) fn daemon_says(&self, what: &str) {
        eventually(&format!("the log says {what:?}"), || self.daemon.log().contains(what));
    }

    /// Returns the thread id of the attacked port's first worker.
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

    /// Returns the CPU time of the attacked port's first worker, in nanoseconds.
    pub(crate) fn worker_nanoseconds(&self) -> u64 {
        let path = format!("/proc/{}/task/{}/schedstat", self.daemon.process(), self.worker());
        let used = fs::read_to_string(path).unwrap();
        used.split(' ').next().unwrap().parse().unwrap()
    }

    /// Checks that the daemon runs and that the neighbour has received every frame.
    #[track_caller]
    pub(crate) fn lives(&mut self) {
        assert!(self.daemon.is_alive(), "the daemon has died");
        assert!(self.neighbour.stop() > 0, "the neighbour was not served");
    }

    /// Ends a case whose daemon was stopped on purpose.
    pub(crate) fn stopped(mut self) {
        self.neighbour.abandon();
    }

    /// Checks the end of a case: the daemon runs, the neighbour has received every frame, the port serves the
    /// next frontend, nothing leaks, and the log is not flooded.
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

    /// Checks the end of a case whose host's end was replaced by `wire`.
    #[track_caller]
    pub(crate) fn ends_on(mut self, wire: Wire, outcome: &str) {
        self.wire = Some(wire);
        self.ends(outcome);
    }

    fn check_log(&self) {
        let log = self.daemon.log();
        let mut kinds: HashMap<String, usize> = HashMap::new();
        for line in log.lines().filter(|line| is_about_it(line)) {
            // The kind of a line has no time and no numbers.
            let text = line.split_once("] ").map_or(line, |(_, text)| text);
            let (about, what) = text.split_once(": ").unwrap_or((text, ""));
            let what = what.split(|c: char| c.is_ascii_digit()).next().unwrap_or_default();
            *kinds.entry(format!("{about}: {what}")).or_default() += 1;
        }
        // A case may last three windows of the log's limit.
        let flooded = kinds.iter().find(|(_, count)| **count > 3 * LOG_BURST);
        assert!(flooded.is_none(), "{flooded:?} in the log");
    }
}

/// Reports whether a log line is about the attacked port.
fn is_about_it(line: &str) -> bool {
    line.contains("] attacked")
}
