//! Ports that are added, changed and removed under the traffic of other ports.

use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::Signal;

use crate::support::daemon::{Daemon, port};
use crate::support::driver::{Card, HEADER, Options};
use crate::support::frontend::Frontend;
use crate::support::network::{
    Wire, enter_namespace_with_tap, enter_namespace_with_veth, ip, output, silence_kernel,
    wait_for_carrier,
};
use crate::support::traffic::{check_both_ways, frame, tcp_frame};
use crate::support::{eventually, needs_root, one_at_a_time};

const CONTROL: &str = "control = \"{}/control\"\n";

fn loopback(name: &str) -> String {
    port(name, "loopback = true")
}

fn operated(ports: &str, last: &str) -> Daemon {
    Daemon::with_config(&(CONTROL.to_owned() + ports), last)
}

fn card(daemon: &Daemon, port: &str) -> Card {
    Card::start(Frontend::new(daemon.connect_to(port)), Options::default())
}

/// Adds a loopback port with `ctl`.
fn add(daemon: &Daemon, name: &str) {
    let socket = format!("--socket-path={}", daemon.path(name).display());
    daemon.ask(&["add", "--name", name, &socket, "--loopback"]);
}

/// Sends SIGHUP, and waits until the log has the n-th reload.
fn reload(daemon: &Daemon, times: usize) {
    daemon.signal(Signal::SIGHUP);
    eventually("the file is read again", || {
        daemon.log().matches("reload: finished ").count()
            + daemon.log().matches("no port changed").count()
            == times
    });
}

#[test]
fn sixty_four_ports_run_while_others_come_and_go() {
    let _busy = one_at_a_time();
    let names: Vec<String> = (0..64).map(|number| format!("p{number}")).collect();
    let ports: String = names.iter().map(|name| loopback(name)).collect();
    let daemon = operated(&ports, "p63");
    let mut cards: Vec<Card> = names.iter().map(|name| card(&daemon, name)).collect();
    cards.iter_mut().for_each(|card| card.check_echo(100));
    let (_, threads, _) = daemon.resources();
    // The main thread and the log's.
    assert_eq!(threads, 64 * 2 + 2);
    let kilobytes = daemon.private_kilobytes();
    println!("64 ports: {kilobytes} kB of private memory, {threads} threads");
    assert!(kilobytes < 4096 + 63 * 300, "{kilobytes} kB");
    daemon.check_idle(std::time::Duration::from_millis(5));

    let done = AtomicBool::new(false);
    let echoed: usize = std::thread::scope(|scope| {
        let (before, after) = cards.split_at_mut(32);
        let echo = |cards: &mut [Card]| {
            let mut rounds = 0;
            while !done.load(Ordering::Relaxed) || rounds == 0 {
                // Panics if one frame is missing.
                cards.iter_mut().for_each(|card| card.check_echo(50));
                rounds += 1;
            }
            rounds
        };
        let traffic = [scope.spawn(move || echo(before)), scope.spawn(move || echo(after))];
        for round in 0..10 {
            for name in ["q0", "q1", "q2"] {
                add(&daemon, name);
                if round % 2 == 0 {
                    card(&daemon, name).check_echo(10);
                }
            }
            for name in ["q1", "q0", "q2"] {
                daemon.ask(&["remove", name]);
            }
        }
        done.store(true, Ordering::Relaxed);
        traffic.map(|thread| thread.join().unwrap()).iter().sum()
    });
    assert!(echoed > 0);
    assert_eq!(daemon.resources().1, threads, "a thread of a port that went is left");
    assert!(!daemon.path("q0").exists(), "a socket is left behind");
}

#[test]
fn reload_cannot_use_the_helper_s_own_descriptors() {
    let file = CONTROL.to_owned() + &loopback("stays");
    let daemon = Daemon::with_config(&file, "stays");
    let mut stays = card(&daemon, "stays");
    let odd = |fd| format!("[[port]]\nname = \"odd\"\nfd = {fd}\nloopback = true\n");
    // Its connection to the daemon is among them.
    for fd in 3..6 {
        daemon.write_config(&(file.clone() + &odd(fd)));
        reload(&daemon, fd - 2);
        let failed = daemon.log().matches("odd: not added: cannot use descriptor").count();
        assert_eq!(failed, fd - 2, "{}", daemon.log());
    }
    daemon.write_config(&(file + &loopback("new")));
    reload(&daemon, 4);
    card(&daemon, "new").check_echo(10);
    stays.check_echo(10);
}

