//! What a frame costs the daemon through a TAP, with DPDK's testpmd as the guest, against bare
//! loops that write and read the same frames on a TAP of their own.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost_user_net::guest::Segment;
use vhost_user_net::sys::process::pin_this_thread;
use vhost_user_net::sys::tap::Queue;
use vhost_user_net::sys::uring::Writer;

use super::measure::{
    BATCH, GUEST, LENGTHS, bare, cost, frame, head, in_turns, receive_frames, received, row,
    send_frames, sent,
};
use crate::support::daemon::Daemon;
use crate::support::network::{Wire, enter_new_namespace, ip};
use crate::support::testpmd::Testpmd;

/// Floods the device from the host's side, on processor 0, until it is dropped.
pub(super) struct Sender {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Sender {
    pub(super) fn start(device: &str, length: usize) -> Self {
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
    let cpu = || daemon.cpu_nanoseconds();

    for length in LENGTHS {
        head(&format!("tap, frames of {length} bytes"));
        let bytes = [&[0; 12][..], &frame(length)].concat();
        let mut guest = Testpmd::start_on("0", &daemon.socket(), 1, 256, GUEST);
        send_frames(&mut guest, length);
        guest.pause();
        let [write, uring, tx] = in_turns([
            &mut || {
                bare(|| {
                    file.write_all(&bytes).unwrap();
                    1
                })
            },
            &mut || {
                let segments = [Segment::of_bytes(&bytes)];
                let burst = [&segments[..]; BATCH];
                let mut results = [0; BATCH];
                bare(|| {
                    writer.write_all(&mut burst.into_iter(), &mut results).unwrap();
                    BATCH as u64
                })
            },
            &mut || {
                guest.resume();
                let cost = cost(|| received("tap0"), cpu);
                guest.pause();
                cost
            },
        ]);
        drop(guest);
        row("bare write loop", &write, None);
        row("bare io_uring loop, batches of 32", &uring, None);
        row("vhost-user-net tx", &tx, Some(("io_uring", &uring)));

        let mut guest = Testpmd::start_on("0", &daemon.socket(), 1, 1024, GUEST);
        receive_frames(&mut guest);
        guest.pause();
        let [read, rx] = in_turns([
            &mut || {
                let _sender = Sender::start("bare0", length);
                let mut buffer = vec![0; 2048];
                bare(|| match file.read(&mut buffer) {
                    Ok(_) => 1,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        let mut fds = [PollFd::new(queue.as_fd(), PollFlags::POLLIN)];
                        poll(&mut fds, PollTimeout::from(100u16)).unwrap();
                        0
                    }
                    Err(error) => panic!("{error}"),
                })
            },
            &mut || {
                guest.resume();
                let sender = Sender::start("tap0", length);
                let cost = cost(|| sent("tap0"), cpu);
                drop(sender);
                guest.pause();
                cost
            },
        ]);
        row("bare read loop", &read, None);
        row("vhost-user-net rx", &rx, Some(("read", &read)));
    }
}
