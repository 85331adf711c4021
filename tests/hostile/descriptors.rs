//! Cases 52, 75 and 76: descriptors that run out.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;

use vhost::vhost_user::message::FrontendReq;

use crate::support::daemon::{Daemon, port};
use crate::support::frontend::Frontend;
use crate::support::hostile::note;
use crate::support::network::enter_new_namespace;
use crate::support::{eventually, needs_program, needs_root, one_at_a_time};

/// Changes the daemon's soft limit of open descriptors.
fn limit(daemon: &Daemon, most: usize) {
    let (process, limit) = (format!("--pid={}", daemon.process()), format!("--nofile={most}:"));
    assert!(Command::new("prlimit").args([&process, &limit]).status().unwrap().success());
}

#[test]
fn hostile_75_failing_accept_neither_spins_nor_sleeps() {
    needs_root!("hostile_75_failing_accept_neither_spins_nor_sleeps");
    needs_program!("hostile_75_failing_accept_neither_spins_nor_sleeps", "prlimit");
    let _alone = one_at_a_time();
    enter_new_namespace();
    let address = "127.0.0.1:9123";
    let daemon = "control = \"{}/control\"\nmetrics = \"127.0.0.1:9123\"\n";
    let file =
        daemon.to_owned() + &port("one", "loopback = true") + &port("two", "loopback = true");
    let daemon = Daemon::with_config(&file, "two");
    let mut two = Frontend::new(daemon.connect_to("two"));
    assert_ne!(two.get(FrontendReq::GET_FEATURES), 0);
    // A client that is connected already.
    let mut client = daemon.connect_to("control");
    let mut list = || {
        client.write_all(b"{\"version\":1,\"command\":\"list\"}\n").unwrap();
        let mut byte = [0];
        while byte != *b"\n" {
            client.read_exact(&mut byte).unwrap();
        }
    };
    list();

    limit(&daemon, daemon.lowest_free_descriptor());
    let operators: Vec<_> = (0..3).map(|_| daemon.connect_to("control")).collect();
    let scrapes: Vec<_> = (0..3).map(|_| TcpStream::connect(address).unwrap()).collect();
    let waiting = daemon.connect_to("one");
    for name in ["one", "control socket", "metrics"] {
        let line = format!("{name}: cannot accept a connection: Too many open files");
        eventually(&line, || daemon.log().contains(&line));
    }
    daemon.check_idle(Duration::from_millis(10));
    // Nobody sleeps either: whoever is connected is served at once.
    let started = std::time::Instant::now();
    (0..50).for_each(|_| list());
    assert!(started.elapsed() < Duration::from_millis(500), "{:?}", started.elapsed());
    let log = daemon.log();
    assert_eq!(log.matches("cannot accept a connection").count(), 3, "{log}");

    limit(&daemon, 1024);
    drop((operators, scrapes));
    assert_ne!(Frontend::new(waiting).get(FrontendReq::GET_FEATURES), 0);
    assert!(daemon.ask(&["list"]).contains("one"));
    let mut scrape = TcpStream::connect(address).unwrap();
    scrape.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
    let mut reply = String::new();
    scrape.read_to_string(&mut reply).unwrap();
    assert!(reply.starts_with("HTTP/1.1 200 OK"), "{reply}");
    note(75, "tried every 200 ms; idle meanwhile, and nobody else waits");
}
