//! Take-overs by a new daemon, under traffic.

use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vhost_user_net::sys::socket::{MAX_DESCRIPTORS, receive, send_message};

use crate::support::daemon::{Daemon, port};
use crate::support::driver::{Card, LOG_ALL, Options};
use crate::support::frontend::Frontend;
use crate::support::guest::memfd;
use crate::support::network::{
    Wire, enter_namespace_with_tap, enter_namespace_with_veth, ip, wait_for_carrier,
};
use crate::support::traffic::check_both_ways;
use crate::support::{eventually, needs_root, one_at_a_time};

const UPGRADES: usize = 50;
const CONTROL: &str = "control = \"{}/control\"\nmetrics = \"{}/metrics\"\n";

fn card(daemon: &Daemon, port: &str, options: Options) -> Card {
    Card::start(Frontend::new(daemon.connect_to(port)), options)
}

/// Returns the ports' pause at each take-over, from the log.
fn gaps(daemon: &Daemon) -> Vec<Duration> {
    let log = daemon.log();
    let times = log.lines().filter_map(|line| line.split_once(" pause_max="));
    let parse = |text: &str| {
        let number = text.split(' ').next().unwrap();
        let (digits, unit) =
            number.split_at(number.find(|c: char| c.is_alphabetic() || c == 'µ').unwrap());
        let value: f64 = digits.parse().unwrap();
        let seconds = match unit {
            "s" => value,
            "ms" => value / 1e3,
            "µs" => value / 1e6,
            other => panic!("{other}"),
        };
        Duration::from_secs_f64(seconds)
    };
    times.map(|(_, rest)| parse(rest)).collect()
}

#[test]
fn fifty_takeovers_lose_no_frame_and_no_connection() {
    needs_root!("fifty_takeovers_lose_no_frame_and_no_connection");
    let _alone = one_at_a_time();
    enter_namespace_with_tap(true);
    let ports = port("one", "loopback = true\nqueue-pairs = 2")
        + &port("two", "tap = \"tap0\"\nqueue-pairs = 2\ntx-limit = \"10gbit\"")
        + &port("idle", "loopback = true");
    let mut daemon = Daemon::with_config(&(CONTROL.to_owned() + &ports), "idle");
    let mut one = card(&daemon, "one", Options { pairs: 2, ..Options::default() });
    let mut two = card(&daemon, "two", Options::default());
    wait_for_carrier("tap0");
    let wire = Wire::open("tap0");
    check_both_ways(&wire, &mut two, 50);
    /// Stops the traffic even if the test fails.
    struct Stop(AtomicBool);
    impl Stop {
        fn now(&self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    struct AtEnd<'a>(&'a Stop);
    impl Drop for AtEnd<'_> {
        fn drop(&mut self) {
            self.0.now();
        }
    }
    let stop = Stop(AtomicBool::new(false));
    let (echoed, mut two) = std::thread::scope(|scope| {
        let echo = scope.spawn(|| {
            let mut echoed = 0;
            while !stop.0.load(Ordering::Relaxed) {
                // Panics if a frame is missing, and if one is used twice.
                one.check_echo(50);
                echoed += 50;
            }
            echoed
        });
        let _end = AtEnd(&stop);
        for round in 1..=UPGRADES {
            daemon.upgrade();
            eventually("the log has the line", || gaps(&daemon).len() == round);
            if round % 10 == 0 {
                check_both_ways(&wire, &mut two, 20);
            }
        }
        stop.now();
        (echo.join().unwrap(), two)
    });
    assert!(echoed > 0);
    check_both_ways(&wire, &mut two, 50);
    let mut gaps = gaps(&daemon);
    gaps.sort_unstable();
    let (half, most) = (gaps[gaps.len() / 2], gaps[gaps.len() - 1]);
    println!("{UPGRADES} upgrades, {echoed} frames: pause {half:.1?} (half), {most:.1?} (longest)");
    assert!(most < Duration::from_secs(1), "{most:?}");
    // No frontend was disconnected, and the counters continue. One connection only waited for the port to
    // listen.
    assert!(daemon.log().matches("one: frontend disconnected").count() <= 1, "{}", daemon.log());
    assert!(!daemon.log().contains("take-over aborted"), "{}", daemon.log());
    let report = daemon.show("one");
    assert_eq!(report["tx_frames"], echoed);
    assert_eq!(report["connections"], 1, "{report}");
    assert_eq!(
        daemon.show("two")["tx_limit"],
        daemon.show("two")["options"]["tx-limit"]
            .as_str()
            .map(|_| "10gbit,burst=12500000")
            .unwrap()
    );
    // New clients find all sockets.
    card(&daemon, "idle", Options::default()).check_echo(20);
    assert!(daemon.ask(&["list"]).contains("idle"));
    let metrics = UnixStream::connect(daemon.path("metrics"));
    assert!(metrics.is_ok());
    daemon.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(daemon.wait().success());
    for socket in ["one", "two", "idle", "control", "metrics"] {
        assert!(!daemon.path(socket).exists(), "{socket} is left behind");
    }
}