#[test]
fn helper_inherits_no_unnamed_descriptor() {
    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    // The daemon's parent may leave descriptors open that no port names.
    let (left, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
    fcntl(&left, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    let file = CONTROL.to_owned() + &loopback("stays");
    let daemon = Daemon::with_config(&file, "stays");
    let number = left.as_raw_fd();
    let odd = format!("[[port]]\nname = \"odd\"\nfd = {number}\nloopback = true\n");
    daemon.write_config(&(file + &odd));
    reload(&daemon, 1);
    let refused = format!("odd: not added: cannot use descriptor {number} (--fd): ");
    assert!(daemon.log().contains(&refused), "{}", daemon.log());
}

#[test]
fn reload_touches_only_changed_ports() {
    let file = CONTROL.to_owned() + &loopback("stays") + &loopback("goes") + &loopback("slows");
    let daemon = Daemon::with_config(&file, "slows");
    let (mut stays, mut goes) = (card(&daemon, "stays"), card(&daemon, "goes"));
    let mut slows = card(&daemon, "slows");
    add(&daemon, "extra");
    for card in [&mut stays, &mut goes, &mut slows] {
        card.check_echo(50);
    }
    let limited = port("slows", "loopback = true\ntx-limit = \"10mbit\"");
    daemon.write_config(&(CONTROL.to_owned() + &loopback("stays") + &limited + &loopback("new")));
    reload(&daemon, 1);
    assert!(goes.frontend.is_closed());
    // Those that were not touched have their frontends still.
    stays.check_echo(50);
    slows.check_echo(50);
    card(&daemon, "new").check_echo(50);
    card(&daemon, "extra").check_echo(50);
    assert_eq!(daemon.show("slows")["tx_limit"], "10mbit,burst=16384");
    assert!(!daemon.path("goes").exists());
    let log = daemon.log();
    for line in ["reload slows: changed", "reload goes: removed", "reload new: added"] {
        assert!(log.contains(line), "{line}: {log}");
    }

    // Only the port whose option requires it is restarted.
    let mtu = port("slows", "loopback = true\nmtu = 1400");
    daemon.write_config(&(CONTROL.to_owned() + &loopback("stays") + &mtu));
    assert!(daemon.ask(&["reload"]).contains("slows: replaced, since mtu"));
    assert!(slows.frontend.is_closed());
    stays.check_echo(50);
    card(&daemon, "slows").check_echo(50);
    assert_eq!(daemon.ask(&["reload"]), "", "nothing has changed");
}

/// Options with their default values.
const DEFAULTS: [&str; 16] = [
    "queue-pairs = 1",
    "mtu = 1500",
    "anti-spoofing = false",
    "source-mac = []",
    "source-ip = []",
    "vlan = []",
    "tx-filter = \"none\"",
    "rx-filter = \"none\"",
    "tx-limit = \"none\"",
    "rx-limit = \"none\"",
    "link = true",
    "guest-tso = true",
    "ring-reset = false",
    "require-sealed-memory = false",
    "tx-method = \"auto\"",
    "tap-fd = []",
];

#[test]
fn explicit_defaults_change_nothing() {
    let daemon = operated(&loopback("one"), "one");
    let mut card = card(&daemon, "one");
    card.check_echo(20);
    let limit = daemon.show("one")["max_memory"].clone();
    let limit = format!("max-memory = \"{limit}\"");
    let lines = DEFAULTS.into_iter().chain([&*limit]);
    let all: Vec<&str> = lines.clone().collect();
    for line in lines.chain([&*all.join("\n")]) {
        let port = port("one", &format!("loopback = true\n{line}"));
        daemon.write_config(&(CONTROL.to_owned() + &port));
        assert_eq!(daemon.ask(&["reload"]), "", "{line}");
    }
    card.check_echo(20);
    // Nor does another way to write what is not the default.
    let written = [
        "cpu-affinity = \"0-1\"\nmax-memory = \"64g\"\ntx-limit = \"10mbit\"\nvlan = [7, 5]",
        "cpu-affinity = \"0,1\"\nmax-memory = \"65536m\"\ntx-limit = \"10mbit,burst=16384\"\nvlan = [5, 7, 5]",
    ];
    let rest = "loopback = true\nmac = \"52:54:00:00:00:0A\"\nanti-spoofing = true";
    let forms = written.map(|form| port("two", &format!("{rest}\n{form}")));
    for (form, said) in forms.iter().zip(["two: added\n", ""]) {
        daemon.write_config(&(CONTROL.to_owned() + &loopback("one") + form));
        assert_eq!(daemon.ask(&["reload"]), said, "{form}");
    }
}

#[test]
fn invalid_file_changes_nothing() {
    let daemon = operated(&loopback("one"), "one");
    let mut one = card(&daemon, "one");
    daemon.write_config("[[port]]\nsocket-path = \"x\"\ntup = \"y\"\n");
    reload(&daemon, 1);
    one.check_echo(50);
    assert!(daemon.log().contains(":3:1: unknown field `tup`"), "{}", daemon.log());
    assert_eq!(daemon.ctl(&["reload"]).status.code(), Some(1));
    assert!(daemon.log().contains("daemon: reload refused: "), "{}", daemon.log());
    // Nor is a port lost for another that can't be had; what can't change is said.
    let wrong = "log-level = \"debug\"\n".to_owned() + CONTROL + &loopback("one");
    let three = loopback("three");
    daemon.write_config(&(wrong + &port("two", "tap = \"lo\"") + &three));
    let output = daemon.ctl(&["reload"]);
    assert_eq!(output.status.code(), Some(1));
    // What was done is said too, and each failure on a line.
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "three: added\n");
    let text = String::from_utf8(output.stderr).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].contains("log-level: can't change while the daemon runs"), "{text}");
    assert!(lines[1].contains("two: not added: "), "{text}");
    assert_eq!(lines[2..], ["vhost-user-net: reload: done=1 failed=2"]);
    assert!(daemon.ask(&["list"]).ends_with("\ntwo is not started: the log says why\n"));
    one.check_echo(50);
    assert!(!daemon.path("two").exists(), "a socket is left behind");
}

