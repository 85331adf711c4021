//! Captures of a port's frames, read by tshark.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::daemon::{Daemon, port, program};
use crate::support::driver::{Card, HEADER, Options};
use crate::support::frontend::Frontend;
use crate::support::hostile::note;
use crate::support::network::{enter_namespace_for, wait_for_carrier};
use crate::support::traffic::{datagram, flip_ports, frame};
use crate::support::{eventually, needs_program, needs_root, one_at_a_time};

fn capturing(rest: &str) -> (Daemon, Card) {
    let file = "control = \"{}/control\"\n".to_owned() + &port("one", rest);
    let daemon = Daemon::with_config(&file, "one");
    let card = Card::start(Frontend::new(daemon.connect_to("one")), Options::default());
    (daemon, card)
}

/// Starts `ctl capture`, and waits until frames are captured.
fn start(daemon: &Daemon, options: &[&str]) -> Child {
    let before = daemon.log().matches("capture started by an operator").count();
    let child = program()
        .arg("ctl")
        .arg("--control")
        .arg(daemon.path("control"))
        .args(["capture", "one"])
        .args(options)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    eventually("the capture runs", || {
        daemon.log().matches("capture started by an operator").count() > before
    });
    child
}

/// Waits for the end of the capture. Returns its output.
#[track_caller]
fn end(child: Child) -> String {
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    said
}

fn interrupt(child: &Child) {
    kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).unwrap();
}

/// Returns fields of each frame in a file, read by tshark.
#[track_caller]
fn fields(file: &Path, names: &[&str]) -> Vec<Vec<String>> {
    let mut tshark = Command::new("tshark");
    tshark.arg("-n").arg("-r").arg(file).args(["-T", "fields"]);
    for name in names {
        tshark.args(["-e", name]);
    }
    let output = tshark.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    text.lines().map(|line| line.split('\t').map(str::to_owned).collect()).collect()
}

const DIRECTION: &str = "frame.packet_flags_direction";

/// Reports whether a direction flag means a frame to the guest.
fn is_inbound(direction: &str) -> bool {
    match direction {
        "0x00000001" | "0x1" | "1" => true,
        "0x00000002" | "0x2" | "2" => false,
        other => panic!("direction {other}"),
    }
}

#[test]
fn tshark_reads_each_frame_once_with_direction() {
    needs_root!("tshark_reads_each_frame_once_with_direction");
    needs_program!("tshark_reads_each_frame_once_with_direction", "tshark");
    for host in ["tap = \"tap0\"", "af-xdp = \"veth0\"", "loopback = true"] {
        let wire = match host {
            "loopback = true" => None,
            device => Some(enter_namespace_for(device)),
        };
        let (daemon, mut card) = capturing(host);
        if host.starts_with("tap") {
            wait_for_carrier("tap0");
        }
        let file = daemon.path("capture");
        // The first frame opens an AF_XDP socket.
        card.send(0, &frame(999, 60));
        if let Some(wire) = &wire {
            assert!(wire.receive(1000).is_some());
        } else {
            card.receive(0);
        }
        let child = start(&daemon, &["--count=40", "-w", file.to_str().unwrap()]);
        for number in 0..20 {
            card.send(0, &frame(number, 60 + number * 10));
            match &wire {
                None => drop(card.receive(0)),
                Some(wire) => {
                    assert!(wire.receive(1000).is_some());
                    wire.send(&frame(100 + number, 1000 + number));
                    card.receive(0);
                }
            }
        }
        assert_eq!(end(child), "one: 40 frames captured, 0 left out\n", "{host}");
        let names = [DIRECTION, "frame.len", "frame.cap_len", "frame.interface_name", "data.data"];
        let seen = fields(&file, &names);
        assert_eq!(seen.len(), 40);
        let mut sent = 0;
        let mut received = 0;
        for line in seen {
            let inbound = is_inbound(&line[0]);
            let (number, expected) = if inbound {
                received += 1;
                match &wire {
                    None => (received - 1, frame(received - 1, 60 + (received - 1) * 10)),
                    Some(_) => (received - 1, frame(99 + received, 999 + received)),
                }
            } else {
                sent += 1;
                (sent - 1, frame(sent - 1, 60 + (sent - 1) * 10))
            };
            assert_eq!(line[1], expected.len().to_string(), "{host}: {number}");
            assert_eq!(line[2], line[1]);
            assert_eq!(line[3], "one/0");
            let hex: String = expected[14..].iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(line[4].replace(':', ""), hex, "{host}: {number}");
        }
        assert_eq!((sent, received), (20, 20), "{host}");
    }
}

