//! AF_XDP zero copy in a virtual machine, whose emulated NIC's driver supports it. The daemon serves a test
//! driver on that NIC. The machine's second NIC is the other end of the wire.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::daemon::{Daemon, program};
use crate::support::driver::{Card, MRG_RXBUF, Options};
use crate::support::frontend::Frontend;
use crate::support::network::{Wire, ip};
use crate::support::traffic::{Check, check_both_ways, check_reset, flood_frame, frame};
use crate::support::{eventually, needs_program, needs_root, one_at_a_time};

/// Starts the daemon on the NIC with zero copy.
fn start() -> Daemon {
    for device in ["eth0", "eth1"] {
        ip(&format!("link set {device} promisc on"));
        ip(&format!("link set {device} up"));
    }
    Daemon::start(&["--af-xdp=eth0,mode=zero-copy"])
}

// The tests inside_… run only inside the machine, which has such a NIC.

#[test]
#[ignore = "runs inside the machine that the tests of this module start"]
fn inside_frames_pass_both_ways() {
    for features in [Options::default().features, Options::default().features & !MRG_RXBUF] {
        let daemon = start();
        let log = daemon.log();
        assert!(log.contains("queues 0-0, zero-copy mode"), "{log}");
        assert!(log.contains("attached, native"), "{log}");
        // A buffer takes what the device may write, whole pages of it.
        let options = Options { features, huge: true, buffer: 4096, ..Options::default() };
        let mut card = Card::start(Frontend::new(daemon.connect()), options);
        card.send(0, &[0; 5]);
        let wire = Wire::open("eth1");
        // Some cards lose their link for a moment when a queue is set up.
        eventually("a first frame arrives", || {
            wire.send(&frame(0, 60));
            std::thread::sleep(Duration::from_millis(20));
            card.try_receive(0).is_some()
        });
        eventually("a first frame is sent", || {
            card.send(0, &frame(0, 60));
            wire.receive(20).is_some()
        });
        std::thread::sleep(Duration::from_millis(500));
        while wire.receive(50).is_some() || card.try_receive(0).is_some() {}
        check_both_ways(&wire, &mut card, 1000);
        drop((wire, card));
        eventually("the expected count appears", || {
            daemon.log().matches("eth0/0: tx ").count() == 2
        });
        let log = daemon.log();
        let rx = log.lines().rfind(|line| line.contains("eth0/0: rx ")).unwrap();
        let number = |text: &str| text.split(' ').next().unwrap().parse::<u64>().unwrap();
        let frames = number(rx.split("rx ").nth(1).unwrap());
        let copied = rx.split(", ").find(|part| part.contains("copied")).map_or(0, number);
        // Only buffers at a huge page's border do not suit.
        assert!(frames >= 1000 && copied * 10 < frames, "{rx}");
        assert!(!log.contains("this is a bug"), "{log}");
    }
}

#[test]
#[ignore = "runs inside the machine that the tests of this module start"]
fn inside_nothing_is_written_after_guest_reset() {
    let daemon = start();
    let options = Options { huge: true, buffer: 4096, ..Options::default() };
    let mut card = Card::start(Frontend::new(daemon.connect()), options);
    card.send(0, &[0; 5]);
    let wire = Wire::open("eth1");
    let mut sent = 0..;
    // Never more than the guest has buffers for: igb of Linux 6.18 to 7.3 takes old descriptors
    // for new ones when it has run out of buffers at the end of its ring, and QEMU lets frames that
    // a card had no buffers for be overtaken.
    let mut send = || sent.by_ref().take(48).for_each(|number| wire.send(&flood_frame(number)));
    let mut check = Check::in_any_order();
    for _ in 0..100 {
        let wanted = check.received + 20;
        eventually("frames arrive", || {
            send();
            let sent = Instant::now();
            while check.received < wanted && sent.elapsed() < Duration::from_millis(200) {
                check.take(&mut card, 0);
            }
            check.received >= wanted
        });
        send();
        check_reset(&mut card, &mut check, 20);
    }
    assert!(!daemon.log().contains("this is a bug"), "{}", daemon.log());
    assert!(!daemon.log().contains("reopening the socket"), "{}", daemon.log());
}

/// Neither emulated NIC supports flow rules: igb's driver lists rules, and refuses a new one.
#[test]
#[ignore = "runs inside the machine that the tests of this module start"]
fn inside_nic_without_flow_rules_is_refused() {
    ip("link set eth0 up");
    let output = program()
        .args(["--socket-path=/tmp/refused", "--af-xdp=eth0,steer=mac", "--mac=52:54:00:aa:bb:cc"])
        .output()
        .unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8(output.stderr).unwrap();
    for part in ["52:54:00:aa:bb:cc", "queue 0 of eth0", "the driver takes no such rule"] {
        assert!(text.contains(part), "{text}");
    }
}

/// With a generic program a driver would still bind for zero copy, but pass no frames to the socket.
#[test]
#[ignore = "runs inside the machine that the tests of this module start"]
fn inside_generic_xdp_program_disables_zero_copy() {
    ip("link set eth0 up");
    let daemon = Daemon::start(&["--af-xdp=eth0,attach=generic"]);
    let log = daemon.log();
    assert!(log.contains("copy mode, since the XDP program does not run in the driver"), "{log}");
}

fn run_with(nic: &str) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("qemu/run-in-zero-copy-machine");
    let tests = std::env::current_exe().unwrap();
    let daemon = program().get_program().to_owned();
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    let output = Command::new(script)
        .env("NIC", nic)
        .env("TIMEOUT", "300")
        .args([tests.as_os_str(), &daemon])
        .args(["--", "env"])
        .arg(format!("VHOST_USER_NET=/work/{}", name(Path::new(&daemon))))
        .arg(format!("/work/{}", name(&tests)))
        .args(["zero_copy::inside_", "--ignored", "--nocapture", "--test-threads=1"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("4 passed"), "{text}\n{error}");
}

#[test]
fn virtio_net_frames_are_not_copied() {
    needs_root!("virtio_net_frames_are_not_copied");
    needs_program!("virtio_net_frames_are_not_copied", "qemu-system-x86_64");
    let _alone = one_at_a_time();
    run_with("virtio");
}

#[test]
fn igb_frames_are_not_copied() {
    needs_root!("igb_frames_are_not_copied");
    needs_program!("igb_frames_are_not_copied", "qemu-system-x86_64");
    let _alone = one_at_a_time();
    run_with("igb");
}
