//! What a frame costs the daemon through a TAP, with DPDK's testpmd as the guest, against bare
//! loops that write and read the same frames on a TAP of their own.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost_user_net::guest::Segment;
use vhost_user_net::sys::process::pin_this_thread;
use vhost_user_net::sys::tap::Queue;
use vhost_user_net::sys::uring::Writer;

use super::{ROUNDS, median};
use crate::support::daemon::Daemon;
use crate::support::network::{Wire, enter_new_namespace, ip, output};
use crate::support::testpmd::Testpmd;

pub(super) const TIME: Duration = Duration::from_millis(1500);
pub(super) const BATCH: usize = 32;

/// Nanoseconds per frame, and frames per second.
#[derive(Clone, Copy)]
pub(super) struct Cost {
    pub(super) ns: f64,
    pub(super) rate: f64,
}

pub(super) fn medians(costs: Vec<Cost>) -> Cost {
    Cost {
        ns: median(costs.iter().map(|cost| cost.ns).collect()),
        rate: median(costs.iter().map(|cost| cost.rate).collect()),
    }
}

/// On-CPU nanoseconds of the calling thread.
fn own_time() -> u64 {
    let text = fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    text.split(' ').next().unwrap().parse().unwrap()
}

/// Runs `step`, which returns the frames it moved, for a while on processor 1.
pub(super) fn bare(mut step: impl FnMut() -> u64) -> Cost {
    pin_this_thread(1).unwrap();
    let (started, before, mut frames) = (Instant::now(), own_time(), 0);
    while started.elapsed() < TIME {
        for _ in 0..8 {
            frames += step();
        }
    }
    let cost = Cost {
        ns: (own_time() - before) as f64 / frames as f64,
        rate: frames as f64 / started.elapsed().as_secs_f64(),
    };
    pin_this_thread(0).unwrap();
    cost
}

/// An IPv4/UDP frame like testpmd's, for nobody on this host.
pub(super) fn frame(length: usize) -> Vec<u8> {
    let mut frame = vec![0; length];
    frame[..14].copy_from_slice(&[2, 0, 0, 0, 0, 0, 0x52, 0x54, 0, 0x77, 0, 2, 8, 0]);
    frame[14] = 0x45;
    frame[16..18].copy_from_slice(&((length - 14) as u16).to_be_bytes());
    frame[22..24].copy_from_slice(&[64, 17]);
    frame[26..34].copy_from_slice(&[198, 18, 0, 1, 198, 18, 0, 2]);
    frame[34..40].copy_from_slice(&[0, 9, 0, 9, 0, (length - 34).min(255) as u8]);
    frame
}

/// Frames that the device has taken from its reader (the guest), and given to it.
fn moved(device: &str) -> [u64; 2] {
    let text = output("ip", &format!("-s link show {device}"));
    let packets = |line: usize| {
        text.lines().nth(line).unwrap().split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    [packets(3), packets(5)]
}

/// What the daemon spends on each frame of the direction while traffic runs.
fn daemon_cost(daemon: &Daemon, direction: usize) -> Cost {
    std::thread::sleep(Duration::from_millis(300));
    let (started, cpu, frames) =
        (Instant::now(), daemon.cpu_nanoseconds(), moved("tap0")[direction]);
    std::thread::sleep(TIME);
    let cpu = daemon.cpu_nanoseconds() - cpu;
    let frames = (moved("tap0")[direction] - frames) as f64;
    Cost { ns: cpu as f64 / frames, rate: frames / started.elapsed().as_secs_f64() }
}

/// Floods the device from the host's side, on processor 0, until it is dropped.
struct Sender {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Sender {
    fn start(device: &str, length: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let wire = Wire::open(device);
        let frame = frame(length);
        let thread = std::thread::spawn(move || {
            pin_this_thread(0).unwrap();
            while !stopped.load(Ordering::Relaxed) {
                wire.flood(&frame);
            }
        });
        Sender { stop, thread: Some(thread) }
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

pub(super) fn row(name: &str, cost: Cost, peer: Option<(&str, Cost)>) {
    let ratio = peer.map(|(peer, other)| format!("{:.2} of {peer}", cost.ns / other.ns));
    println!(
        "  {name:<34} {:8.0} {:10.3}   {}",
        cost.ns,
        cost.rate / 1e6,
        ratio.unwrap_or_default()
    );
}

pub(super) fn run() {
    enter_new_namespace();
    fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap();
    pin_this_thread(0).unwrap();
    ip("tuntap add dev bare0 mode tap vnet_hdr");
    let queue = Queue::open("bare0", false).unwrap();
    queue.set_header_length(12).unwrap();
    ip("link set bare0 up");
    let mut file = File::from(queue.as_fd().try_clone_to_owned().unwrap());
    let mut writer = Writer::new(&queue).unwrap();
    let daemon = Daemon::start(&["--tap=tap0", "--cpu-affinity=1"]);
    let method = daemon.log().lines().find(|line| line.contains("tx by")).map(str::to_owned);
    println!("\n{}", method.unwrap_or_default());

    for length in [64, 1500 - 14] {
        println!("\ntap, frames of {length} bytes {:>22} {:>10}", "ns", "Mpps");
        let bytes = [&[0; 12][..], &frame(length)].concat();
        let mut costs = [vec![], vec![], vec![]];
        for _ in 0..ROUNDS {
            costs[0].push(bare(|| {
                file.write_all(&bytes).unwrap();
                1
            }));
            let segments = [Segment::of_bytes(&bytes)];
            let burst = [&segments[..]; BATCH];
            let mut results = [0; BATCH];
            costs[1].push(bare(|| {
                writer.write_all(&mut burst.into_iter(), &mut results).unwrap();
                BATCH as u64
            }));
            let mut testpmd = Testpmd::start_on(
                "0",
                &daemon.socket(),
                1,
                256,
                "mrg_rxbuf=1,in_order=0,packed_vq=0",
            );
            testpmd.command("set fwd txonly");
            testpmd.command(&format!("set txpkts {length}"));
            testpmd.command("start");
            costs[2].push(daemon_cost(&daemon, 0));
            testpmd.command("stop");
        }
        let [write, uring, tx] = costs.map(medians);
        row("bare write loop", write, None);
        row("bare io_uring loop, batches of 32", uring, None);
        row("vhost-user-net tx", tx, Some(("io_uring", uring)));

        let mut costs = [vec![], vec![]];
        for _ in 0..ROUNDS {
            {
                let _sender = Sender::start("bare0", length);
                let mut buffer = vec![0; 2048];
                costs[0].push(bare(|| match file.read(&mut buffer) {
                    Ok(_) => 1,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        let mut fds = [PollFd::new(queue.as_fd(), PollFlags::POLLIN)];
                        poll(&mut fds, PollTimeout::from(100u16)).unwrap();
                        0
                    }
                    Err(error) => panic!("{error}"),
                }));
            }
            let mut testpmd = Testpmd::start_on(
                "0",
                &daemon.socket(),
                1,
                1024,
                "mrg_rxbuf=1,in_order=0,packed_vq=0",
            );
            testpmd.command("set fwd rxonly");
            testpmd.command("start");
            let sender = Sender::start("tap0", length);
            costs[1].push(daemon_cost(&daemon, 1));
            drop(sender);
            testpmd.command("stop");
        }
        let [read, rx] = costs.map(medians);
        row("bare read loop", read, None);
        row("vhost-user-net rx", rx, Some(("read", read)));
    }
}
