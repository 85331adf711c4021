//! Socket files: a second VMM on a socket, and files that are deleted or replaced.

use std::fs;
use std::io::{Error, ErrorKind, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};

use nix::sys::signal::Signal;

use crate::support::daemon::{Daemon, port};
use crate::support::driver::{Card, Options};
use crate::support::frontend::Frontend;
use crate::support::{SOON, eventually};

fn start() -> (Daemon, Card) {
    let port = port("one", "loopback = true");
    let daemon = Daemon::with_config(&format!("control = \"{{}}/control\"\n{port}"), "one");
    let card = Card::start(Frontend::new(daemon.connect_to("one")), Options::default());
    (daemon, card)
}

#[test]
fn second_vmm_is_reported_and_served_next() {
    let (daemon, mut card) = start();
    let process = std::process::id();
    assert_eq!(daemon.show("one")["vmm_process"], process);
    assert_eq!(daemon.show("one")["another_vmm_waits"], false);
    let second = daemon.connect_to("one");
    eventually("it is shown", || daemon.show("one")["another_vmm_waits"] == true);
    let said = format!("another VMM connected and waits served_process={process}");
    eventually("the log has the line", || daemon.log().contains(&said));
    assert!(daemon.ask(&["show", "one"]).contains("another VMM has connected and waits"));
    assert!(daemon.ask(&["show", "one"]).contains(&format!("process {process}")));
    // However many wait, the first is served on.
    let third = daemon.connect_to("one");
    card.check_echo(300);
    drop(card);
    let mut card = Card::start(Frontend::new(second), Options::default());
    card.check_echo(300);
    eventually("the third waits", || daemon.show("one")["another_vmm_waits"] == true);
    drop((card, third));
    eventually("the port waits for a VMM", || daemon.show("one")["state"] == "waiting");
}

#[test]
fn deleted_socket_file_is_recreated() {
    let (mut daemon, mut card) = start();
    let path = daemon.path("one");
    let access = || fs::symlink_metadata(&path).map(|file| (file.mode(), file.gid()));
    let before = access().unwrap();
    for _ in 0..2 {
        fs::remove_file(&path).unwrap();
        eventually("the socket file exists again", || path.exists());
        assert_eq!(access().unwrap(), before);
        card.check_echo(300);
        // The next VMM finds it, and waits for the first one to go.
        let next = daemon.connect_to("one");
        eventually("it waits", || daemon.show("one")["another_vmm_waits"] == true);
        drop(card);
        card = Card::start(Frontend::new(next), Options::default());
        card.check_echo(300);
    }
    eventually("the log has the line", || daemon.log().contains("socket file was deleted"));
    // A client that waits at the old socket is disconnected.
    let mut waits = daemon.connect_to("one");
    waits.set_read_timeout(Some(SOON)).unwrap();
    fs::remove_file(&path).unwrap();
    let heard = waits.read(&mut [0; 1]);
    let has_gone = |error: &Error| error.kind() == ErrorKind::ConnectionReset;
    assert!(heard.as_ref().map_or_else(has_gone, |bytes| *bytes == 0), "{heard:?}");
    card.check_echo(300);
    drop(card);
    // A port that is replaced, and one of the next daemon, have the new socket.
    eventually("no VMM is connected", || daemon.show("one")["state"] == "waiting");
    let more = port("one", "loopback = true\nqueue-pairs = 2");
    daemon.write_config(&format!("control = \"{{}}/control\"\n{more}"));
    daemon.ask(&["reload"]);
    let options = Options { pairs: 2, ..Options::default() };
    let mut card = Card::start(Frontend::new(daemon.connect_to("one")), options);
    card.check_echo(300);
    daemon.upgrade();
    card.check_echo(300);
    drop(card);
    Card::start(Frontend::new(daemon.connect_to("one")), options).check_echo(300);
}

#[test]
fn socket_deleted_before_port_change_is_recreated() {
    let file = |more: &str| {
        let port = port("one", &format!("loopback = true\nsocket-group = \"0\"\n{more}"));
        format!("control = \"{{}}/control\"\n{port}")
    };
    let mut daemon = Daemon::with_config(&file(""), "one");
    let path = daemon.path("one");
    let made_again = |daemon: &Daemon| {
        eventually("the socket file exists again", || path.exists());
        assert_eq!(fs::symlink_metadata(&path).unwrap().mode() & 0o777, 0o660);
        Card::start(Frontend::new(daemon.connect_to("one")), Options::default()).check_echo(300);
    };
    fs::remove_file(&path).unwrap();
    daemon.write_config(&file("queue-pairs = 2"));
    daemon.ask(&["reload"]);
    made_again(&daemon);
    fs::remove_file(&path).unwrap();
    daemon.upgrade();
    made_again(&daemon);
}

#[test]
fn deleted_control_and_metrics_sockets_are_recreated() {
    let port = port("one", "loopback = true");
    let sockets = "control = \"{}/control\"\nmetrics = \"{}/metrics\"\n";
    let mut daemon = Daemon::with_config(&format!("{sockets}{port}"), "one");
    let (control, metrics) = (daemon.path("control"), daemon.path("metrics"));
    for path in [&control, &metrics] {
        let mode = fs::symlink_metadata(path).unwrap().mode();
        fs::remove_file(path).unwrap();
        eventually("the socket file exists again", || UnixStream::connect(path).is_ok());
        assert_eq!(fs::symlink_metadata(path).unwrap().mode(), mode);
    }
    assert_eq!(daemon.show("one")["state"], "waiting");
    // The next daemon has the new ones.
    daemon.upgrade();
    assert_eq!(daemon.show("one")["state"], "waiting");
    assert!(UnixStream::connect(&metrics).is_ok());
}

#[test]
fn replaced_socket_file_is_reported_and_kept() {
    let (mut daemon, mut card) = start();
    let path = daemon.path("one");
    fs::remove_file(&path).unwrap();
    let others = UnixListener::bind(&path).unwrap();
    let hidden = || daemon.show("one")["explanation"].as_str().unwrap().contains("has replaced");
    eventually("the log has the line", hidden);
    eventually("the log has the line", || {
        daemon.log().contains("socket file was replaced by another")
    });
    card.check_echo(300);
    // It goes, and the port's comes back; then another one comes, which outlives the daemon.
    fs::remove_file(&path).unwrap();
    drop(others);
    eventually("the port is there again", || UnixStream::connect(&path).is_ok());
    eventually("the log has the line", || !hidden());
    fs::remove_file(&path).unwrap();
    let _others = UnixListener::bind(&path).unwrap();
    daemon.signal(Signal::SIGTERM);
    assert!(daemon.wait().success());
    assert!(fs::symlink_metadata(&path).unwrap().file_type().is_socket());
}

#[test]
fn directory_in_place_of_a_socket_is_kept() {
    let daemon = Daemon::spawn(&["--loopback", "--control={}.control", "--socket-path={}.d"]);
    let path = daemon.socket().with_extension("d");
    eventually("the daemon listens", || UnixStream::connect(&path).is_ok());
    // The path has a directory instead of a socket.
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    eventually("the log has the line", || daemon.log().contains("socket file was replaced"));
    fs::remove_dir(&path).unwrap();
    eventually("it is there again", || UnixStream::connect(&path).is_ok());
    eventually("the log has the line", || daemon.log().contains("it is made again"));
    assert_eq!(daemon.log().matches("socket file was").count(), 2, "{}", daemon.log());
}
