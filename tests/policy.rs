//! Rate limits of a guest, in each direction. Anti-spoofing is among the hostile cases.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::support::daemon::Daemon;
use crate::support::driver::{CSUM, Card, GUEST_CSUM, GUEST_TSO, HEADER, HOST_TSO, Options};
use crate::support::frontend::Frontend;
use crate::support::needs_root;
use crate::support::network::{Wire, enter_namespace_for};
use crate::support::traffic::{datagram, frame, tcp_frame};

/// Duration of the traffic.
const TIME: Duration = Duration::from_millis(700);

/// Traffic: `packets` packets of `bytes` bytes in total.
struct Traffic {
    packets: u64,
    bytes: u64,
}

/// The allowance of a limit: rate per second, and burst.
struct Allowed {
    per_second: f64,
    burst: f64,
}

impl Allowed {
    /// Checks that the traffic stayed below the limit, within one frame of `each`, and continued after the
    /// burst. The benchmark measures how exactly the rate is kept.
    #[track_caller]
    fn check(&self, passed: u64, each: u64, time: Duration) {
        self.check_most(passed, each, time);
        assert!((passed * each) as f64 > 2.0 * self.burst, "{passed} of {each}");
    }

    #[track_caller]
    fn check_most(&self, passed: u64, each: u64, time: Duration) {
        let most = self.per_second * time.as_secs_f64() + self.burst;
        let passed = (passed * each) as f64;
        // The last one may be larger than what was left.
        assert!(passed <= most + each as f64, "{passed} of {most}");
    }
}

const PORTS: [&str; 2] = ["--tap=tap0", "--af-xdp=veth0"];

/// Sends one frame repeatedly from a guest, as fast as possible. Returns the number of frames and the time.
fn send_all(card: &mut Card, header: &[u8], frame: &[u8]) -> (u64, Duration) {
    let area = card.tx[0].buffer_area();
    card.ram.write(area, header);
    card.ram.write(area + HEADER as u64, frame);
    let ring = &mut card.tx[0];
    while ring.add(&[(area, (HEADER + frame.len()) as u32)], false).is_some() {}
    ring.want_no_call();
    let started = Instant::now();
    ring.publish();
    let mut sent = 0;
    while started.elapsed() < TIME {
        let done = ring.recycle();
        sent += done as u64;
        if done > 0 {
            ring.want_no_call();
            ring.publish();
        }
        std::thread::sleep(Duration::from_micros(50));
    }
    (sent, started.elapsed())
}

#[test]
fn tx_limit_is_enforced() {
    needs_root!("tx_limit_is_enforced");
    let (plain, udp) = (vec![0; HEADER], datagram(1400).1);
    let (gso, tcp) = tcp_frame(60_000, 1448);
    let segments = 60_000_u64.div_ceil(1448);
    let whole = Traffic { packets: segments, bytes: tcp.len() as u64 + (segments - 1) * 54 };
    let small = Traffic { packets: 1, bytes: udp.len() as u64 };
    for option in PORTS {
        for (limit, per_second, burst) in [
            ("20mbit,burst=100k", 2.5e6, 1e5),
            ("400mbit", 50e6, 5e5),
            ("5kpps,packet-burst=50", 5000.0, 50.0),
        ] {
            for (header, frame, traffic) in [(&plain, &udp, &small), (&gso, &tcp, &whole)] {
                let _wire = enter_namespace_for(option);
                let daemon = Daemon::start(&[option, &format!("--tx-limit={limit}")]);
                let features = Options::default().features | CSUM | HOST_TSO;
                let options = Options { features, ..Options::default() };
                let mut card = Card::start(Frontend::new(daemon.connect()), options);
                let (sent, time) = send_all(&mut card, header, frame);
                let each = if limit.contains("bit") { traffic.bytes } else { traffic.packets };
                Allowed { per_second, burst }.check(sent, each, time);
            }
        }
    }
}

/// Sends the frame every `pause` to a guest that receives all frames, and repeats `beside` meanwhile, if any.
/// Returns the number of received frames and the time.
fn receive_all(
    card: &mut Card,
    (wire, frame, pause): (&Wire, &[u8], Duration),
    beside: Option<&(dyn Fn() + Sync)>,
) -> (u64, Duration) {
    let stop = AtomicBool::new(false);
    let (mut received, started) = (0, Instant::now());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let _ = wire.try_send(frame);
                std::thread::sleep(pause);
            }
        });
        if let Some(step) = beside {
            let stop = &stop;
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    step();
                }
            });
        }
        while started.elapsed() < TIME {
            while card.try_receive(0).is_some() {
                received += 1;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        stop.store(true, Ordering::Relaxed);
    });
    (received, started.elapsed())
}

