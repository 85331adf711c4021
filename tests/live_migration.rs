//! A real guest that migrates between two QEMUs, each with its own daemon, under TCP in both directions.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::daemon::{Daemon, port};
use crate::support::network::{enter_new_namespace, ip};
use crate::support::vm::{GUEST_ADDRESS, HOST_ADDRESS, Vm, check_ping, needs_guest};
use crate::support::{eventually, one_at_a_time};

/// Bytes of the data in each direction.
const SET: usize = 8 << 20;
const MIGRATIONS: usize = 10;

/// Builds data without repetitions.
fn data() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        state.to_le_bytes()
    };
    std::iter::repeat_with(next).take(SET / 8).flatten().collect()
}

fn connect(port: u16) -> TcpStream {
    let mut connected = None;
    eventually("the guest listens", || {
        connected = TcpStream::connect((GUEST_ADDRESS, port)).ok();
        connected.is_some()
    });
    let stream = connected.unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(30))).unwrap();
    stream
}

/// Two connections, one in each direction, that repeat the data and check it.
struct Traffic {
    stop: Arc<AtomicBool>,
    received: Arc<AtomicUsize>,
    /// Longest time without received data, in microseconds.
    gap: Arc<AtomicU64>,
    reader: JoinHandle<()>,
    /// Sender thread, which returns how many times it has sent the data.
    writer: JoinHandle<usize>,
}

impl Traffic {
    fn start(vm: &mut Vm, data: &Arc<Vec<u8>>) -> Self {
        // The data goes in once, to be sent back for ever.
        vm.type_line("nc -l -p 7000 >/tmp/set; md5sum </tmp/set");
        let mut load = connect(7000);
        load.write_all(data).unwrap();
        drop(load);
        let sum = vm.wait_for_end();
        vm.run("(while cat /tmp/set; do :; done | nc -l -p 7001) >/dev/null 2>&1 &");
        // What comes in must be the data, too, as often as it was sent.
        vm.run("(nc -l -p 7002 | md5sum >/tmp/sum) >/dev/null 2>&1 &");
        let (mut from_guest, mut to_guest) = (connect(7001), connect(7002));
        let (stop, received, gap) =
            <(Arc<AtomicBool>, Arc<AtomicUsize>, Arc<AtomicU64>)>::default();
        let (stopped, count, longest, expected) =
            (stop.clone(), received.clone(), gap.clone(), data.clone());
        let reader = std::thread::spawn(move || {
            let mut bytes = vec![0; 64 << 10];
            let mut place = 0;
            while !stopped.load(Ordering::Relaxed) {
                let started = Instant::now();
                let length = from_guest.read(&mut bytes).unwrap();
                assert!(length > 0, "the connection from the guest has ended");
                longest.fetch_max(started.elapsed().as_micros() as u64, Ordering::Relaxed);
                let mut rest = &bytes[..length];
                while !rest.is_empty() {
                    let part = rest.len().min(SET - place);
                    assert!(rest[..part] == expected[place..place + part], "it is damaged");
                    place = (place + part) % SET;
                    rest = &rest[part..];
                }
                count.fetch_add(length, Ordering::Relaxed);
            }
        });
        let (stopped, data) = (stop.clone(), data.clone());
        let writer = std::thread::spawn(move || {
            let mut times = 0;
            while !stopped.load(Ordering::Relaxed) {
                to_guest.write_all(&data).unwrap();
                times += 1;
            }
            times
        });
        assert!(sum.len() >= 32, "{sum}");
        Traffic { stop, received, gap, reader, writer }
    }