#[test]
fn scattered_frames_are_captured_whole_or_to_snaplen() {
    needs_program!("scattered_frames_are_captured_whole_or_to_snaplen", "tshark");
    let (daemon, mut card) = {
        let config =
            "control = \"{}/control\"\n".to_owned() + &port("one", "loopback = true\nmtu = 9000");
        let daemon = Daemon::with_config(&config, "one");
        let options = Options { buffer: 512, ..Options::default() };
        let frontend = Frontend::new(daemon.connect_to("one"));
        (daemon, Card::start(frontend, options))
    };
    let (whole, short) = (daemon.path("whole"), daemon.path("short"));
    let child = start(&daemon, &["--count=2", "-w", whole.to_str().unwrap()]);
    let large = frame(1, 1400);
    card.send(0, &large);
    assert_eq!(card.receive(0)[12..], large);
    end(child);
    let child = start(&daemon, &["--count=2", "--snaplen=64", "-w", short.to_str().unwrap()]);
    card.send(0, &large);
    card.receive(0);
    end(child);
    let lengths = |file| fields(file, &["frame.len", "frame.cap_len"]);
    assert_eq!(lengths(&whole), [["1400", "1400"], ["1400", "1400"]]);
    assert_eq!(lengths(&short), [["1400", "64"], ["1400", "64"]]);
}

#[test]
fn only_matching_frames_are_captured() {
    needs_program!("only_matching_frames_are_captured", "tshark");
    let (daemon, mut card) = capturing("loopback = true");
    let file = daemon.path("capture");
    let options = ["--filter=udp dport 53; icmp", "--count=4", "-w", file.to_str().unwrap()];
    let child = start(&daemon, &options);
    for port in [9, 53, 80, 53] {
        let (_, mut bytes) = datagram(40);
        bytes[36..38].copy_from_slice(&[0, port]);
        card.send(0, &bytes);
        card.receive(0);
        card.send(0, &frame(1, 100));
        card.receive(0);
    }
    end(child);
    let ports = fields(&file, &["udp.dstport"]);
    assert_eq!(ports, [["53"], ["53"], ["53"], ["53"]]);
    let wrong = daemon.ctl(&["capture", "one", "--filter=port 53", "-w", "-"]);
    assert_eq!(wrong.status.code(), Some(2));
}

#[test]
fn interrupted_capture_is_complete_with_drop_reasons() {
    needs_program!("interrupted_capture_is_complete_with_drop_reasons", "tshark");
    let (daemon, mut card) = capturing("loopback = true");
    let file = daemon.path("capture");
    let child = start(&daemon, &["-w", file.to_str().unwrap()]);
    card.check_echo(10);
    // Shorter than an Ethernet header.
    card.send(0, &[0; 5]);
    eventually("the frame is dropped", || daemon.show("one")["dropped"] == 1);
    interrupt(&child);
    assert_eq!(end(child), "one: 21 frames captured, 0 left out\n");
    let comments = fields(&file, &["frame.comment"]);
    assert_eq!(comments.len(), 21);
    let dropped = comments.iter().filter(|line| line[0] == "dropped: too_short").count();
    assert_eq!(dropped, 1, "{comments:?}");
    // Once more, into a pipe.
    let mut child = start(&daemon, &["--count=4", "-w", "-"]);
    let tshark = Command::new("tshark")
        .args(["-n", "-r", "-"])
        .stdin(child.stdout.take().unwrap())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    card.check_echo(2);
    end(child);
    let output = tshark.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap().lines().count(), 4);
}

