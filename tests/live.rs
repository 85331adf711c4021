//! Changes and queries of a port under traffic: filters, and the guest's peers.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

use serde_json::{Value, json};

use crate::support::daemon::{Daemon, port};
use crate::support::driver::{Card, HEADER, Options};
use crate::support::frontend::Frontend;
use crate::support::network::{Wire, enter_namespace_for, wait_for_carrier};
use crate::support::traffic::datagram;
use crate::support::{eventually, needs_root};

/// A port, its guest, and a client of the control socket.
struct Port {
    card: Card,
    wire: Wire,
    control: BufReader<UnixStream>,
    daemon: Daemon,
}

impl Port {
    fn start(kind: &str) -> Self {
        let host = if kind == "tap" { "tap = \"tap0\"" } else { "af-xdp = \"veth0\"" };
        let wire = enter_namespace_for(host);
        let file = "control = \"{}/control\"\n".to_owned() + &port("live", host);
        let daemon = Daemon::with_config(&file, "live");
        let mut card = Card::start(Frontend::new(daemon.connect_to("live")), Options::default());
        card.send(0, &[0; 5]);
        if kind == "tap" {
            wait_for_carrier("tap0");
        }
        let control = BufReader::new(daemon.connect_to("control"));
        Port { card, wire, control, daemon }
    }

    /// Sends a request. Returns the daemon's reply.
    #[track_caller]
    fn ask(&mut self, mut request: Value) -> Value {
        request["version"] = 1.into();
        writeln!(self.control.get_mut(), "{request}").unwrap();
        let mut line = String::new();
        self.control.read_line(&mut line).unwrap();
        let reply: Value = serde_json::from_str(&line).unwrap();
        assert!(reply["error"].is_null(), "{request}: {reply}");
        reply["ok"].clone()
    }

    fn set(&mut self, changes: Value) {
        self.ask(json!({"command": "set", "port": "live", "changes": changes}));
    }

    /// Returns the rows of peers as words, with frames and bytes.
    fn traffic(&mut self) -> BTreeMap<String, (u64, u64)> {
        let rows = self.ask(json!({"command": "traffic", "port": "live"}));
        let row = |row: &Value| {
            let word = |name: &str| row[name].as_str().unwrap_or("-").to_owned();
            let number = |name: &str| row[name].as_u64().unwrap();
            let words = format!("{} {} {}", word("way"), word("protocol"), word("peer"));
            (words, (number("frames"), number("bytes")))
        };
        rows.as_array().unwrap().iter().map(row).collect()
    }

    /// Replaces the client. Without a query of the new client, the daemon counts no peers.
    fn reconnect(&mut self) {
        self.control = BufReader::new(self.daemon.connect_to("control"));
        // The reply shows that the daemon has seen the old client disconnect.
        self.ask(json!({"command": "list"}));
    }
}

/// Builds a datagram to a port, between two hosts of 192.0.2.0/24.
fn to_port(port: u16, from: u8, to: u8) -> Vec<u8> {
    let (_, mut bytes) = datagram(40);
    bytes[36..38].copy_from_slice(&port.to_be_bytes());
    (bytes[29], bytes[33]) = (from, to);
    bytes
}

#[test]
fn filter_changes_under_traffic() {
    needs_root!("filter_changes_under_traffic");
    for kind in ["tap", "af_xdp"] {
        let mut port = Port::start(kind);
        for round in 0..50_u16 {
            let (denied, allowed) = (1000 + round, 1000 + (round + 1) % 50);
            let filter = format!("deny udp dport {denied}; default allow");
            port.set(json!({"tx-filter": filter, "rx-filter": filter}));
            assert_eq!(port.daemon.show("live")["rx_filter"], filter);
            let frames = [denied, allowed].map(|number| to_port(number, 2, 1));
            frames.iter().for_each(|frame| port.card.send(0, frame));
            assert_eq!(port.wire.receive_any(1000).unwrap(), frames[1], "{kind}: the first");
            frames.iter().for_each(|frame| port.wire.send(frame));
            assert_eq!(port.card.receive(0)[HEADER..], frames[1], "{kind}: the first");
        }
        port.set(json!({"tx-filter": "none", "rx-filter": "none"}));
        for number in 1000..1050 {
            let frame = to_port(number, 2, 1);
            port.card.send(0, &frame);
            assert_eq!(port.wire.receive_any(1000).unwrap(), frame);
            port.wire.send(&frame);
            assert_eq!(port.card.receive(0)[HEADER..], frame);
        }
    }
}

