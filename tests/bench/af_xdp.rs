//! What a frame costs the daemon through AF_XDP on a veth, with DPDK's testpmd as the guest,
//! against bare loops on a veth of their own and against testpmd as the backend.

use std::fs;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost_user_net::config::Attach;
use vhost_user_net::port::af_xdp::program::Attachment;
use vhost_user_net::sys::link;
use vhost_user_net::sys::process::pin_this_thread;
use vhost_user_net::sys::umem::Umem;
use vhost_user_net::sys::xsk::{Binding, CHUNK, Descriptor, Registration, RingSizes, Socket};

use super::ROUNDS;
use super::tap::{BATCH, Cost, Sender, TIME, bare, frame, medians, row};
use crate::support::daemon::Daemon;
use crate::support::network::{enter_new_namespace, ip};
use crate::support::testpmd::Testpmd;

const GUEST: &str = "mrg_rxbuf=1,in_order=0,packed_vq=0";
const SIZES: RingSizes = RingSizes { rx: 1024, tx: 1024 };
const BUFFERS: u64 = 512;
/// Headers that a frame of two descriptors has in its first.
const HEADERS: usize = 64;

fn veth(name: &str) {
    ip(&format!("link add {name}0 type veth peer name {name}1"));
    ip(&format!("link set {name}0 up"));
    ip(&format!("link set {name}1 up"));
}

/// A socket on bare0, to which all its frames come.
struct Bare {
    socket: Socket,
    umem: Arc<Umem>,
    _attachment: Attachment,
}

impl Bare {
    fn new(multi_buffer: bool) -> Self {
        let link = link::find("bare0").unwrap();
        let attachment = Attachment::new("bare0", link.index, Attach::Native).unwrap();
        let umem = Arc::new(Umem::new(4 * (BUFFERS * u64::from(CHUNK)) as usize, &[], 0).unwrap());
        let registration = Registration::New { headroom: 0, metadata: false };
        let binding = Binding { device: link.index, queue: 0, zero_copy: false, multi_buffer };
        let started = Instant::now();
        loop {
            let mut socket = Socket::new(&umem, SIZES, &registration).unwrap();
            (0..BUFFERS).for_each(|buffer| socket.fill.stage(buffer * u64::from(CHUNK)));
            socket.fill.submit();
            match socket.bind(binding, &registration) {
                // The last one is being cleared away.
                Err(_) if started.elapsed().as_secs() < 1 => {}
                result => {
                    result.unwrap();
                    socket.set_send_buffer(4 << 20);
                    attachment.redirect(0, socket.descriptor()).unwrap();
                    return Bare { socket, umem, _attachment: attachment };
                }
            }
        }
    }

    /// Sends frames of `length` bytes in batches, from where `place` says the n-th is.
    fn send(&mut self, length: usize, place: Place) -> Cost {
        let half = BUFFERS * u64::from(CHUNK);
        let bytes = frame(length);
        for buffer in 0..BUFFERS {
            // Not at a page's start, as a guest's frames are.
            for start in [half, 2 * half] {
                let place = start + buffer * u64::from(CHUNK) + 76;
                self.umem.arena(place as usize, length).write(&bytes);
            }
        }
        let (mut next, socket) = (0u64, &mut self.socket);
        bare(|| {
            for _ in 0..BATCH {
                let at = (next % BUFFERS) * u64::from(CHUNK) + 76;
                next += 1;
                let whole = |address| Descriptor { address, length: length as u32, options: 0 };
                match place {
                    Place::There => socket.tx.stage(whole(half + at)),
                    Place::Copied => {
                        let from = self.umem.arena((half + at) as usize, length);
                        self.umem.arena((2 * half + at) as usize, length).copy_from(&from);
                        socket.tx.stage(whole(2 * half + at));
                    }
                    Place::TwoPieces => {
                        let from = self.umem.arena((half + at) as usize, HEADERS);
                        self.umem.arena((2 * half + at) as usize, HEADERS).copy_from(&from);
                        socket.tx.stage(Descriptor {
                            address: 2 * half + at,
                            length: HEADERS as u32,
                            options: Descriptor::CONTINUES,
                        });
                        let rest = HEADERS as u64;
                        socket.tx.stage(Descriptor {
                            address: half + at + rest,
                            length: (length - HEADERS) as u32,
                            options: 0,
                        });
                    }
                }
            }
            socket.tx.submit();
            while socket.tx.pending() > 0 {
                let _ = socket.send();
            }
            while socket.completion.take().is_some() {}
            socket.completion.release();
            BATCH as u64
        })
    }

