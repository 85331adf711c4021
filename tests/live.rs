//! What operators may change, and ask, of a port while its guest's traffic runs: filters, and whom
//! the guest speaks to. By the library: a device and its worker in this process.

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use vhost_user_net::config::{AfXdp, Attach, Mode, TxMethod};
use vhost_user_net::device::Device;
use vhost_user_net::features::{Offer, OfferOptions};
use vhost_user_net::net_config::NetConfig;
use vhost_user_net::policy::{Limit, Limiter, Limits, LiveFilter};
use vhost_user_net::port::af_xdp::Interface;
use vhost_user_net::port::tap::TapQueue;
use vhost_user_net::port::{HostQueue, RxFilter};
use vhost_user_net::protocol::{Connection, Event, Reply};
use vhost_user_net::sandbox::Sandbox;
use vhost_user_net::sys::tap::Queue;
use vhost_user_net::traffic::{Row, Traffic, Way};
use vhost_user_net::worker::{Worker, WorkerOptions};

use crate::support::driver::{Card, HEADER, Options};
use crate::support::frontend::Frontend;
use crate::support::network::{
    Wire, enter_namespace_with_tap, enter_namespace_with_veth, wait_for_carrier,
};
use crate::support::traffic::datagram;
use crate::support::{eventually, needs_root};

/// A port in this process, and a guest on it.
struct Port {
    card: Option<Card>,
    wire: Wire,
    tx: Arc<LiveFilter>,
    rx: RxFilter,
    traffic: Traffic,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// A queue of a device in a fresh namespace, and its wire.
fn queue(kind: &str) -> (HostQueue, Wire) {
    let none = "none".parse().unwrap();
    if kind == "tap" {
        enter_namespace_with_tap(false);
        let queues = vec![Queue::open("tap0", false).unwrap()];
        let queue = TapQueue::prepare(queues, TxMethod::Writev, &none).unwrap().remove(0);
        return (HostQueue::Tap(Box::new(queue)), Wire::open("tap0"));
    }
    enter_namespace_with_veth(1);
    let options = AfXdp {
        name: "veth0".into(),
        queue: 0,
        mode: Mode::Auto,
        attach: Attach::Auto,
        steer: false,
    };
    let queues = Interface::start(&options, 1, 1500, None, Duration::ZERO, &none);
    let queue = queues.unwrap_or_else(|error| panic!("{error}")).remove(0);
    (HostQueue::AfXdp(Box::new(queue)), Wire::open("veth1"))
}

/// Carries out what a frontend asks for, until it has gone.
fn serve(mut device: Device, stream: UnixStream, stop: &AtomicBool) {
    stream.set_nonblocking(true).unwrap();
    let mut connection = Connection::new(stream).unwrap();
    while !stop.load(Ordering::Relaxed) {
        let message = match connection.receive() {
            Ok(Event::Message(message)) => message,
            Ok(Event::Pending) => {
                std::thread::sleep(Duration::from_micros(100));
                continue;
            }
            Ok(Event::Closed) | Err(_) => break,
        };
        let (code, need_reply) = (message.code, message.need_reply);
        let reply = device.handle(message).unwrap_or_else(|refusal| panic!("{refusal}"));
        let acknowledgement = (need_reply && device.acknowledges()).then_some(Reply::U64(0));
        if let Some(reply) = reply.or(acknowledgement) {
            connection.send(code, &reply).unwrap();
        }
    }
    device.forget();
}

impl Port {
    fn start(kind: &str) -> Self {
        let (queue, wire) = queue(kind);
        let (tx, tally) = (Arc::<LiveFilter>::default(), Arc::default());
        let (rx, traffic) = (queue.rx_filter(), queue.traffic(Arc::clone(&tally)));
        let unlimited = || Limiter::new(&Limit::default());
        let options = OfferOptions { guest_segmentation: true, mac: false, ring_reset: false };
        let offer = Offer::new(queue.offloads(), options);
        let options = WorkerOptions {
            name: "live/0".into(),
            cpu: None,
            busy_poll: Duration::ZERO,
            limits: Arc::new(Limits { rx: unlimited(), tx: unlimited() }),
            tx_filter: tx.clone(),
            tally,
            sandbox: Sandbox::NONE,
        };
        let worker = Worker::start(queue, options).unwrap();
        let config = NetConfig { mac: Default::default(), queue_pairs: 1, mtu: 1500 };
        let device = Device::new("live".into(), offer, config, vec![worker]);
        let (ours, theirs) = UnixStream::pair().unwrap();
        let stop = Arc::<AtomicBool>::default();
        let stopped = stop.clone();
        let thread = Some(std::thread::spawn(move || serve(device, ours, &stopped)));
        let mut card = Card::start(Frontend::new(theirs), Options::default());
        card.send(0, &[0; 5]);
        if kind == "tap" {
            wait_for_carrier("tap0");
        }
        Port { card: Some(card), wire, tx, rx, traffic, stop, thread }
    }