#[test]
fn sandboxed_daemon_adds_a_tap_port() {
    needs_root!("sandboxed_daemon_adds_a_tap_port");
    enter_namespace_with_tap(true);
    let daemon = operated("", "control");
    assert!(daemon.ask(&["list"]).lines().count() == 1);
    assert!(!daemon.ask(&["metrics"]).contains("port="));
    let socket = format!("--socket-path={}", daemon.path("guest").display());
    let words = ["add", &socket, "--tap=tap0", "--queue-pairs=2", "--mac=52:54:00:00:00:01"];
    assert!(daemon.ask(&words).contains("tap tap0"));
    let wire = Wire::open("tap0");
    check_both_ways(&wire, &mut card(&daemon, "guest"), 200);
    // Its device is free again at once.
    daemon.ask(&["remove", "tap0"]);
    daemon.ask(&words);
    check_both_ways(&wire, &mut card(&daemon, "guest"), 200);
    for (words, said) in [
        (&["add", &socket, "--tap=tap0"][..], "port tap0 already exists; remove it first"),
        (&["add", &socket, "--tap=tap1"], "guest belongs to port tap0; name another"),
        (&["add", "--connect=/tmp/x", "--tap=tap0", "--name=b"], "tap tap0 belongs to port tap0"),
        (&["add", "--connect=/tmp/x", "--loopback", "--name=tap0"], "port tap0 already exists"),
        (&["add", "--connect=/tmp/x", "--af-xdp=lo"], "sandbox forbids AF_XDP"),
        (&["add", "--connect=/tmp/x"], "specify exactly one of tap"),
        (&["remove", "tap1"], "no port \"tap1\""),
    ] {
        let output = daemon.ctl(words);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{words:?}: {text}");
        assert!(text.contains(said), "{words:?}: {text}");
    }
    daemon.ask(&["add", "--connect=/tmp/x", "--tap=tap7"]);
    let log = daemon.log();
    assert!(log.contains("tap tap7: created; removed on exit"), "{log}");
    assert!(!log.contains("tap tap0: created"), "{log}");
    check_both_ways(&wire, &mut card(&daemon, "guest"), 200);
}

#[test]
fn af_xdp_port_is_added_beside_another() {
    needs_root!("af_xdp_port_is_added_beside_another");
    enter_namespace_with_veth(2);
    // What is sent comes to the first queue; by its hash, which differs from boot to boot, it may not.
    output("ethtool", "-L veth1 tx 1");
    let daemon = operated(&port("one", "af-xdp = \"veth0\""), "one");
    let mut one = card(&daemon, "one");
    let socket = format!("--socket-path={}", daemon.path("two").display());
    daemon.ask(&["add", "--name=two", &socket, "--af-xdp=veth0,queue=1"]);
    let mut two = card(&daemon, "two");
    let wire = Wire::open("veth1");
    two.send(0, &frame(1, 100));
    assert_eq!(wire.receive(1000), Some(frame(1, 100)));
    daemon.ask(&["remove", "two"]);
    check_both_ways(&wire, &mut one, 100);
}