    /// Receives what the sender sends.
    fn receive(&mut self, length: usize) -> Cost {
        let _sender = Sender::start("bare1", length);
        let socket = &mut self.socket;
        bare(|| {
            let mut frames = 0;
            while let Some(descriptor) = socket.rx.take() {
                socket.fill.stage(descriptor.address & ((1 << 48) - 1));
                frames += 1;
            }
            if frames == 0 {
                let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
                poll(&mut fds, PollTimeout::from(100u16)).unwrap();
            } else {
                socket.rx.release();
                socket.fill.submit();
            }
            frames
        })
    }
}

/// Where a frame is sent from.
#[derive(Clone, Copy)]
enum Place {
    /// Where it is.
    There,
    /// From a copy.
    Copied,
    /// Its headers from a copy, the rest from where it is.
    TwoPieces,
}

/// What a backend spends on each frame that the guest has sent (or received).
fn cost(guest: &mut Testpmd, counter: &str, cpu: impl Fn() -> u64) -> Cost {
    std::thread::sleep(std::time::Duration::from_millis(300));
    let (started, before, frames) = (Instant::now(), cpu(), guest.counter(counter));
    std::thread::sleep(TIME);
    let used = cpu() - before;
    let frames = (guest.counter(counter) - frames) as f64;
    Cost { ns: used as f64 / frames, rate: frames / started.elapsed().as_secs_f64() }
}

/// The same for both directions, with a guest of its own for each.
fn costs(socket: &std::path::Path, wire: &str, length: usize, cpu: impl Fn() -> u64) -> [Cost; 2] {
    let mut guest = Testpmd::start_on("0", socket, 1, 256, GUEST);
    guest.command("set fwd txonly");
    guest.command(&format!("set txpkts {length}"));
    guest.command("start");
    let tx = cost(&mut guest, "TX-packets", &cpu);
    drop(guest);
    let mut guest = Testpmd::start_on("0", socket, 1, 1024, GUEST);
    guest.command("set fwd rxonly");
    guest.command("start");
    let _sender = Sender::start(wire, length);
    let rx = cost(&mut guest, "RX-packets", &cpu);
    [tx, rx]
}

pub(super) fn run() {
    enter_new_namespace();
    fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap();
    pin_this_thread(0).unwrap();
    veth("bare");
    veth("veth");
    veth("dpdk");
    let daemon = Daemon::start(&["--af-xdp=veth0", "--cpu-affinity=1"]);
    let socket = daemon.directory().join("dpdk");
    for length in [64, 1500 - 14] {
        let mut all: [Vec<Cost>; 8] = Default::default();
        for _ in 0..ROUNDS {
            let mut bare = Bare::new(false);
            all[0].push(bare.send(length, Place::There));
            all[1].push(bare.send(length, Place::Copied));
            all[3].push(bare.receive(length));
            drop(bare);
            if length > HEADERS {
                all[2].push(Bare::new(true).send(length, Place::TwoPieces));
            }
            let ours = costs(&daemon.socket(), "veth1", length, || daemon.cpu_nanoseconds());
            all[4].push(ours[0]);
            all[5].push(ours[1]);
            let backend = Testpmd::backend("1", &socket, "net_af_xdp0,iface=dpdk0");
            let theirs = costs(&socket, "dpdk1", length, || backend.cpu_nanoseconds());
            all[6].push(theirs[0]);
            all[7].push(theirs[1]);
        }
        let has_pieces = !all[2].is_empty();
        if !has_pieces {
            all[2] = all[0].clone();
        }
        let [there, copied, pieces, received, tx, rx, their_tx, their_rx] = all.map(medians);
        println!("\naf_xdp, frames of {length} bytes {:>19} {:>10}", "ns", "Mpps");
        row("bare tx loop", there, None);
        row("bare tx loop, frame copied", copied, Some(("in place", there)));
        if has_pieces {
            row("bare tx loop, two descriptors", pieces, Some(("in place", there)));
        }
        row("vhost-user-net tx", tx, Some(("bare", there)));
        row("DPDK net_vhost + net_af_xdp tx", their_tx, Some(("bare", there)));
        row("bare rx loop", received, None);
        row("vhost-user-net rx", rx, Some(("bare", received)));
        row("DPDK net_vhost + net_af_xdp rx", their_rx, Some(("bare", received)));
    }
    let idle = |name: &str, cpu: &dyn Fn() -> u64| {
        let before = cpu();
        std::thread::sleep(TIME);
        println!("  {name:<34} {:8.3} cores", (cpu() - before) as f64 / TIME.as_nanos() as f64);
    };
    println!("\nidle, with a guest");
    let _guest = Testpmd::start_on("0", &daemon.socket(), 1, 256, GUEST);
    std::thread::sleep(TIME);
    idle("vhost-user-net", &|| daemon.cpu_nanoseconds());
    let backend = Testpmd::backend("1", &socket, "net_af_xdp0,iface=dpdk0");
    idle("DPDK net_vhost + net_af_xdp", &|| backend.cpu_nanoseconds());
}
