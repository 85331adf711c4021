//! The control socket, and `vhost-user-net ctl` on it.

use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::daemon::{Daemon, port, program};
use crate::support::driver::{Card, HEADER, Options};
use crate::support::eventually;
use crate::support::frontend::Frontend;

/// Starts a daemon with a control socket and two ports.
fn operated() -> Daemon {
    let ports = port("one", "loopback = true") + &port("two", "loopback = true");
    Daemon::with_config(&("control = \"{}/control\"\n".to_owned() + &ports), "two")
}

#[test]
fn port_state_is_explained_in_words() {
    let daemon = operated();
    let state = |wanted: &str| {
        eventually(&format!("one is {wanted}"), || daemon.show("one")["state"] == wanted);
        daemon.show("one")["explanation"].as_str().unwrap().to_owned()
    };
    assert!(state("waiting").contains(daemon.path("one").to_str().unwrap()));
    let frontend = Frontend::new(daemon.connect_to("one"));
    assert!(state("connected").contains("has not started the device"));
    let mut card = Card::start(frontend, Options::default());
    assert!(state("running").contains("1 of 1 queue pairs"));
    card.check_echo(10);
    // A descriptor that points nowhere.
    card.tx[0].add(&[(u64::MAX - 5000, 100)], false);
    card.tx[0].publish();
    assert!(state("stopped").contains("queue pair 0"));
    assert!(daemon.ask(&["show", "one"]).starts_with("one: stopped: queue pair 0: "));
    drop(card);
    state("waiting");
    assert_eq!(daemon.show("two")["state"], "waiting");
    assert_eq!(daemon.show("one")["queue_pairs"][0]["fault"], Value::Null);
}

#[test]
fn counters_appear_in_ctl_and_metrics() {
    let daemon = operated();
    let mut card = Card::start(Frontend::new(daemon.connect_to("two")), Options::default());
    card.check_echo(50);
    card.send(0, &[0; 5]);
    let report = daemon.show("two");
    let pair = &report["queue_pairs"][0];
    assert_eq!((&pair["rx"]["frames"], &pair["tx"]["frames"]), (&50.into(), &50.into()));
    assert_eq!(pair["tx"]["dropped"]["too_short"], 1);
    assert_eq!(report["dropped"], 1);
    let list = daemon.ask(&["list"]);
    let line = list.lines().find(|line| line.starts_with("two")).unwrap();
    let words: Vec<&str> = line.split_whitespace().collect();
    assert_eq!(words[..7], ["two", "loopback", "running", "up", "50", "50", "1"], "{list}");
    let metrics = daemon.ask(&["metrics"]);
    for line in [
        "vhost_user_net_frames_total{port=\"two\",queue=\"0\",direction=\"tx\"} 50",
        "vhost_user_net_frames_total{port=\"one\",queue=\"0\",direction=\"tx\"} 0",
        "vhost_user_net_drops_total{port=\"two\",queue=\"0\",direction=\"tx\",reason=\"too_short\"} 1",
        "vhost_user_net_port_state{port=\"two\",state=\"running\"} 1",
        "vhost_user_net_port_state{port=\"one\",state=\"running\"} 0",
        "vhost_user_net_connections_total{port=\"one\"} 0",
    ] {
        assert!(metrics.lines().any(|it| it == line), "{line} is not in {metrics}");
    }
}

#[test]
fn limit_changes_under_traffic() {
    let daemon = operated();
    let mut card = Card::start(Frontend::new(daemon.connect_to("one")), Options::default());
    // One packet, and then nothing for long.
    let set = daemon.ask(&["set", "one", "--tx-limit=1pps,packet-burst=1"]);
    assert!(set.contains("1pps,packet-burst=1"), "{set}");
    let frames = 50;
    for slot in 0..frames {
        card.queue_tx(0, slot, &[0; HEADER], &[slot as u8; 60]);
    }
    card.tx[0].publish();
    std::thread::sleep(std::time::Duration::from_millis(300));
    let sent = || daemon.show("one")["tx_frames"].as_u64().unwrap();
    assert!(sent() <= 3, "{}", sent());
    daemon.ask(&["set", "one", "--tx-limit=none"]);
    eventually("the rest is sent", || sent() == frames);
    let said = "one: tx-limit set by an operator from=\"1pps,packet-burst=1\" to=\"none\"";
    assert!(daemon.log().contains(said), "{}", daemon.log());
}

#[test]
fn failed_commands_print_reason_and_exit_code() {
    let daemon = operated();
    let cases: [(&[&str], i32, &str); 4] = [
        (&["show", "nobody"], 1, "no port \"nobody\""),
        (&["set", "one", "--tx-limit=10"], 2, "'10' is not a limit"),
        (&["dance"], 2, "dance"),
        (&["--control=/nonexistent/socket", "list"], 3, "is the daemon started with --control?"),
    ];
    for (words, code, said) in cases {
        let output = if words[0].starts_with("--control") {
            program().arg("ctl").args(words).output().unwrap()
        } else {
            daemon.ctl(words)
        };
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.into_raw() >> 8, code, "{words:?}: {text}");
        assert!(text.contains(said) && text.lines().count() == 1, "{words:?}: {text}");
    }
}

#[test]
fn stuck_client_delays_no_other_client() {
    let daemon = operated();
    let mut flood = daemon.connect_to("control");
    // More replies with descriptors than a socket holds.
    let requests = "{\"version\": 1, \"command\": \"listeners\"}\n".repeat(2000);
    flood.set_nonblocking(true).unwrap();
    let _ = flood.write(requests.as_bytes());
    let start = Instant::now();
    assert!(daemon.ask(&["list"]).contains("two"));
    // The daemon waited for two seconds.
    assert!(start.elapsed() < Duration::from_millis(1500), "{:?}", start.elapsed());
    eventually("it is disconnected", || {
        daemon.log().contains("client disconnected: cannot pass descriptors")
    });
}
