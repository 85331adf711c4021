//! Start and exit of the daemon, and reconnects of its frontends.

use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use vhost::vhost_user::message::FrontendReq;

use crate::support::daemon::Daemon;
use crate::support::driver::{Card, Options};
use crate::support::frontend::Frontend;
use crate::support::{eventually, needs_program, needs_root};

#[test]
fn inherited_listening_socket_is_served_and_kept() {
    let directory =
        vmm_sys_util::tempdir::TempDir::new_with_prefix("/tmp/vhost-user-net-test-").unwrap();
    let path = directory.as_path().join("theirs");
    let listener = UnixListener::bind(&path).unwrap();
    let mut daemon = Daemon::inheriting(&["--loopback", "--fd=5"], OwnedFd::from(listener), None);
    for _ in 0..3 {
        let stream = UnixStream::connect(&path).unwrap();
        Card::start(Frontend::new(stream), Options::default()).check_echo(50);
    }
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().code(), Some(0));
    assert!(path.exists());
}

#[test]
fn inherited_connection_is_served_until_it_ends() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut daemon = Daemon::inheriting(&["--loopback", "--fd=5"], OwnedFd::from(theirs), None);
    Card::start(Frontend::new(ours), Options::default()).check_echo(50);
    assert_eq!(daemon.wait().code(), Some(0));
}

#[test]
fn client_mode_reconnects_repeatedly() {
    let mut daemon = Daemon::spawn(&["--loopback", "--connect={}"]);
    let path = daemon.socket();
    let complaints = || daemon.log().matches("cannot connect to ").count();
    for round in 0..5 {
        eventually("the absence is logged", || complaints() == round + 1);
        let listener = UnixListener::bind(&path).unwrap();
        let (stream, _) = listener.accept().unwrap();
        let mut card = Card::start(Frontend::new(stream), Options::default());
        card.check_echo(50);
        drop((card, listener));
        std::fs::remove_file(&path).unwrap();
    }
    eventually("the last absence is logged", || complaints() == 6);
    // It looks twice a second at most.
    daemon.check_idle(Duration::from_millis(5));
    assert_eq!(complaints(), 6, "and once only");
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().code(), Some(0));
    assert!(!path.exists());
}

#[test]
fn signal_under_load_stops_daemon_within_a_second() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut daemon = Daemon::start(&["--loopback"]);
        let mut card = Card::start(Frontend::new(daemon.connect()), Options::default());
        card.check_echo(50);
        for slot in 0..200 {
            card.queue_tx(0, slot, &[0; 12], &[slot as u8; 100]);
        }
        card.tx[0].publish();
        let started = Instant::now();
        daemon.signal(signal);
        assert_eq!(daemon.wait().code(), Some(0));
        assert!(started.elapsed() < Duration::from_secs(1));
        assert!(!daemon.socket().exists());
        // The next daemon resumes at the used index: each frame comes back once.
        let mut next = Daemon::start(&["--loopback"]);
        card.resume(Frontend::new(next.connect()));
        for slot in 0..200u8 {
            assert_eq!(card.receive(0)[12..], [slot; 100]);
        }
        assert!(card.try_receive(0).is_none());
        assert!(next.is_alive());
    }
}

#[test]
fn signal_during_a_partial_message_stops_daemon() {
    let mut daemon = Daemon::start(&["--loopback"]);
    let mut frontend = Frontend::new(daemon.connect());
    frontend.get(FrontendReq::GET_FEATURES);
    frontend.send_raw(&[1, 0, 0]);
    let started = Instant::now();
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().code(), Some(0));
    assert!(started.elapsed() < Duration::from_secs(1));
}

#[test]
fn frontend_that_reads_no_replies_is_disconnected() {
    let daemon = Daemon::start(&["--loopback"]);
    let mut deaf = Frontend::new(daemon.connect());
    deaf.stream.set_nonblocking(true).unwrap();
    // Requests until nothing more fits: the daemon stops reading when its replies pile up.
    let request = crate::support::frontend::header(FrontendReq::GET_FEATURES.into(), 1, 0);
    let started = Instant::now();
    while started.elapsed() < Duration::from_millis(300) {
        let _ = std::io::Write::write(&mut deaf.stream, &request);
    }
    eventually("it is cut off", || daemon.log().contains("s to read a reply"));
    assert_ne!(Frontend::new(daemon.connect()).get(FrontendReq::GET_FEATURES), 0);
}

