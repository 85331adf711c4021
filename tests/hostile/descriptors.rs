//! Cases 52, 75 and 76: exhausted descriptors.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use vhost::vhost_user::message::FrontendReq;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::support::daemon::{Daemon, port};
use crate::support::driver::{Card, Options};
use crate::support::frontend::{Frontend, region};
use crate::support::guest::Ram;
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
    // This client is connected before descriptors run out.
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
    // No thread sleeps: connected clients are served at once.
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

/// Shares memory regions, each of its own file, until the daemon refuses one. Returns the number of accepted
/// regions.
fn hog(daemon: &Daemon, port: &str) -> (Frontend, usize) {
    let mut frontend = Frontend::new(daemon.connect_to(port));
    frontend.begin();
    for number in 0..509 {
        let ram = Ram::new(number << 20, 0x1000);
        let payload = [vec![0; 8], region(&ram)].concat();
        match frontend.try_ask(FrontendReq::ADD_MEM_REG, &payload, &[ram.file.as_raw_fd()]) {
            Some(true) => {}
            Some(false) => return (frontend, number as usize),
            None => panic!("{port} was disconnected after {number} regions"),
        }
    }
    (frontend, 509)
}

/// Returns the value of a port's metric.
fn metric(daemon: &Daemon, name: &str, port: &str) -> usize {
    let start = format!("vhost_user_net_{name}{{port=\"{port}\"}} ");
    let metrics = daemon.ask(&["metrics"]);
    let found = metrics.lines().find_map(|line| line.strip_prefix(&start));
    found.unwrap_or_else(|| panic!("{start} is not in {metrics}")).parse().unwrap()
}

#[test]
fn hostile_52_no_vmm_takes_its_neighbours_descriptors() {
    needs_program!("hostile_52_no_vmm_takes_its_neighbours_descriptors", "prlimit");
    let ports = ["one", "two", "quiet"].map(|name| port(name, "loopback = true")).concat();
    let file = "control = \"{}/control\"\n".to_owned() + &ports;
    let limited = |most: usize| ["prlimit".to_owned(), format!("--nofile={most}:{most}")];
    let start = |most: usize| {
        let wrapper = limited(most);
        Daemon::with_config_under(&[&wrapper[0], &wrapper[1]], &file, "quiet")
    };
    let mut daemon = start(512);
    let quiet = || Card::start(Frontend::new(daemon.connect_to("quiet")), Options::default());
    let mut card = quiet();
    card.check_echo(100);
    let (one, first) = hog(&daemon, "one");
    let (two, second) = hog(&daemon, "two");
    assert!(first > 200 && second >= 8, "{first} and {second} regions were taken");
    assert_eq!(metric(&daemon, "vmm_descriptors", "one"), first);
    assert_eq!(metric(&daemon, "descriptors_refused_total", "one"), 1);
    assert!(daemon.log().contains("one: ADD_MEM_REG refused: the port would keep"));

    // The neighbour still has its share, and the daemon its reserve.
    card.check_echo(100);
    drop(card);
    let mut card = quiet();
    let events: Vec<_> = (0..4).map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect();
    for (event, code) in events
        .iter()
        .zip([FrontendReq::SET_VRING_CALL, FrontendReq::SET_VRING_ERR].into_iter().cycle())
    {
        (0..50).for_each(|_| card.frontend.event(code, 1, Some(event)));
    }
    card.check_echo(100);
    let clients: Vec<_> = (0..30).map(|_| daemon.connect_to("control")).collect();
    assert!(daemon.ask(&["list"]).contains("quiet"));
    drop(clients);
    let add = |daemon: &Daemon| {
        let socket = daemon.path("three");
        let socket = format!("--socket-path={}", socket.display());
        daemon.ctl(&["add", "--name=three", &socket, "--loopback"])
    };
    let refused = String::from_utf8(add(&daemon).stderr).unwrap();
    assert!(refused.contains("512 descriptors may be open, and the ports need"), "{refused}");

    // The reserve also suffices for a take-over, which replays all of this.
    daemon.upgrade();
    card.check_echo(100);
    drop((card, one, two));
    eventually("nothing is kept", || metric(&daemon, "vmm_descriptors", "one") == 0);
    assert!(add(&daemon).status.success());

    // The limit is too low for the shares of all ports. The daemon logs this, and serves ordinary guests.
    let daemon = start(100);
    eventually("it warns", || {
        daemon.log().contains("daemon: limit of open descriptors is low limit=100 needed=208")
    });
    let (_one, _) = hog(&daemon, "one");
    let (_two, _) = hog(&daemon, "two");
    let quiet = Frontend::new(daemon.connect_to("quiet"));
    Card::start(quiet, Options::default()).check_echo(100);
    assert!(daemon.ask(&["list"]).contains("quiet"));
    note(
        52,
        "R beyond what other ports' shares leave; a neighbour and operators always have theirs",
    );
}

#[test]
fn hostile_76_lost_descriptors_are_refused_not_misread() {
    needs_program!("hostile_76_lost_descriptors_are_refused_not_misread", "prlimit");
    let file = "control = \"{}/control\"\n".to_owned()
        + &["one", "two"].map(|name| port(name, "loopback = true")).concat();
    let daemon = Daemon::with_config(&file, "two");
    let mut card = Card::start(Frontend::new(daemon.connect_to("two")), Options::default());
    let says = |what: &str| eventually(what, || daemon.log().contains(what));
    let without_any = |attack: &mut dyn FnMut()| {
        limit(&daemon, daemon.lowest_free_descriptor());
        attack();
        limit(&daemon, 1024);
    };

    let mut frontend = Frontend::new(daemon.connect_to("one"));
    frontend.begin();
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    without_any(&mut || {
        let ring = 0u64.to_ne_bytes();
        let answer = frontend.try_ask(FrontendReq::SET_VRING_CALL, &ring, &[event.as_raw_fd()]);
        assert_eq!(answer, None, "the connection is closed");
    });
    says("one: connection closed: descriptors of a message are lost: Too many open files");
    let mut frontend = Frontend::new(daemon.connect_to("one"));
    frontend.begin();
    without_any(&mut || assert!(frontend.get_inflight_fd(2, 256).is_none()));
    says(
        "one: connection closed: GET_INFLIGHT_FD: cannot make an inflight buffer: Too many open files",
    );
    card.check_echo(100);

    // A take-over is refused, and the ports run on.
    let mut client = daemon.connect_to("control");
    let mut ask = |request: &str| {
        client
            .write_all(format!("{{\"version\":1,\"command\":\"{request}\"}}\n").as_bytes())
            .unwrap();
        let (mut line, mut byte) = (Vec::new(), [0]);
        while byte != *b"\n" {
            client.read_exact(&mut byte).unwrap();
            line.extend(byte);
        }
        String::from_utf8(line).unwrap()
    };
    assert!(ask("list").contains("two"));
    without_any(&mut || {
        let refused = ask("hand-over");
        assert!(refused.contains("Too many open files"), "{refused}");
    });
    card.check_echo(100);

    // The helper process cannot pass a new port's socket until descriptors are free.
    daemon.write_config(&(file.clone() + &port("three", "loopback = true")));
    without_any(&mut || {
        daemon.signal(Signal::SIGHUP);
        says("the helper process cannot pass descriptors: descriptors of a message are lost");
        says("failures=1");
    });
    daemon.signal(Signal::SIGHUP);
    eventually("the port is added", || daemon.ask(&["list"]).contains("three"));
    card.check_echo(100);
    note(76, "R: the sender is disconnected, a take-over or reload refused; all others run on");
}