#[test]
fn takeover_preserves_frontend_state() {
    let mut daemon =
        Daemon::with_config(&(CONTROL.to_owned() + &port("one", "loopback = true")), "one");
    let options = Options { features: Options::default().features, ..Options::default() };
    let mut card = card(&daemon, "one", options);
    // A dirty log and an inflight buffer, and a ring that is disabled.
    let (length, buffer) = card.frontend.get_inflight_fd(2, 256).unwrap();
    let payload = crate::support::frontend::inflight(length, 0, 2, 256);
    let set_inflight = vhost::vhost_user::message::FrontendReq::SET_INFLIGHT_FD;
    card.frontend.ask(set_inflight, &payload, &[buffer.as_raw_fd()]);
    let log = memfd(card.ram.size / 4096 / 8 + 1);
    assert!(card.frontend.set_log_base(card.ram.size / 4096 / 8 + 1, 0, &log));
    card.frontend.set_features(card.options.features | LOG_ALL);
    card.check_echo(20);
    daemon.upgrade();
    log.write_all_at(&[0; 64], 0).unwrap();
    card.check_echo(20);
    let mut bits = [0; 64];
    log.read_exact_at(&mut bits, 0).unwrap();
    assert!(bits.iter().any(|byte| *byte != 0), "the log is not written any more");
    let mut part = [0; 16];
    buffer.read_exact_at(&mut part, 0).unwrap();
    let used = u16::from_ne_bytes([part[14], part[15]]);
    assert_eq!(used, card.rx[0].used_index, "the inflight buffer is not kept any more");
    card.frontend.enable(1, false);
    daemon.upgrade();
    card.send(0, &[0; 60]);
    eventually("the frame is dropped", || {
        daemon.show("one")["queue_pairs"][0]["tx"]["dropped"]["disabled"] == 1
    });
    card.frontend.enable(1, true);
    card.check_echo(20);
    // Rings stop and start, and the frontend goes, as ever.
    card.frontend.get_vring_base(0);
    card.frontend.get_vring_base(1);
    card.run();
    card.check_echo(20);
    drop(card);
    eventually("the port waits for a VMM", || daemon.show("one")["state"] == "waiting");
}

#[test]
fn failed_takeover_leaves_ports_to_old_daemon() {
    needs_root!("failed_takeover_leaves_ports_to_old_daemon");
    enter_namespace_with_veth(1);
    let ports = port("one", "loopback = true");
    let mut daemon = Daemon::with_config(&(CONTROL.to_owned() + &ports), "one");
    let mut one = card(&daemon, "one", Options::default());
    one.check_echo(50);
    // Its file is wrong.
    daemon.write_config("control = \"{}/control\"\n[[port]]\ntup = 1\n");
    assert_eq!(daemon.start_successor().wait().unwrap().code(), Some(2));
    one.check_echo(50);
    daemon.write_config(&(CONTROL.to_owned() + &ports));
    // It dies at some moment.
    for milliseconds in [0, 1, 2, 4, 6, 8, 10, 12, 15, 20, 30] {
        let mut successor = daemon.start_successor();
        std::thread::sleep(Duration::from_millis(milliseconds));
        let _ = successor.kill();
        successor.wait().unwrap();
        std::thread::sleep(Duration::from_millis(20));
        if !daemon.is_alive() {
            // It was there already, and had taken over: its death is that of a daemon.
            daemon.run_config();
            eventually("the daemon listens", || UnixStream::connect(daemon.path("one")).is_ok());
            one.resume(Frontend::new(daemon.connect_to("one")));
        }
        one.check_echo(50);
        assert!(daemon.path("one").exists() && daemon.path("control").exists());
    }
    // A port that can't change hands.
    let other = Daemon::with_config(&(CONTROL.to_owned() + &port("x", "af-xdp = \"veth0\"")), "x");
    let mut card = card(&other, "x", Options::default());
    assert_eq!(other.start_successor().wait().unwrap().code(), Some(1));
    assert!(
        other.log().contains("cannot take over port x: AF_XDP sockets cannot be passed on"),
        "{}",
        other.log()
    );
    check_both_ways(&Wire::open("veth1"), &mut card, 50);
    assert!(other.path("x").exists() && other.path("control").exists());
    // No old daemon, and no control socket.
    let mut nobody = Daemon::with_config(&(CONTROL.to_owned() + &ports), "one");
    nobody.kill();
    assert_eq!(nobody.start_successor().wait().unwrap().code(), Some(1));
    assert!(nobody.log().contains("cannot take over from the daemon at "), "{}", nobody.log());
    nobody.write_config(&ports);
    assert_eq!(nobody.start_successor().wait().unwrap().code(), Some(2));
}