#[test]
fn link_down_stops_traffic_until_link_up() {
    needs_root!("link_down_stops_traffic_until_link_up");
    enter_namespace_with_tap(false);
    let daemon = operated(&port("one", "tap = \"tap0\""), "one");
    let wire = Wire::open("tap0");
    let mut card = card(&daemon, "one");
    check_both_ways(&wire, &mut card, 50);
    daemon.ask(&["set", "one", "--link=off"]);
    assert!(output("ip", "link show tap0").contains("NO-CARRIER"));
    card.send(0, &frame(7, 100));
    let dropped = || daemon.show("one")["queue_pairs"][0]["tx"]["dropped"]["link_down"] == 1;
    eventually("the frame is dropped", dropped);
    let _ = wire.try_send(&frame(8, 100));
    assert_eq!(wire.receive(100).filter(|seen| *seen == frame(7, 100)), None);
    assert!(card.try_receive(0).is_none());
    assert!(daemon.ask(&["show", "one"]).contains("an operator has set the link down"));
    daemon.ask(&["set", "one", "--link=on"]);
    assert!(!output("ip", "link show tap0").contains("NO-CARRIER"));
    check_both_ways(&wire, &mut card, 50);
}

#[test]
fn anti_spoofing_changes_under_traffic() {
    let daemon = operated(&port("one", "loopback = true\nmac = \"52:54:00:00:00:01\""), "one");
    let mut card = card(&daemon, "one");
    // Its frames come from an address that is not the card's.
    card.check_echo(20);
    daemon.ask(&["set", "one", "--anti-spoofing=on"]);
    card.queue_tx(0, 0, &[0; HEADER], &frame(1, 100));
    card.tx[0].publish();
    let dropped = || daemon.show("one")["queue_pairs"][0]["tx"]["dropped"]["spoofed_mac"] == 1;
    eventually("the frame is dropped", dropped);
    assert_eq!(daemon.show("one")["options"]["anti-spoofing"], true);
    let refused = daemon.ctl(&["set", "one", "--anti-spoofing=off", "--vlan=7"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("require anti-spoofing"));
    daemon.ask(&["set", "one", "--source-mac=02:00:00:00:00:05,02:00:00:00:00:06"]);
    daemon.ask(&["set", "one", "--source-mac=none", "--anti-spoofing=off"]);
    card.recycle(0);
    card.check_echo(20);
}

#[test]
fn refused_set_changes_nothing() {
    needs_root!("refused_set_changes_nothing");
    enter_namespace_with_tap(false);
    let daemon = operated(&port("one", "tap = \"tap0\"\nmac = \"52:54:00:00:00:01\""), "one");
    let before = daemon.show("one");
    // Without its device no filter can be set.
    ip("link delete tap0");
    let words = [
        "set",
        "one",
        "--anti-spoofing=on",
        "--link=off",
        "--tx-filter=deny arp; default allow",
        "--tx-limit=10mbit",
        "--rx-filter=deny udp; default allow",
    ];
    let refused = daemon.ctl(&words);
    let text = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{text}");
    assert!(text.contains("cannot set rx-filter"), "{text}");
    assert!(text.contains("the port is unchanged"), "{text}");
    let after = daemon.show("one");
    for key in ["link", "tx_filter", "rx_filter", "tx_limit", "options"] {
        assert_eq!(after[key], before[key], "{key}");
    }
    assert!(!daemon.log().contains("set by an operator"), "{}", daemon.log());
}

#[test]
fn daemon_with_other_user_adds_ports() {
    needs_root!("daemon_with_other_user_adds_ports");
    enter_namespace_with_tap(false);
    let file = "user = \"nobody\"\n".to_owned() + CONTROL + &loopback("one");
    let daemon = Daemon::with_config(&file, "one");
    daemon.write_config(&(file + &port("two", "tap = \"tap0\"")));
    reload(&daemon, 1);
    check_both_ways(&Wire::open("tap0"), &mut card(&daemon, "two"), 100);
}

#[test]
fn helper_process_ends_with_its_daemon() {
    let mut daemon = operated(&loopback("one"), "one");
    let children = format!("/proc/{0}/task/{0}/children", daemon.process());
    let children = std::fs::read_to_string(children).unwrap();
    let opener = children.trim().to_owned();
    let command = || std::fs::read_to_string(format!("/proc/{opener}/cmdline")).unwrap_or_default();
    assert!(command().contains("opener"), "{children:?}");
    daemon.kill();
    // A zombie has no command line.
    eventually("it ends", || command().is_empty());
}

#[test]
fn deleted_tap_is_reopened_when_recreated() {
    needs_root!("deleted_tap_is_reopened_when_recreated");
    enter_namespace_with_tap(false);
    let file = CONTROL.to_owned() + &port("one", "tap = \"tap0\"") + &loopback("two");
    let daemon = Daemon::with_config(&file, "two");
    let (mut one, mut two) = (card(&daemon, "one"), card(&daemon, "two"));
    check_both_ways(&Wire::open("tap0"), &mut one, 50);
    for round in 1..=3 {
        ip("link delete tap0");
        eventually("it is degraded", || daemon.show("one")["state"] == "degraded");
        assert!(daemon.ask(&["metrics"]).contains("{port=\"one\",state=\"degraded\"} 1"));
        // The daemon did not create this TAP, so its creator sets it up.
        std::thread::sleep(std::time::Duration::from_millis(1200));
        assert!(!output("ip", "link show tap0").contains("tap0: <"));
        ip("tuntap add dev tap0 mode tap vnet_hdr");
        ip("link set tap0 up");
        eventually("the frontend is disconnected", || one.frontend.is_closed());
        let added = || daemon.log().matches("one: replaced; its VMM reconnects").count() == round;
        eventually("the daemon listens again", added);
        one = card(&daemon, "one");
        check_both_ways(&Wire::open("tap0"), &mut one, 50);
        two.check_echo(50);
    }
}

#[test]
fn tap_survives_down_up_rename_and_namespace_move() {
    needs_root!("tap_survives_down_up_rename_and_namespace_move");
    enter_namespace_with_tap(false);
    let daemon = Daemon::start(&["--tap=tap0"]);
    let mut card = Card::start(Frontend::new(daemon.connect()), Options::default());
    check_both_ways(&Wire::open("tap0"), &mut card, 50);
    ip("link set tap0 down");
    card.send(0, &frame(1, 100));
    ip("link set tap0 up");
    check_both_ways(&Wire::open("tap0"), &mut card, 50);
    ip("link set tap0 down");
    ip("link set tap0 name other");
    ip("link set other up");
    check_both_ways(&Wire::open("other"), &mut card, 50);
    // To a namespace of another process, where it is set up again.
    let mut child =
        std::process::Command::new("unshare").args(["--net", "sleep", "60"]).spawn().unwrap();
    let process = child.id();
    let namespace = |process: u32| std::fs::read_link(format!("/proc/{process}/ns/net")).unwrap();
    let ours = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
    eventually("it has a namespace of its own", || namespace(process) != ours);
    ip(&format!("link set other netns {process}"));
    let file = std::fs::File::open(format!("/proc/{process}/ns/net")).unwrap();
    nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
    silence_kernel();
    ip("link set other up");
    check_both_ways(&Wire::open("other"), &mut card, 50);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn replaced_port_uses_its_new_options() {
    needs_root!("replaced_port_uses_its_new_options");
    enter_namespace_with_tap(true);
    ip("tuntap add dev tap1 mode tap vnet_hdr");
    ip("link set tap1 up");
    let one = |rest: &str| CONTROL.to_owned() + &port("one", rest);
    let daemon = operated(&port("one", "tap = \"made0\""), "one");
    let change = |file: &str| {
        eventually("no VMM is connected", || daemon.show("one")["state"] == "waiting");
        daemon.write_config(file);
        daemon.ask(&["reload"])
    };
    let check = |tap: &str| {
        // One that the daemon has made has its carrier from the start.
        if tap != "made0" {
            wait_for_carrier(tap);
        }
        check_both_ways(&Wire::open(tap), &mut card(&daemon, "one"), 50);
    };
    // A TAP that the daemon has made gets the new MTU.
    change(&one("tap = \"made0\"\nmtu = 9000"));
    assert!(output("ip", "link show made0").contains("mtu 9000"));
    check("made0");
    let filter = "rx-filter = \"deny udp; default allow\"";
    change(&one(&format!("tap = \"tap0\"\n{filter}")));
    assert!(output("ip", "link show made0").contains("does not exist"));
    check("tap0");
    // More pairs than before, and fewer; the socket's group.
    let socket = || std::fs::metadata(daemon.path("one")).unwrap();
    let before = (socket().gid(), socket().mode());
    change(&one(&format!("tap = \"tap0\"\nqueue-pairs = 2\n{filter}\nsocket-group = \"1\"")));
    assert_eq!((socket().gid(), socket().mode() & 0o777), (1, 0o660));
    check("tap0");
    let resources = daemon.resources();
    change(&one(&format!("tap = \"tap0\"\n{filter}")));
    assert_eq!((socket().gid(), socket().mode()), before);
    check("tap0");
    eventually("no VMM is connected", || daemon.show("one")["state"] == "waiting");
    assert_eq!(daemon.resources().1 + 1, resources.1, "a thread is left");
    // Another name, on the same socket, while a VMM is connected.
    let mut vmm = card(&daemon, "one");
    check_both_ways(&Wire::open("tap0"), &mut vmm, 50);
    let socket = daemon.path("one").display().to_string();
    let named = |name: &str, rest: &str| {
        format!("{CONTROL}[[port]]\nname = \"{name}\"\nsocket-path = \"{socket}\"\n{rest}\n")
    };
    daemon.write_config(&named("two", &format!("tap = \"tap0\"\n{filter}")));
    assert_eq!(daemon.ask(&["reload"]), "two: replaced, since it was called one\n");
    assert!(vmm.frontend.is_closed());
    check("tap0");
    daemon.write_config(&one(&format!("tap = \"tap0\"\n{filter}")));
    eventually("no VMM is connected", || daemon.show("two")["state"] == "waiting");
    daemon.ask(&["reload"]);
    // One port gets what another gives up, in whatever order they stand.
    change(&(one("tap = \"tap0\"") + &port("three", "tap = \"tap1\"")));
    let said = change(&(one("tap = \"tap1\"") + &port("three", "loopback = true")));
    assert!(said.contains("one: replaced") && said.contains("three: replaced"), "{said}");
    check("tap1");
    // The released TAP has no filter any more.
    change(&(one("tap = \"tap1\"") + &port("three", "tap = \"tap0\"")));
    wait_for_carrier("tap0");
    check_both_ways(&Wire::open("tap0"), &mut card(&daemon, "three"), 50);
    check("tap1");
}

#[test]
fn replaced_tap_port_has_its_own_filter_and_queues() {
    needs_root!("replaced_tap_port_has_its_own_filter_and_queues");
    crate::support::network::enter_quiet_namespace();
    ip("tuntap add dev tap0 mode tap vnet_hdr multi_queue");
    ip("link set tap0 up");
    let one = |rest: &str| CONTROL.to_owned() + &port("one", &format!("tap = \"tap0\"\n{rest}"));
    let filter = "rx-filter = \"deny tcp dport 7; default allow\"";
    let daemon =
        Daemon::with_config(&one(&format!("queue-pairs = 2\nbusy-poll = 0\n{filter}")), "one");
    let wire = Wire::open("tap0");
    let flow = |source: u16, destination: u16| {
        let (_, mut bytes) = tcp_frame(100, 1448);
        bytes[34..36].copy_from_slice(&source.to_be_bytes());
        bytes[36..38].copy_from_slice(&destination.to_be_bytes());
        bytes
    };
    // Frames for the guest before it has spoken: the kernel has steered no flow yet.
    let received = |denied: usize| {
        let frontend = Frontend::new(daemon.connect_to("one"));
        let mut vmm = Card::start(frontend, Options { pairs: 2, ..Options::default() });
        wait_for_carrier("tap0");
        (0..32).for_each(|source| wire.send(&flow(1000 + source, 9)));
        (0..8).for_each(|source| wire.send(&flow(1000 + source, 7)));
        let mut count = 0;
        eventually("all flows reach the guest", || {
            for pair in 0..2 {
                while vmm.try_receive(pair).is_some() {
                    count += 1;
                }
            }
            count >= 40 - denied
        });
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!((0..2).all(|pair| vmm.try_receive(pair).is_none()), "denied frames came");
        assert_eq!(count, 40 - denied);
    };
    received(8);
    let change = |rest: &str| {
        eventually("no VMM is connected", || daemon.show("one")["state"] == "waiting");
        daemon.write_config(&one(rest));
        assert!(daemon.ask(&["reload"]).starts_with("one: replaced, since "));
    };
    // Queues that this guest does not use.
    change(&format!("queue-pairs = 4\nbusy-poll = 0\n{filter}"));
    received(8);
    change("queue-pairs = 4\nbusy-poll = 5");
    received(0);
}
