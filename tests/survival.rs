//! Guests whose daemon is killed notice only a pause.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::support::daemon::Daemon;
use crate::support::network::{Wire, enter_new_namespace, ip};
use crate::support::vm::{GUEST_ADDRESS, HOST_ADDRESS, Vm, check_ping, needs_guest};
use crate::support::{Running, eventually, one_at_a_time};

const KILLS: usize = 100;
/// Guest's address, which qemu/run-guest sets.
const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 0, 2, 2];

/// A count of the guest's frames.
struct Watch {
    frames: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    fn start(device: &str) -> Self {
        let wire = Wire::open(device);
        let (frames, stop) = <(Arc<AtomicUsize>, Arc<AtomicBool>)>::default();
        let (count, stopped) = (frames.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let frame = wire.receive_any(50);
                if frame.is_some_and(|frame| frame.get(6..12) == Some(&GUEST_MAC)) {
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Watch { frames, stop, thread: Some(thread) }
    }

    fn count(&self) -> usize {
        self.frames.load(Ordering::Relaxed)
    }

    /// Waits until the guest has sent `frames` further frames.
    fn wait(&self, frames: usize) {
        let wanted = self.count() + frames;
        eventually("the guest sends", || self.count() >= wanted);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().unwrap().join();
    }
}

/// Starts TCP in both directions for longer than the test, at a rate that leaves CPU time to other tests.
fn traffic() -> Running {
    let options = ["-t", "600", "--bidir", "-b", "20M"];
    Running::start(Command::new("iperf3").args(["-c", GUEST_ADDRESS]).args(options))
}

/// Returns median and maximum of the pauses.
fn summary(mut gaps: Vec<Duration>) -> (Duration, Duration) {
    gaps.sort_unstable();
    (gaps[gaps.len() / 2], gaps[gaps.len() - 1])
}

/// Kills and restarts the daemon repeatedly under a guest's traffic.
fn check_kills(server: &str, options: &[&str]) {
    enter_new_namespace();
    ip("tuntap add dev tap0 mode tap vnet_hdr");
    ip("link set tap0 up");
    ip(&format!("address add {HOST_ADDRESS}/24 dev tap0"));
    let mut daemon = Daemon::spawn(options);
    if server == "0" {
        daemon.wait_until_it_listens();
    }
    let mut vm = Vm::start(&daemon.socket(), &[("SERVER", server)]);
    vm.wait_ready();
    check_ping();
    let mut traffic = traffic();
    // TCP that has lost something waits for longer than the daemon takes: these come all the time.
    let pings = Running::start(Command::new("ping").args(["-q", "-i", "0.005", GUEST_ADDRESS]));
    let watch = Watch::start("tap0");
    watch.wait(200);
    let mut gaps = Vec::new();
    for _ in 0..KILLS {
        daemon.kill();
        let killed = Instant::now();
        // What was on its way to us.
        std::thread::sleep(Duration::from_millis(2));
        let before = watch.count();
        daemon.run(options);
        eventually("the guest's frames come again", || watch.count() > before);
        gaps.push(killed.elapsed());
        watch.wait(100);
    }
    assert!(!traffic.has_ended(), "the guest's connections have ended");
    drop((traffic, pings));
    vm.run("true");
    check_ping();
    let (half, most) = summary(gaps);
    println!(
        "SERVER={server}: killed {KILLS} times, pause {half:.2?} (half), {most:.2?} (longest)"
    );
}

#[test]
fn guest_survives_hundred_kills_when_qemu_reconnects() {
    needs_guest!("guest_survives_hundred_kills_when_qemu_reconnects");
    // QEMU tries once a second.
    check_kills("0", &["--tap=tap0"]);
}

#[test]
fn guest_survives_hundred_kills_when_daemon_reconnects() {
    needs_guest!("guest_survives_hundred_kills_when_daemon_reconnects");
    let _alone = one_at_a_time();
    check_kills("1", &["--tap=tap0", "--connect={}"]);
}

#[test]
fn memory_hotplug_works_under_traffic() {
    needs_guest!("memory_hotplug_works_under_traffic");
    let _alone = one_at_a_time();
    enter_new_namespace();
    let daemon = Daemon::start(&["--tap=tap0", "--log-level=debug"]);
    ip(&format!("address add {HOST_ADDRESS}/24 dev tap0"));
    let mut vm = Vm::start(&daemon.socket(), &[("SLOTS", "4")]);
    vm.wait_ready();
    check_ping();
    let mut traffic = traffic();
    let regions = || {
        let log = daemon.log();
        let mut lines = log.lines().rev();
        let regions = lines.find_map(|line| line.split_once("memory table replaced regions="));
        regions.unwrap().1.parse::<usize>().unwrap()
    };
    let before = regions();
    let mut monitor = vm.monitor();
    let memory = serde_json::json!({
        "qom-type": "memory-backend-memfd", "id": "more", "size": 256 << 20, "share": true,
    });
    let (mut pauses, mut sent, mut answered) = (Vec::new(), 0, 0);
    for round in 0..3 {
        let ping = Command::new("ping")
            .args(["-i", "0.005", "-c", "400", "-W", "2", GUEST_ADDRESS])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(500));
        if round == 0 {
            monitor.ask("object-add", memory.clone());
            let dimm = serde_json::json!({"driver": "pc-dimm", "id": "dimm", "memdev": "more"});
            monitor.ask("device_add", dimm);
            eventually("the daemon has it", || regions() == before + 1);
        } else if round == 1 {
            // If the guest lets go of it.
            monitor.ask("device_del", serde_json::json!({"id": "dimm"}));
        }
        let output = String::from_utf8(ping.wait_with_output().unwrap().stdout).unwrap();
        let numbers = output.lines().find(|line| line.contains("packets transmitted")).unwrap();
        let words: Vec<usize> = numbers.split(' ').filter_map(|it| it.parse().ok()).collect();
        (sent, answered) = (sent + words[0], answered + words[1]);
        let times = output.lines().find(|line| line.starts_with("rtt")).unwrap();
        pauses.push(times.split('/').nth(5).unwrap().to_owned());
    }
    let left = regions();
    println!(
        "256 MiB plugged in, {}: {answered} of {sent} pings, the slowest {pauses:?} ms",
        if left == before { "and out" } else { "and kept by the guest" }
    );
    assert_eq!(answered, sent);
    assert!(left == before || left == before + 1);
    assert!(!traffic.has_ended(), "the guest's connections have ended");
    drop(traffic);
    vm.run("true");
}