#[test]
fn rx_limit_is_enforced() {
    needs_root!("rx_limit_is_enforced");
    let frame = frame(7, 1000);
    for option in PORTS {
        for (limit, per_second, burst, each) in
            [("20mbit,burst=100k", 2.5e6, 1e5, 1000), ("5kpps,packet-burst=50", 5000.0, 50.0, 1)]
        {
            let wire = enter_namespace_for(option);
            let daemon = Daemon::start(&[option, &format!("--rx-limit={limit}")]);
            let mut card = Card::start(Frontend::new(daemon.connect()), Options::default());
            // More than the limit, and less than one CPU can send.
            let sent = (&wire, &*frame, Duration::from_micros(20));
            let (received, time) = receive_all(&mut card, sent, None);
            // What one turn finds on the wire passes together, and is paid for afterwards.
            let burst = burst + 64.0 * each as f64;
            Allowed { per_second, burst }.check(received, each, time);
        }
    }
}

/// The kernel writes the GSO header to guest memory, from where the daemon reads it.
#[test]
fn rx_limit_counts_segments_despite_rewritten_header() {
    needs_root!("rx_limit_counts_segments_despite_rewritten_header");
    let wire = enter_namespace_for("--tap=tap0");
    wire.has_header();
    let (header, frame) = tcp_frame(60_000, 1448);
    // Without `num_buffers`.
    let frame = [&header[..HEADER - 2], &frame].concat();
    let segments = 60_000_u64.div_ceil(1448);
    for erases in [false, true] {
        let daemon = Daemon::start(&["--tap=tap0", "--rx-limit=20kpps,packet-burst=50"]);
        let features = Options::default().features | GUEST_CSUM | GUEST_TSO;
        // So few that each is written over while the kernel still copies the frame behind the header.
        let options = Options { features, size: 64, buffer: 66 << 10, ..Options::default() };
        let mut card = Card::start(Frontend::new(daemon.connect()), options);
        let (ram, first) = (card.ram.clone(), card.rx[0].buffer_area());
        let buffers = u64::from(options.size) * u64::from(options.buffer);
        let erase = || {
            let places = (first..first + buffers).step_by(options.buffer as usize);
            places.for_each(|place| ram.write(place, &[0; HEADER - 2]));
        };
        let beside: Option<&(dyn Fn() + Sync)> = if erases { Some(&erase) } else { None };
        let sent = (&wire, &*frame, Duration::from_micros(100));
        let (received, time) = receive_all(&mut card, sent, beside);
        let allowed = Allowed { per_second: 20e3, burst: 50.0 + 64.0 * segments as f64 };
        if erases {
            // Of a header that says nothing the worst is assumed.
            assert!(received > 0);
            allowed.check_most(received, segments, time);
        } else {
            allowed.check(received, segments, time);
        }
    }
}

#[test]
fn traffic_below_the_limit_is_not_delayed() {
    needs_root!("traffic_below_the_limit_is_not_delayed");
    let option = "--tap=tap0";
    let wire = enter_namespace_for(option);
    let limits = ["--tx-limit=1gbit,100kpps", "--rx-limit=1gbit,100kpps"];
    let daemon = Daemon::start(&[option, limits[0], limits[1]]);
    let mut card = Card::start(Frontend::new(daemon.connect()), Options::default());
    crate::support::traffic::check_both_ways(&wire, &mut card, 200);
}

#[test]
fn queue_pairs_share_one_limit() {
    let options = ["--loopback", "--queue-pairs=2", "--tx-limit=2kpps,packet-burst=10"];
    let daemon = Daemon::start(&options);
    let options = Options { pairs: 2, ..Options::default() };
    let mut card = Card::start(Frontend::new(daemon.connect()), options);
    for pair in 0..2 {
        for slot in 0..256 {
            card.queue_tx(pair, slot, &[0; HEADER], &[1; 60]);
        }
    }
    let started = Instant::now();
    card.tx.iter_mut().for_each(|ring| {
        ring.publish();
    });
    let mut done = 0;
    while done < 512 {
        for pair in 0..2 {
            while card.tx[pair].take_used().is_some() {
                done += 1;
            }
        }
        std::thread::sleep(Duration::from_micros(100));
        assert!(started.elapsed() < Duration::from_secs(10), "{done} frames only");
    }
    // 502 of them at 2000 a second.
    assert!(started.elapsed() >= Duration::from_millis(250), "{:?}", started.elapsed());
}