#[test]
fn takeover_keeps_renamed_and_deleted_taps() {
    needs_root!("takeover_keeps_renamed_and_deleted_taps");
    enter_namespace_with_tap(false);
    ip("tuntap add dev tap1 mode tap vnet_hdr");
    let ports = port("renamed", "tap = \"tap0\"") + &port("deleted", "tap = \"tap1\"");
    let mut daemon = Daemon::with_config(&(CONTROL.to_owned() + &ports), "deleted");
    let mut renamed = card(&daemon, "renamed", Options::default());
    let mut deleted = card(&daemon, "deleted", Options::default());
    wait_for_carrier("tap0");
    ip("link set tap0 down");
    ip("link set tap0 name other");
    ip("link set other up");
    ip("link delete tap1");
    daemon.upgrade();
    check_both_ways(&Wire::open("other"), &mut renamed, 20);
    deleted.send(0, &[0; 60]);
    eventually("its frames are dropped", || {
        daemon.show("deleted")["queue_pairs"][0]["mode"] == "gone"
    });
}

/// Sends a request to the old daemon. Returns the reply and its descriptors.
fn ask(socket: &UnixStream, command: &str) -> (serde_json::Value, Vec<OwnedFd>) {
    let request = serde_json::json!({"version": 1, "command": command}).to_string() + "\n";
    (&*socket).write_all(request.as_bytes()).unwrap();
    let (bytes, files) = read_until(socket, |bytes| bytes.last() == Some(&b'\n'));
    (serde_json::from_slice(&bytes).unwrap(), files)
}

/// Reads until `done` returns true, or to the end.
fn read_until(socket: &UnixStream, done: impl Fn(&[u8]) -> bool) -> (Vec<u8>, Vec<OwnedFd>) {
    let (mut bytes, mut files) = (Vec::new(), Vec::new());
    while !done(&bytes) {
        let mut buffer = [0; 4096];
        let received = receive(socket, &mut buffer, MAX_DESCRIPTORS).unwrap();
        if received.bytes == 0 {
            break;
        }
        bytes.extend(&buffer[..received.bytes]);
        files.extend(received.files.into_iter().map(OwnedFd::from));
    }
    (bytes, files)
}

/// Sends bytes, with descriptors on the first one.
fn give(socket: &UnixStream, bytes: &[u8], files: &[OwnedFd]) {
    let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    send_message(socket, bytes, &files).unwrap();
}