#[test]
fn slow_capture_reader_costs_guest_no_frames() {
    let _busy = one_at_a_time();
    let (daemon, mut card) = capturing("loopback = true");
    let file = daemon.path("capture");
    let child = start(&daemon, &["-w", file.to_str().unwrap()]);
    let process = Pid::from_raw(child.id() as i32);
    kill(process, Signal::SIGSTOP).unwrap();
    // More than wait: each frame is seen twice.
    let frames = 12_000;
    (0..frames / 200).for_each(|_| card.check_echo(200));
    kill(process, Signal::SIGCONT).unwrap();
    eventually("they are written", || {
        let tally = daemon.ask(&["--json", "list"]);
        !tally.is_empty() && std::fs::metadata(&file).is_ok_and(|file| file.len() > 1_000_000)
    });
    interrupt(&child);
    let said = end(child);
    let numbers: Vec<usize> =
        said.split(' ').filter_map(|word| word.trim_matches(',').parse().ok()).collect();
    assert!(numbers[1] > 0, "{said}");
    assert_eq!(numbers.iter().sum::<usize>(), 2 * frames, "{said}");
    card.check_echo(50);
}

#[test]
fn capture_ends_with_its_port_and_reports_errors() {
    let (daemon, mut card) = capturing("loopback = true");
    let file = daemon.path("capture");
    let file = file.to_str().unwrap();
    let output = daemon.ctl(&["capture", "one", "-w", "/proc/nowhere/x"]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("write /proc/nowhere/x: "), "{text}");
    eventually("it has ended", || daemon.log().contains("capture ended frames=0"));
    std::fs::write(file, "an older capture").unwrap();
    let refused = daemon.ctl(&["capture", "two", "-w", file]);
    assert_eq!(refused.status.code(), Some(1));
    assert_eq!(std::fs::read(file).unwrap(), b"an older capture");
    let child = start(&daemon, &["-w", file]);
    for (words, code, said) in [
        (&["capture", "one", "-w", "/dev/null"][..], 1, "another capture runs"),
        (&["capture", "two", "-w", "/dev/null"], 1, "no port \"two\""),
        (&["capture", "one", "--snaplen=3", "-w", "-"], 2, "snaplen"),
        (&["capture", "one"], 2, "--write"),
    ] {
        let output = daemon.ctl(words);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{words:?}: {text}");
        assert!(text.contains(said), "{words:?}: {text}");
    }
    card.check_echo(5);
    daemon.ask(&["remove", "one"]);
    assert_eq!(end(child), "one: capture ended\n");
    let bytes = std::fs::read(file).unwrap();
    assert!(bytes.len() > 10 * 60);
}

#[test]
fn hostile_64_capture_holds_checked_headers() {
    needs_root!("hostile_64_capture_holds_checked_headers");
    needs_program!("hostile_64_capture_holds_checked_headers", "tshark");
    const SLOTS: u64 = 128;
    for host in ["tap = \"tap0\"", "af-xdp = \"veth0\""] {
        let _wire = enter_namespace_for(host);
        let filter = "tx-filter = \"deny udp dport 53; default allow\"";
        let (daemon, mut card) = capturing(&format!("{host}\n{filter}\n"));
        if host.starts_with("tap") {
            wait_for_carrier("tap0");
        }
        let file = daemon.path("capture");
        let (_, mut web) = datagram(40);
        web[36..38].copy_from_slice(&80_u16.to_be_bytes());
        let area = card.tx[0].buffer_area();
        for slot in 0..SLOTS {
            card.queue_tx(0, slot, &[0; HEADER], &web);
        }
        let mut child = start(&daemon, &["--count=5000", "-w", file.to_str().unwrap()]);
        card.tx[0].publish();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| flip_ports(&card.ram, area, SLOTS, &stop));
            let ring = &mut card.tx[0];
            while child.try_wait().unwrap().is_none() {
                if ring.recycle() > 0 {
                    ring.publish();
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
        end(child);
        let mut counts = [0, 0];
        for line in fields(&file, &[DIRECTION, "udp.dstport", "frame.comment"]) {
            if is_inbound(&line[0]) {
                continue;
            }
            let dropped = line[2].contains("filtered");
            let expected = if dropped { "53" } else { "80" };
            assert_eq!(line[1], expected, "{host}: {line:?}, {counts:?} before");
            counts[usize::from(dropped)] += 1;
        }
        assert!(counts[0] > 100 && counts[1] > 100, "{host}: {counts:?}");
    }
    note(64, "D or sent, and captured as it was checked");
}