#[test]
fn peers_are_counted_while_a_client_asks() {
    needs_root!("peers_are_counted_while_a_client_asks");
    for kind in ["tap", "af_xdp"] {
        let mut port = Port::start(kind);
        let exchange = |port: &mut Port| {
            let mut ping = to_port(0, 2, 9);
            ping[23] = 1;
            let tagged = [&ping[..12], &[0x81, 0, 0, 7], &ping[12..]].concat();
            let mut arp = to_port(0, 2, 1);
            arp[12..14].copy_from_slice(&[8, 6]);
            let sent = [to_port(53, 2, 1), to_port(80, 2, 1), ping, tagged, arp.clone()];
            for frame in &sent {
                port.card.send(0, frame);
                port.wire.receive_any(1000).unwrap();
            }
            let mut ipv6 = arp.clone();
            ipv6[12..22].copy_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0, 0, 10, 6, 64]);
            ipv6[22..38]
                .copy_from_slice(&"2001:db8::7".parse::<std::net::Ipv6Addr>().unwrap().octets());
            for frame in [to_port(53, 1, 2), to_port(54, 1, 2), to_port(53, 4, 2), ipv6, arp] {
                port.wire.send(&frame);
                port.card.receive(0);
            }
        };
        exchange(&mut port);
        assert!(port.traffic().is_empty());
        exchange(&mut port);
        let expected = [
            ("rx arp -", (1, 82)),
            ("rx tcp 2001:db8::7", (1, 82)),
            ("rx udp 192.0.2.1", (2, 164)),
            ("rx udp 192.0.2.4", (1, 82)),
            ("tx arp -", (1, 82)),
            ("tx icmp 192.0.2.9", (2, 168)),
            ("tx udp 192.0.2.1", (2, 164)),
        ];
        let expected = BTreeMap::from(expected.map(|(words, volume)| (words.to_owned(), volume)));
        eventually("all is counted", || {
            port.traffic().values().map(|(frames, _)| frames).sum::<u64>() >= 10
        });
        assert_eq!(port.traffic(), expected, "{kind}");
        // Beside a filter, what it denies is not counted.
        port.set(json!({"rx-filter": "deny udp dport 53; default allow"}));
        port.wire.send(&to_port(53, 1, 2));
        port.wire.send(&to_port(54, 1, 2));
        port.card.receive(0);
        eventually("the expected count appears", || port.traffic()["rx udp 192.0.2.1"].0 == 3);
        port.set(json!({"rx-filter": "none"}));
        // Without a client nothing is counted, and the next client starts at zero.
        port.reconnect();
        exchange(&mut port);
        assert!(port.traffic().is_empty());
    }
}

#[test]
fn top_sorts_peers_by_traffic() {
    needs_root!("top_sorts_peers_by_traffic");
    let mut port = Port::start("tap");
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (daemon, card) = (&port.daemon, &mut port.card);
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                // Used when they are sent.
                (0..4).for_each(|_| card.send(0, &to_port(80, 2, 9)));
                card.send(0, &to_port(80, 2, 1));
            }
        });
        let looks = daemon.ask(&["--json", "top", "live", "--interval=0.2", "--count=1"]);
        let rows: Value = serde_json::from_str(&looks).unwrap();
        let peers: Vec<&str> =
            rows.as_array().unwrap().iter().map(|row| row["peer"].as_str().unwrap()).collect();
        assert_eq!(peers, ["192.0.2.9", "192.0.2.1"], "{rows}");
        assert!(rows[0]["frames_per_second"].as_f64().unwrap() > 0.0);
        let table = daemon.ask(&["top", "live", "--interval=0.1", "--count=2", "--rows=1"]);
        assert_eq!(table.matches("tx   udp       192.0.2.9").count(), 2, "{table}");
        assert_eq!(daemon.ctl(&["top", "nobody"]).status.code(), Some(1));
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    drop(port.wire);
}

#[test]
fn peer_table_is_bounded() {
    needs_root!("peer_table_is_bounded");
    for kind in ["tap", "af_xdp"] {
        let mut port = Port::start(kind);
        assert!(port.traffic().is_empty());
        for number in 0..6000_u16 {
            let mut frame = to_port(53, 1, 2);
            frame[28..30].copy_from_slice(&number.to_be_bytes());
            port.wire.send(&frame);
            port.card.receive(0);
        }
        let rows = port.traffic();
        assert!(rows.len() <= 1024 && rows.len() > 500, "{kind}: {} rows", rows.len());
        assert!(rows.keys().all(|row| row.starts_with("rx ")));
    }
}