#[test]
fn only_the_socket_group_may_connect() {
    needs_root!("only_the_socket_group_may_connect");
    let daemon = Daemon::start(&["--loopback", "--socket-group=daemon"]);
    let metadata = std::fs::metadata(daemon.socket()).unwrap();
    assert_eq!(metadata.permissions().mode() & 0o777, 0o660);
    let group = nix::unistd::Group::from_name("daemon").unwrap().unwrap();
    assert_eq!(metadata.gid(), group.gid.as_raw());
    let mut daemon = Daemon::spawn(&["--loopback", "--socket-group=nobody-at-all"]);
    assert_eq!(daemon.wait().code(), Some(1));
    assert!(daemon.log().contains("there is no group nobody-at-all"), "{}", daemon.log());
    assert!(!daemon.socket().exists());
}

#[test]
fn service_manager_is_told_ready_watchdog_and_stopping() {
    let directory =
        vmm_sys_util::tempdir::TempDir::new_with_prefix("/tmp/vhost-user-net-test-").unwrap();
    let path = directory.as_path().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let hear = || {
        let mut text = [0; 1024];
        let length = manager.recv(&mut text).unwrap();
        String::from_utf8(text[..length].to_vec()).unwrap()
    };
    let socket = format!("NOTIFY_SOCKET={}", path.display());
    let wrapper = ["env", &socket, "WATCHDOG_USEC=400000"];
    let mut daemon = Daemon::start_under(&wrapper, &["--loopback"]);
    assert_eq!(hear(), "READY=1\nSTATUS=serving 1 port");
    // Each 200 ms, and no more often under traffic.
    let started = Instant::now();
    for _ in 0..5 {
        assert_eq!(hear(), "WATCHDOG=1");
        Card::start(Frontend::new(daemon.connect()), Options::default()).check_echo(50);
    }
    let time = started.elapsed();
    assert!((Duration::from_millis(700)..Duration::from_secs(2)).contains(&time), "{time:?}");
    daemon.signal(Signal::SIGTERM);
    let mut last = hear();
    while last == "WATCHDOG=1" {
        last = hear();
    }
    assert_eq!(last, "STOPPING=1");
    assert_eq!(daemon.wait().code(), Some(0));
}

#[test]
fn unresponsive_service_manager_delays_nothing() {
    let directory =
        vmm_sys_util::tempdir::TempDir::new_with_prefix("/tmp/vhost-user-net-test-").unwrap();
    let path = directory.as_path().join("notify");
    let socket = format!("NOTIFY_SOCKET={}", path.display());
    let wrapper = ["env", &socket, "WATCHDOG_USEC=2000"];
    let nobody = Daemon::start_under(&wrapper, &["--loopback"]);
    assert!(nobody.log().contains("service manager: cannot connect to "), "{}", nobody.log());
    // One whose queue is full all the time.
    let _deaf = UnixDatagram::bind(&path).unwrap();
    let mut daemon = Daemon::start_under(&wrapper, &["--loopback"]);
    std::thread::sleep(Duration::from_millis(500));
    Card::start(Frontend::new(daemon.connect()), Options::default()).check_echo(50);
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().code(), Some(0));
}

#[test]
fn systemd_activated_socket_is_served() {
    needs_program!("systemd_activated_socket_is_served", "systemd-socket-activate");
    let wrapper = ["systemd-socket-activate", "--listen", "{}"];
    let mut daemon = Daemon::start_under(&wrapper, &["--loopback", "--fd=3"]);
    for _ in 0..3 {
        Card::start(Frontend::new(daemon.connect()), Options::default()).check_echo(50);
    }
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().code(), Some(0));
    assert!(daemon.socket().exists(), "it is the service manager's");
}

#[test]
fn descriptor_limit_is_raised_to_the_hard_limit() {
    let limited = "ulimit -S -n 64; ulimit -H -n 512; exec \"$0\" \"$@\"";
    let daemon = Daemon::start_under(&["sh", "-c", limited], &["--loopback"]);
    let limits = format!("/proc/{}/limits", daemon.process());
    let limits = std::fs::read_to_string(limits).unwrap();
    let files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert_eq!(files.split_whitespace().nth(3), Some("512"), "{files}");
}
