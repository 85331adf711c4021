//! A daemon with several ports of one configuration file.

use std::fs;

use nix::sys::signal::Signal;

use crate::support::daemon::{Daemon, port, program};
use crate::support::driver::{Card, Options};
use crate::support::eventually;
use crate::support::frontend::Frontend;

fn two_ports() -> Daemon {
    let one = port("one", "loopback = true");
    Daemon::with_config(&(one + &port("two", "loopback = true")), "two")
}

fn card(daemon: &Daemon, port: &str) -> Card {
    Card::start(Frontend::new(daemon.connect_to(port)), Options::default())
}

#[test]
fn ports_are_served_and_end_independently() {
    let mut daemon = two_ports();
    let mut one = card(&daemon, "one");
    let mut two = card(&daemon, "two");
    one.check_echo(500);
    two.check_echo(500);
    drop(one);
    two.check_echo(500);
    card(&daemon, "one").check_echo(500);
    let log = daemon.log();
    for line in ["one: ready queue_pairs=1", "two: ready", "one: frontend disconnected"] {
        assert!(log.contains(line), "{line}: {log}");
    }
    // The one disconnect is of the connection that waited for the port to listen.
    assert_eq!(log.matches("two: frontend disconnected").count(), 1, "{log}");
    daemon.signal(Signal::SIGTERM);
    assert!(daemon.wait().success());
    for socket in ["one", "two"] {
        assert!(!daemon.path(socket).exists(), "{socket} is left behind");
    }
}

#[test]
fn additional_port_costs_little_memory() {
    let ports = |count: usize| {
        let port = |number| port(&format!("p{number}"), "loopback = true");
        let contents: String = (0..count).map(port).collect();
        let daemon = Daemon::with_config(&contents, &format!("p{}", count - 1));
        daemon.private_kilobytes()
    };
    let (one, many) = (ports(1), ports(33));
    assert!(one < 4096, "{one} kB with one port");
    assert!(many.saturating_sub(one) / 32 < 300, "{one} kB with one port, {many} kB with 33");
}

#[test]
fn config_errors_name_file_line_and_column() {
    let daemon = two_ports();
    let file = daemon.path("wrong");
    let cases = [
        ("[[port]]\nsocket-path = \"x\"\ntup = \"y\"\n", ":3:1: unknown field `tup`"),
        ("[defaults]\ntap = \"y\"\n", ":1:2: [defaults] can't name"),
        ("", ": no port, and no control socket"),
    ];
    for (contents, said) in cases {
        fs::write(&file, contents).unwrap();
        for arguments in [&["check-config"][..], &["run", "--config"]] {
            let output = program().args(arguments).arg(&file).output().unwrap();
            let text = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(2), "{text}");
            assert!(text.contains(&format!("{}{said}", file.display())), "{text}");
        }
    }
    let output = program().arg("check-config").arg(daemon.path("config")).output().unwrap();
    assert!(output.status.success());
    assert!(String::from_utf8(output.stdout).unwrap().contains("2 ports, nothing wrong"));
}

#[test]
fn duplicate_port_name_is_refused() {
    let daemon = two_ports();
    let file = daemon.path("same");
    let directory = daemon.directory().display();
    let port =
        |socket| format!("[[port]]\nsocket-path = \"{directory}/{socket}\"\nloopback = true\n");
    fs::write(&file, port("a") + &port("b")).unwrap();
    let output = program().args(["run", "--config"]).arg(&file).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text.contains("two ports have the name loopback; set name for one"), "{text}");
    eventually("no socket is left", || !daemon.path("a").exists());
}
