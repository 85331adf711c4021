//! Metrics for Prometheus, and statistics of `ctl`.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;

use crate::support::daemon::{Daemon, port, program};
use crate::support::debian::unpacked;
use crate::support::driver::{Card, Options};
use crate::support::frontend::Frontend;
use crate::support::network::enter_new_namespace;
use crate::support::{needs_root, skip};

/// Sends a request. Returns the whole reply.
fn fetch(mut stream: impl Read + Write, request: &str) -> String {
    stream.write_all(request.as_bytes()).unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    reply
}

const GET: &str = "GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n";

fn carrying(control: &str) -> (Daemon, Card) {
    let file = control.to_owned() + "control = \"{}/control\"\n" + &port("one", "loopback = true");
    let daemon = Daemon::with_config(&file, "one");
    let mut card = Card::start(Frontend::new(daemon.connect_to("one")), Options::default());
    card.check_echo(49);
    // A kick that wakes the worker: it sleeps by now.
    std::thread::sleep(std::time::Duration::from_millis(50));
    card.check_echo(1);
    (daemon, card)
}

/// Returns the value of the metric whose line starts so.
fn value(metrics: &str, start: &str) -> f64 {
    let line = metrics.lines().find(|line| line.starts_with(start));
    let line = line.unwrap_or_else(|| panic!("{start} is not in {metrics}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[test]
fn prometheus_fetches_metrics_by_unix_socket_or_tcp() {
    needs_root!("prometheus_fetches_metrics_by_unix_socket_or_tcp");
    enter_new_namespace();
    let (daemon, _card) = carrying("metrics = \"{}/metrics\"\n");
    let unix = || UnixStream::connect(daemon.path("metrics")).unwrap();
    let reply = fetch(unix(), GET);
    assert!(reply.starts_with("HTTP/1.1 200 OK\r\n"), "{reply}");
    assert!(reply.contains("text/plain; version=0.0.4"), "{reply}");
    let body = reply.split_once("\r\n\r\n").unwrap().1;
    assert!(reply.contains(&format!("Content-Length: {}\r\n", body.len())));
    let tx = "{port=\"one\",queue=\"0\",direction=\"tx\"";
    assert_eq!(value(body, &format!("vhost_user_net_frames_total{tx}}}")), 50.0);
    assert_eq!(value(body, &format!("vhost_user_net_burst_chains_sum{tx}}}")), 50.0);
    assert_eq!(value(body, &format!("vhost_user_net_burst_chains_bucket{tx},le=\"64\"}}")), {
        value(body, &format!("vhost_user_net_burst_chains_count{tx}}}"))
    });
    let pair = "{port=\"one\",queue=\"0\"";
    assert!(value(body, &format!("vhost_user_net_kick_to_used_seconds_count{pair}}}")) >= 1.0);
    assert!(value(body, &format!("vhost_user_net_kick_to_used_seconds_sum{pair}}}")) < 10.0);
    assert!(value(body, &format!("vhost_user_net_busy_seconds_total{pair}}}")) > 0.0);
    assert!(value(body, &format!("vhost_user_net_idle_seconds_total{pair}}}")) > 0.0);
    assert!(value(body, &format!("vhost_user_net_sessions_total{pair}}}")) >= 1.0);
    assert_eq!(value(body, &format!("vhost_user_net_queue_mode{pair},mode=\"loopback\"}}")), 1.0);

    // Invalid requests get an error, and silent clients delay no other client.
    let silent: Vec<UnixStream> = (0..20).map(|_| unix()).collect();
    for (request, status) in [
        ("GET / HTTP/1.1\r\n\r\n", "404"),
        ("POST /metrics HTTP/1.1\r\n\r\n", "405"),
        ("\x16\x03\x01\r\n\r\n", "400"),
        (&format!("{:x<8192}", "GET /metrics HTTP/1.1\r\nX: "), "400"),
    ] {
        let reply = fetch(unix(), request);
        assert!(reply.starts_with(&format!("HTTP/1.1 {status} ")), "{request}: {reply}");
    }
    drop(silent);
    // A request may come in pieces.
    let mut slow = unix();
    for byte in GET.bytes() {
        slow.write_all(&[byte]).unwrap();
    }
    assert!(fetch(slow, "").starts_with("HTTP/1.1 200"));
    drop(daemon);

    let (_daemon, _card) = carrying("metrics = \"127.0.0.1:9560\"\n");
    let reply = fetch(TcpStream::connect("127.0.0.1:9560").unwrap(), GET);
    assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
    let mut output = program();
    let output =
        output.args(["--socket-path=x", "--loopback", "--metrics=192.0.2.1:9560"]).output();
    let said = String::from_utf8(output.unwrap().stderr).unwrap();
    assert!(said.contains("not a loopback address"), "{said}");
}

#[test]
fn promtool_accepts_metrics() {
    let promtool = match unpacked("prometheus") {
        Ok(package) => package.join("usr/bin/promtool"),
        Err(why) => return skip("promtool_accepts_metrics", &why),
    };
    let (daemon, _card) = carrying("");
    let mut promtool = Command::new(promtool)
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let metrics = daemon.ask(&["metrics"]);
    promtool.stdin.take().unwrap().write_all(metrics.as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.is_empty(), "{said}");
}

#[test]
fn stats_print_rates_under_traffic() {
    let (daemon, mut card) = carrying("");
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                card.check_echo(20);
            }
        });
        let rates = daemon.ask(&["--json", "stats", "--interval=0.3"]);
        let rates: Value = serde_json::from_str(&rates).unwrap();
        for key in ["rx_frames_per_second", "tx_bits_per_second", "kicks_per_second", "busy"] {
            assert!(rates[0][key].as_f64().unwrap() > 0.0, "{key} in {rates}");
        }
        done.store(true, Ordering::Relaxed);
    });
    let text = daemon.ask(&["stats", "one", "--interval=0.05"]);
    assert!(text.starts_with("NAME  RX-FRAMES/s"), "{text}");
    assert_eq!(daemon.ctl(&["stats", "nobody"]).status.code(), Some(1));
}
