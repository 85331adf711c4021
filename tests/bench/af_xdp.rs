//! What a frame costs the daemon through AF_XDP on a veth, with DPDK's testpmd as the guest,
//! against bare loops on a veth of their own and against testpmd as the backend.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost_user_net::config::Attach;
use vhost_user_net::port::af_xdp::program::Attachment;
use vhost_user_net::sys::bpf::Program;
use vhost_user_net::sys::link;
use vhost_user_net::sys::process::pin_this_thread;
use vhost_user_net::sys::umem::Umem;
use vhost_user_net::sys::xsk::{Binding, CHUNK, Descriptor, Registration, RingSizes, Socket};

use super::ROUNDS;
use super::tap::{BATCH, Cost, TIME, bare, frame, medians, row};
use crate::support::daemon::Daemon;
use crate::support::driver::{Card, Options};
use crate::support::frontend::Frontend;
use crate::support::network::{enter_new_namespace, ip};
use crate::support::testpmd::Testpmd;

const GUEST: &str = "mrg_rxbuf=1,in_order=0,packed_vq=0";
const SIZES: RingSizes = RingSizes { rx: 1024, tx: 1024 };
const BUFFERS: u64 = 512;
/// Bytes from the buffers for frames to come to those sent, and on to the copies of these.
const AREA: u64 = BUFFERS * CHUNK as u64;
/// Where a frame lies in its buffer: not at a page's start, as a guest's do not.
const PLACE: u64 = 76;
/// Headers that a frame of two descriptors has in its first.
const HEADERS: usize = 64;

fn veth(name: &str) {
    ip(&format!("link add {name}0 type veth peer name {name}1"));
    ip(&format!("link set {name}0 up"));
    ip(&format!("link set {name}1 up"));
}

/// An AF_XDP socket and nothing else.
struct Bare {
    socket: Socket,
    umem: Arc<Umem>,
    next: u64,
    _attachment: Attachment,
}