#[test]
fn takeover_refuses_an_incomplete_replay() {
    let real = Daemon::with_config(&(CONTROL.to_owned() + &port("one", "loopback = true")), "one");
    let mut card = card(&real, "one", Options::default());
    let socket = UnixStream::connect(real.path("control")).unwrap();
    let (listeners, sockets) = ask(&socket, "listeners");
    let (told, mut files) = ask(&socket, "hand-over");
    let replay = UnixStream::from(files.pop().unwrap());
    // Each message for itself: its descriptors come with it.
    let mut messages = Vec::new();
    loop {
        let whole = |bytes: &[u8]| {
            bytes.len() >= 12
                && bytes.len() == 12 + u32::from_ne_bytes(bytes[8..12].try_into().unwrap()) as usize
        };
        let (mut bytes, mut with) = (Vec::new(), Vec::new());
        while !whole(&bytes) {
            let wanted = if bytes.len() < 12 { 12 } else { 12 + usize::from(bytes[8]) };
            let mut buffer = vec![0; wanted - bytes.len()];
            let received = receive(&replay, &mut buffer, MAX_DESCRIPTORS).unwrap();
            if received.bytes == 0 {
                break;
            }
            bytes.extend(&buffer[..received.bytes]);
            with.extend(received.files.into_iter().map(OwnedFd::from));
        }
        if bytes.is_empty() {
            break;
        }
        messages.push((bytes, with));
    }
    assert_eq!(told["ok"][0]["messages"], messages.len());
    drop(socket);
    // The old daemon stops after a whole message, within a message, and before the first.
    let whole = messages.len();
    for (count, cut) in [(whole - 1, 0), (1, 0), (0, 0), (whole - 1, 1), (3, 11), (5, 13)] {
        let mut fake =
            Daemon::with_config(&(CONTROL.to_owned() + &port("x", "loopback = true")), "x");
        fake.kill();
        std::fs::remove_file(fake.path("control")).unwrap();
        let listener = UnixListener::bind(fake.path("control")).unwrap();
        let mut successor = fake.start_successor();
        let (client, _) = listener.accept().unwrap();
        let line = |bytes: &[u8]| bytes.last() == Some(&b'\n');
        read_until(&client, line);
        give(&client, b" ", &sockets);
        give(&client, (listeners.to_string() + "\n").as_bytes(), &[]);
        read_until(&client, line);
        let (ours, its) = UnixStream::pair().unwrap();
        let passed: Vec<OwnedFd> =
            files.iter().map(|file| file.try_clone().unwrap()).chain([its.into()]).collect();
        give(&client, b" ", &passed);
        drop(passed);
        give(&client, (told.to_string() + "\n").as_bytes(), &[]);
        messages[..count].iter().for_each(|(bytes, files)| give(&ours, bytes, files));
        if cut > 0 {
            give(&ours, &messages[count].0[..cut], &messages[count].1);
        }
        drop(ours);
        // It asks for nothing more, and ends.
        assert_eq!(read_until(&client, line).0, b"", "{count} messages, {cut} bytes");
        assert_eq!(successor.wait().unwrap().code(), Some(1));
        assert!(fake.log().contains("cannot take over port one: "), "{}", fake.log());
    }
    card.check_echo(20);
}

#[test]
fn late_daemon_does_not_end_another_takeover() {
    let mut daemon =
        Daemon::with_config(&(CONTROL.to_owned() + &port("one", "loopback = true")), "one");
    let mut card = card(&daemon, "one", Options::default());
    let connect = || UnixStream::connect(daemon.path("control")).unwrap();
    let (late, gone, next) = (connect(), connect(), connect());
    for successor in [&late, &gone] {
        assert!(ask(successor, "hand-over").0["ok"].is_array());
        // A third daemon cannot take over the ports.
        let refusal = ask(&next, "hand-over").0["error"]["message"].to_string();
        assert!(refusal.contains("another daemon is taking over the ports"), "{refusal}");
        card.check_echo(20);
    }
    let (_told, _files) = ask(&next, "hand-over");
    // The late one is told so, and neither its request nor another's end changes anything.
    let refusal = ask(&late, "let-go").0["error"]["message"].to_string();
    assert!(refusal.contains("the old daemon has resumed its ports"), "{refusal}");
    drop((late, gone));
    std::thread::sleep(Duration::from_millis(50));
    assert!(!daemon.log().contains("the other daemon has gone"), "{}", daemon.log());
    assert_eq!(ask(&next, "let-go").0["ok"]["gone"], true);
    assert!(daemon.wait().success());
}

#[test]
fn takeover_opens_a_changed_metrics_address() {
    let contents = |metrics: &str| {
        let settings = format!("control = \"{{}}/control\"\nmetrics = \"{{}}/{metrics}\"\n");
        settings + &port("one", "loopback = true")
    };
    let mut daemon = Daemon::with_config(&contents("before"), "one");
    daemon.upgrade();
    assert!(UnixStream::connect(daemon.path("before")).is_ok());
    daemon.write_config(&contents("after"));
    daemon.upgrade();
    assert!(UnixStream::connect(daemon.path("after")).is_ok());
    eventually("no daemon listens there", || UnixStream::connect(daemon.path("before")).is_err());
}