    fn card(&mut self) -> &mut Card {
        self.card.as_mut().unwrap()
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.card = None;
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().unwrap().join();
        assert!(ended.is_ok() || std::thread::panicking());
    }
}

/// A datagram to a port, from and to these hosts of 192.0.2.0/24.
fn to_port(port: u16, from: u8, to: u8) -> Vec<u8> {
    let (_, mut bytes) = datagram(40);
    bytes[36..38].copy_from_slice(&port.to_be_bytes());
    (bytes[29], bytes[33]) = (from, to);
    bytes
}

#[test]
fn a_filter_changes_under_traffic() {
    needs_root!("a_filter_changes_under_traffic");
    for kind in ["tap", "af_xdp"] {
        let mut port = Port::start(kind);
        for round in 0..50_u16 {
            let (denied, allowed) = (1000 + round, 1000 + (round + 1) % 50);
            let filter: vhost_user_net::policy::Filter =
                format!("deny udp dport {denied}; default allow").parse().unwrap();
            port.tx.set(filter.clone());
            port.rx.set(&filter).unwrap();
            assert_eq!(*port.rx.get(), filter);
            let frames = [denied, allowed].map(|number| to_port(number, 2, 1));
            frames.iter().for_each(|frame| port.card().send(0, frame));
            assert_eq!(port.wire.receive_any(1000).unwrap(), frames[1], "{kind}: the first");
            frames.iter().for_each(|frame| port.wire.send(frame));
            assert_eq!(port.card().receive(0)[HEADER..], frames[1], "{kind}: the first");
        }
        port.tx.set("none".parse().unwrap());
        port.rx.set(&"none".parse().unwrap()).unwrap();
        for number in 1000..1050 {
            let frame = to_port(number, 2, 1);
            port.card().send(0, &frame);
            assert_eq!(port.wire.receive_any(1000).unwrap(), frame);
            port.wire.send(&frame);
            assert_eq!(port.card().receive(0)[HEADER..], frame);
        }
    }
}

/// Rows as words, with frames and bytes.
fn shown(rows: Vec<Row>) -> BTreeMap<String, (u64, u64)> {
    let row = |Row { key, volume }: Row| {
        let protocol = key.protocol.map_or("other".into(), |protocol| protocol.to_string());
        let peer = key.peer.map_or("-".into(), |peer| peer.to_string());
        (format!("{:?} {protocol} {peer}", key.way), (volume.frames, volume.bytes))
    };
    rows.into_iter().map(row).collect()
}

#[test]
fn whom_a_guest_speaks_to_is_counted_while_somebody_asks() {
    needs_root!("whom_a_guest_speaks_to_is_counted_while_somebody_asks");
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
                port.card().send(0, frame);
                port.wire.receive_any(1000).unwrap();
            }
            let mut ipv6 = arp.clone();
            ipv6[12..22].copy_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0, 0, 10, 6, 64]);
            ipv6[22..38]
                .copy_from_slice(&"2001:db8::7".parse::<std::net::Ipv6Addr>().unwrap().octets());
            for frame in [to_port(53, 1, 2), to_port(54, 1, 2), to_port(53, 4, 2), ipv6, arp] {
                port.wire.send(&frame);
                port.card().receive(0);
            }
        };
        exchange(&mut port);
        port.traffic.enable(true).unwrap();
        assert!(port.traffic.snapshot().unwrap().is_empty());
        exchange(&mut port);
        let expected = [
            ("Rx arp -", (1, 82)),
            ("Rx tcp 2001:db8::7", (1, 82)),
            ("Rx udp 192.0.2.1", (2, 164)),
            ("Rx udp 192.0.2.4", (1, 82)),
            ("Tx arp -", (1, 82)),
            ("Tx icmp 192.0.2.9", (2, 168)),
            ("Tx udp 192.0.2.1", (2, 164)),
        ];
        let expected = BTreeMap::from(expected.map(|(words, volume)| (words.to_owned(), volume)));
        eventually("all is counted", || {
            shown(port.traffic.snapshot().unwrap()).values().map(|(frames, _)| frames).sum::<u64>()
                >= 10
        });
        assert_eq!(shown(port.traffic.snapshot().unwrap()), expected, "{kind}");
        // Beside a filter, what it denies is not counted.
        port.rx.set(&"deny udp dport 53; default allow".parse().unwrap()).unwrap();
        port.wire.send(&to_port(53, 1, 2));
        port.wire.send(&to_port(54, 1, 2));
        port.card().receive(0);
        eventually("it is counted", || {
            shown(port.traffic.snapshot().unwrap())["Rx udp 192.0.2.1"].0 == 3
        });
        port.rx.set(&"none".parse().unwrap()).unwrap();
        port.traffic.enable(false).unwrap();
        exchange(&mut port);
        assert!(port.traffic.snapshot().unwrap().is_empty());
        port.traffic.enable(true).unwrap();
        assert!(port.traffic.snapshot().unwrap().is_empty(), "it begins anew");
    }
}

#[test]
fn many_peers_are_no_more_rows_than_there_may_be() {
    needs_root!("many_peers_are_no_more_rows_than_there_may_be");
    for kind in ["tap", "af_xdp"] {
        let mut port = Port::start(kind);
        port.traffic.enable(true).unwrap();
        for number in 0..6000_u16 {
            let mut frame = to_port(53, 1, 2);
            frame[28..30].copy_from_slice(&number.to_be_bytes());
            port.wire.send(&frame);
            port.card().receive(0);
        }
        let rows = port.traffic.snapshot().unwrap();
        assert!(rows.len() <= 1024 && rows.len() > 500, "{kind}: {} rows", rows.len());
        assert!(rows.iter().all(|row| row.key.way == Way::Rx));
    }
}