impl Bare {
    /// A socket on `device`, to which all its frames come.
    fn on(device: &str, multi_buffer: bool) -> Self {
        let link = link::find(device).unwrap();
        let attachment = Attachment::new(device, link.index, Attach::Native).unwrap();
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
                    attachment.redirect(0, socket.descriptor(), 0).unwrap();
                    return Bare { socket, umem, next: 0, _attachment: attachment };
                }
            }
        }
    }

    /// Writes the frames to be sent.
    fn prepare(&self, length: usize) {
        let bytes = frame(length);
        for buffer in 0..BUFFERS {
            for area in [AREA, 2 * AREA] {
                let place = area + buffer * u64::from(CHUNK) + PLACE;
                self.umem.arena(place as usize, length).write(&bytes);
            }
        }
    }

    /// Sends a batch of frames, each from where `place` says.
    fn send_batch(&mut self, length: usize, place: Place) -> u64 {
        let socket = &mut self.socket;
        for _ in 0..BATCH {
            let at = AREA + (self.next % BUFFERS) * u64::from(CHUNK) + PLACE;
            let copy = at + AREA;
            self.next += 1;
            let whole = |address| Descriptor { address, length: length as u32, options: 0 };
            match place {
                Place::There => socket.tx.stage(whole(at)),
                Place::Copied => {
                    let from = self.umem.arena(at as usize, length);
                    self.umem.arena(copy as usize, length).copy_from(&from);
                    socket.tx.stage(whole(copy));
                }
                Place::TwoPieces => {
                    let from = self.umem.arena(at as usize, HEADERS);
                    self.umem.arena(copy as usize, HEADERS).copy_from(&from);
                    let options = Descriptor::CONTINUES;
                    socket.tx.stage(Descriptor { address: copy, length: HEADERS as u32, options });
                    let rest = HEADERS as u64;
                    let length = (length - HEADERS) as u32;
                    socket.tx.stage(Descriptor { address: at + rest, length, options: 0 });
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
    }

    fn send(&mut self, length: usize, place: Place) -> Cost {
        self.prepare(length);
        bare(|| self.send_batch(length, place))
    }

    /// Receives what the sender sends.
    fn receive(&mut self) -> Cost {
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

/// Sends frames as fast as it can, on processor 0, until it is dropped.
struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    fn start(device: &str, length: usize) -> Self {
        let device = link::find(device).unwrap().index;
        // r0 = XDP_TX; exit
        let sender = Program::load("sender", &[0x3_0000_00b7, 0x95]).unwrap();
        let frame = frame(length);
        let mut load = Load { stop: Arc::default(), threads: Vec::new() };
        // Each run takes some time to begin.
        load.run(move || sender.run_live(device, &frame, 200_000).unwrap());
        load
    }

    /// Takes what a guest gets, beside the sender; returns the number of frames so far.
    fn taken_by(&mut self, mut card: Card) -> Arc<AtomicU64> {
        let taken = Arc::<AtomicU64>::default();
        let counter = taken.clone();
        card.rx[0].want_no_call();
        self.run(move || {
            counter.fetch_add(card.recycle(0) as u64, Ordering::Relaxed);
            card.rx[0].want_no_call();
            std::thread::sleep(Duration::from_micros(100));
        });
        taken
    }

    fn run(&mut self, mut step: impl FnMut() + Send + 'static) {
        let stopped = self.stop.clone();
        self.threads.push(std::thread::spawn(move || {
            pin_this_thread(0).unwrap();
            while !stopped.load(Ordering::Relaxed) {
                step();
            }
        }));
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.drain(..).for_each(|thread| thread.join().unwrap());
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

/// What a backend spends on each frame that `frames` counts.
fn cost(frames: &mut dyn FnMut() -> u64, cpu: &dyn Fn() -> u64) -> Cost {
    std::thread::sleep(Duration::from_millis(300));
    let (started, before, first) = (Instant::now(), cpu(), frames());
    std::thread::sleep(TIME);
    let used = cpu() - before;
    let moved = (frames() - first) as f64;
    Cost { ns: used as f64 / moved, rate: moved / started.elapsed().as_secs_f64() }
}

/// What a backend spends on frames that testpmd sends.
fn tx_cost(socket: &Path, length: usize, cpu: &dyn Fn() -> u64) -> Cost {
    let mut guest = Testpmd::start_on("0", socket, 1, 256, GUEST);
    guest.command("set fwd txonly");
    guest.command(&format!("set txpkts {length}"));
    guest.command("start");
    cost(&mut || guest.counter("TX-packets"), cpu)
}

/// What it spends on frames that testpmd receives.
fn rx_cost(socket: &Path, wire: &'static str, length: usize, cpu: &dyn Fn() -> u64) -> Cost {
    let mut guest = Testpmd::start_on("0", socket, 1, 1024, GUEST);
    guest.command("set fwd rxonly");
    guest.command("start");
    let _load = Load::start(wire, length);
    cost(&mut || guest.counter("RX-packets"), cpu)
}

/// What the daemon spends on frames that a driver takes which costs next to nothing.
fn lean_rx_cost(daemon: &Daemon, length: usize) -> Cost {
    let options = Options { size: 1024, ..Options::default() };
    let mut card = Card::start(Frontend::new(daemon.connect()), options);
    card.send(0, &[0; 5]);
    let mut load = Load::start("veth1", length);
    let taken = load.taken_by(card);
    cost(&mut || taken.load(Ordering::Relaxed), &|| daemon.cpu_nanoseconds())
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
        let mut all: [Vec<Cost>; 9] = Default::default();
        for _ in 0..ROUNDS {
            let mut bare = Bare::on("bare0", false);
            all[0].push(bare.send(length, Place::There));
            all[1].push(bare.send(length, Place::Copied));
            drop(bare);
            all[2].push(match length > HEADERS {
                true => Bare::on("bare0", true).send(length, Place::TwoPieces),
                false => all[0][0],
            });
            all[3].push(tx_cost(&daemon.socket(), length, &|| daemon.cpu_nanoseconds()));
            {
                let mut bare = Bare::on("bare0", false);
                let _load = Load::start("bare1", length);
                all[4].push(bare.receive());
            }
            all[5].push(lean_rx_cost(&daemon, length));
            let cpu = || daemon.cpu_nanoseconds();
            all[6].push(rx_cost(&daemon.socket(), "veth1", length, &cpu));
            let backend = Testpmd::backend("1", &socket, "net_af_xdp0,iface=dpdk0");
            let cpu = || backend.cpu_nanoseconds();
            all[7].push(tx_cost(&socket, length, &cpu));
            all[8].push(rx_cost(&socket, "dpdk1", length, &cpu));
        }
        let [there, copied, pieces, tx, received, lean, rx, their_tx, their_rx] = all.map(medians);
        println!("\naf_xdp, frames of {length} bytes {:>19} {:>10}", "ns", "Mpps");
        row("bare tx loop", there, None);
        row("bare tx loop, frame copied", copied, Some(("in place", there)));
        if length > HEADERS {
            row("bare tx loop, two descriptors", pieces, Some(("in place", there)));
        }
        row("vhost-user-net tx", tx, Some(("bare", there)));
        row("DPDK net_vhost + net_af_xdp tx", their_tx, Some(("bare", there)));
        row("bare rx loop", received, None);
        row("vhost-user-net rx, lean driver", lean, Some(("bare", received)));
        row("vhost-user-net rx, testpmd", rx, None);
        row("DPDK net_vhost + net_af_xdp rx", their_rx, Some(("ours", rx)));
    }
    let idle = |name: &str, cpu: &dyn Fn() -> u64| {
        let before = cpu();
        std::thread::sleep(TIME);
        println!("  {name:<34} {:8.3} cores", (cpu() - before) as f64 / TIME.as_nanos() as f64);
    };
    println!("\nidle, with a guest");
    {
        let _guest = Testpmd::start_on("0", &daemon.socket(), 1, 256, GUEST);
        std::thread::sleep(TIME);
        idle("vhost-user-net", &|| daemon.cpu_nanoseconds());
    }
    let backend = Testpmd::backend("1", &socket, "net_af_xdp0,iface=dpdk0");
    idle("DPDK net_vhost + net_af_xdp", &|| backend.cpu_nanoseconds());
}