    /// Waits until the guest has sent `bytes` further bytes.
    fn wait(&self, bytes: usize) {
        let wanted = self.received.load(Ordering::Relaxed) + bytes;
        // An emulated guest is slow, and more so while it moves.
        let end = Instant::now() + Duration::from_secs(60);
        while self.received.load(Ordering::Relaxed) < wanted {
            assert!(Instant::now() < end, "no bytes come from the guest");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn status(monitor: &mut crate::support::vm::Monitor) -> Value {
    monitor.ask("query-migrate", Value::Null)
}

/// Migrates a guest `times` times under TCP in both directions, after a cancelled migration. Checks all data.
/// `environment` is for `qemu/run-guest`.
pub(crate) fn check_moves(times: usize, environment: &[(&str, &str)]) {
    let _alone = one_at_a_time();
    let environment = &[&[("MEMORY", "192")], environment].concat();
    enter_new_namespace();
    let daemons = ["tap0", "tap1"].map(|tap| {
        let port = port("card", &format!("tap = \"{tap}\"\ntx-limit = \"10gbit\""));
        Daemon::with_config(&("control = \"{}/control\"\n".to_owned() + &port), "card")
    });
    ip("link add br0 type bridge");
    for tap in ["tap0", "tap1"] {
        ip(&format!("link set {tap} master br0"));
    }
    ip(&format!("address add {HOST_ADDRESS}/24 dev br0"));
    ip("link set br0 up");
    let mut vm = Vm::start(&daemons[0].path("card"), environment);
    vm.wait_ready();
    check_ping();
    let data = Arc::new(data());
    let traffic = Traffic::start(&mut vm, &data);
    traffic.wait(SET);

    // A cancelled migration: logging stops, and traffic continues.
    let mut monitor = vm.monitor();
    let stream = daemons[0].path("migration");
    monitor.ask("migrate-set-parameters", json!({"max-bandwidth": 1 << 20}));
    let listener = std::os::unix::net::UnixListener::bind(&stream).unwrap();
    let uri = json!({"uri": format!("unix:{}", stream.display())});
    monitor.ask("migrate", uri.clone());
    let taken = listener.accept().unwrap();
    let says = |daemon: &Daemon, what: &str, times: usize| {
        eventually(what, || daemon.log().matches(what).count() >= times);
    };
    says(&daemons[0], "dirty logging started", 1);
    traffic.wait(SET / 4);
    monitor.ask("migrate_cancel", Value::Null);
    drop((taken, listener));
    eventually("it is cancelled", || status(&mut monitor)["status"] == "cancelled");
    says(&daemons[0], "dirty logging stopped", 1);
    traffic.wait(SET);
    std::fs::remove_file(&stream).unwrap();
    drop(monitor);

    let (mut downtimes, mut gaps) = (Vec::new(), Vec::new());
    for round in 1..=times {
        let incoming = format!("unix:{}", stream.display());
        let (source, target) = (&daemons[(round + 1) % 2], &daemons[round % 2]);
        let socket = target.path("card");
        let sent = source.show("card")["tx_frames"].as_u64().unwrap();
        let mut next = Vm::start_with(&socket, environment, &["-incoming", &incoming]);
        eventually("it waits for the guest", || stream.exists());
        traffic.gap.store(0, Ordering::Relaxed);
        let mut monitor = vm.monitor();
        let parameters = json!({"max-bandwidth": 1_u64 << 31, "downtime-limit": 300});
        monitor.ask("migrate-set-parameters", parameters);
        monitor.ask("migrate", uri.clone());
        let mut last = Value::Null;
        let end = Instant::now() + Duration::from_secs(60);
        while last["status"] != "completed" {
            last = status(&mut monitor);
            assert!(last["status"] != "failed" && Instant::now() < end, "{last}");
            std::thread::sleep(Duration::from_millis(20));
        }
        vm.kill();
        // QEMU carries the device's state: what was counted, and how far limits are used up.
        let moved = "card: device state transferred";
        daemons.iter().for_each(|daemon| says(daemon, moved, round));
        assert!(target.show("card")["tx_frames"].as_u64().unwrap() >= sent);
        // The guest continues on the destination.
        traffic.wait(SET);
        downtimes.push(last["downtime"].as_u64().unwrap());
        gaps.push(traffic.gap.load(Ordering::Relaxed) / 1000);
        next.wait_for_commands();
        vm = next;
        let _ = std::fs::remove_file(&stream);
    }
    println!("downtime by QEMU in ms: {downtimes:?}; longest silence of the guest: {gaps:?}");
    traffic.stop.store(true, Ordering::Relaxed);
    traffic.reader.join().unwrap();
    let times = traffic.writer.join().unwrap();
    let mut expected =
        Command::new("md5sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut pipe = expected.stdin.take().unwrap();
    (0..times).for_each(|_| pipe.write_all(&data).unwrap());
    drop(pipe);
    let expected = String::from_utf8(expected.wait_with_output().unwrap().stdout).unwrap();
    let seen = vm.run("while ! test -s /tmp/sum; do sleep 0.1; done; cat /tmp/sum");
    assert_eq!(seen.trim(), expected.trim(), "the guest got something else than was sent");
    println!("{times} times {SET} bytes went to the guest unchanged");
}

#[test]
fn guest_migrates_ten_times_under_tcp_with_memory_intact() {
    needs_guest!("guest_migrates_ten_times_under_tcp_with_memory_intact");
    check_moves(MIGRATIONS, &[]);
}
