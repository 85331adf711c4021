//! What a frame costs the daemon through AF_XDP on a veth, with DPDK's testpmd as the guest,
//! against bare loops on a veth of their own and against testpmd as the backend.

use std::cell::RefCell;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost_user_net::guest::Umem;
use vhost_user_net::port::af_xdp::Attach;
use vhost_user_net::port::af_xdp::program::Attachment;
use vhost_user_net::sys::bpf::Program;
use vhost_user_net::sys::link;
use vhost_user_net::sys::process::pin_this_thread;
use vhost_user_net::sys::xsk::{Binding, CHUNK, Descriptor, Registration, RingSizes, Socket};

use super::measure::{
    BATCH, Cost, Fresh, GUEST, LENGTHS, TURN, bare, cost, frame, head, in_turns, receive_frames,
    row, send_frames, sent,
};
use crate::support::daemon::Daemon;
use crate::support::driver::{Card, Options};
use crate::support::frontend::Frontend;
use crate::support::network::{Wire, enter_quiet_namespace, ip};
use crate::support::testpmd::Testpmd;

const SIZES: RingSizes = RingSizes { rx: 1024, tx: 1024 };
const BUFFERS: u64 = 512;
/// Bytes from the buffers for frames to come to those sent, and on to the copies of these.
const AREA: u64 = BUFFERS * CHUNK as u64;
/// Where a frame lies in its buffer: not at a page's start, as a guest's do not.
const PLACE: u64 = 76;
/// Headers that a frame of two descriptors has in its first.
const HEADERS: usize = 64;

pub(super) fn veth(name: &str) {
    ip(&format!("link add {name}0 type veth peer name {name}1"));
    ip(&format!("link set {name}0 up"));
    ip(&format!("link set {name}1 up"));
}

/// An AF_XDP socket and nothing else.
pub(super) struct Bare {
    socket: Socket,
    umem: Arc<Umem>,
    next: u64,
    _attachment: Arc<Attachment>,
}

impl Bare {
    /// A socket on `device`, to which all its frames come.
    pub(super) fn on(device: &str, multi_buffer: bool) -> Self {
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
                self.umem.bounce_area(place as usize, length).write(&bytes);
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
                    let from = self.umem.bounce_area(at as usize, length);
                    self.umem.bounce_area(copy as usize, length).copy_from(from);
                    socket.tx.stage(whole(copy));
                }
                Place::TwoPieces => {
                    let from = self.umem.bounce_area(at as usize, HEADERS);
                    self.umem.bounce_area(copy as usize, HEADERS).copy_from(from);
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

    pub(super) fn send(&mut self, length: usize, place: Place) -> Cost {
        self.prepare(length);
        bare(|| self.send_batch(length, place))
    }

    /// The same where they are, of frames that the other processor has just written.
    pub(super) fn send_fresh(&mut self, length: usize) -> Cost {
        let (umem, bytes, first) = (self.umem.clone(), frame(length), self.next);
        let mut fresh = Fresh::written_by(BUFFERS / 2, move |number| {
            let place = AREA + (first + number) % BUFFERS * u64::from(CHUNK) + PLACE;
            umem.bounce_area(place as usize, bytes.len()).write(&bytes);
        });
        bare(|| {
            fresh.take(BATCH as u64);
            self.send_batch(length, Place::There)
        })
    }

    /// Receives what the sender sends.
    pub(super) fn receive(&mut self) -> Cost {
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

/// What keeps processor 0 busy until it is dropped.
#[derive(Default)]
pub(super) struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    /// Sends frames as fast as the kernel can.
    pub(super) fn start(device: &str, length: usize) -> Self {
        let mut load = Load::default();
        load.send_live(device, length);
        load
    }

    /// The same, beside what it does already.
    pub(super) fn send_live(&mut self, device: &str, length: usize) {
        let mut send = live_sender(device, length);
        // Each run takes ten milliseconds to begin.
        self.run(move || send(1_000_000));
    }

    /// Takes what a guest gets, beside the sender; returns the number of frames so far. It comes before
    /// the sender: no guest waits for a tick of the clock before it may look at its ring.
    pub(super) fn taken_by(&mut self, mut card: Card) -> Arc<AtomicU64> {
        let taken = Arc::<AtomicU64>::default();
        let counter = taken.clone();
        card.rx[0].want_no_call();
        self.run_urgent(move || {
            counter.fetch_add(card.recycle(0) as u64, Ordering::Relaxed);
            card.rx[0].want_no_call();
            std::thread::sleep(Duration::from_micros(100));
        });
        taken
    }

    /// Sends frames as fast as a packet socket can.
    pub(super) fn flooding(device: &str, length: usize) -> Self {
        let mut load = Load::default();
        load.flood(device, length);
        load
    }

    /// The same, beside what it does already.
    pub(super) fn flood(&mut self, device: &str, length: usize) {
        let (wire, frame) = (Wire::open(device), frame(length));
        self.run(move || wire.flood(&frame));
    }

    /// Does `step` each `pace`, and nothing but look at the clock in between.
    pub(super) fn run_each(&mut self, pace: Duration, mut step: impl FnMut() + Send + 'static) {
        let mut next = Instant::now();
        self.run(move || {
            while Instant::now() < next {
                std::hint::spin_loop();
            }
            next += pace;
            step();
        });
    }

    /// Does `step` over and over, in a thread of its own.
    pub(super) fn run(&mut self, step: impl FnMut() + Send + 'static) {
        self.start_thread(|| {}, step);
    }

    /// The same, before all that is not urgent.
    pub(super) fn run_urgent(&mut self, step: impl FnMut() + Send + 'static) {
        self.start_thread(take_precedence, step);
    }

    fn start_thread(
        &mut self,
        begin: impl FnOnce() + Send + 'static,
        mut step: impl FnMut() + Send + 'static,
    ) {
        let stopped = self.stop.clone();
        self.threads.push(std::thread::spawn(move || {
            pin_this_thread(0).unwrap();
            begin();
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

/// Sends so many frames as fast as the kernel can.
pub(super) fn live_sender(device: &str, length: usize) -> impl FnMut(u32) + Send + use<> {
    let device = link::find(device).unwrap().index;
    // r0 = XDP_TX; exit
    let sender = Program::load("sender", &[0x3_0000_00b7, 0x95]).unwrap();
    let frame = frame(length);
    move |count| sender.run_live(device, &frame, count).unwrap()
}

/// Has the calling thread run before all that are not of its kind (SCHED_FIFO of sched(7)).
#[allow(unsafe_code)]
fn take_precedence() {
    let parameters = libc::sched_param { sched_priority: 1 };
    // SAFETY: the structure lives through the call, which concerns this thread alone.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &parameters) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// Where a frame is sent from.
#[derive(Clone, Copy)]
pub(super) enum Place {
    /// Where it is.
    There,
    /// From a copy.
    Copied,
    /// Its headers from a copy, the rest from where it is.
    TwoPieces,
}

/// A backend whose guest is testpmd, and which stands still between its turns.
struct Backend<'a> {
    guest: Testpmd,
    server: Server<'a>,
}

enum Server<'a> {
    /// It sleeps while its guest stands still.
    Ours(&'a Daemon),
    Dpdk(Testpmd),
}

impl Server<'_> {
    /// On-CPU nanoseconds.
    fn cpu(&self) -> u64 {
        match self {
            Server::Ours(daemon) => daemon.cpu_nanoseconds(),
            Server::Dpdk(server) => server.cpu_nanoseconds(),
        }
    }
}

impl<'a> Backend<'a> {
    fn ours(daemon: &'a Daemon, ring_size: u16) -> Self {
        let guest = Testpmd::start_on("0", &daemon.socket(), 1, ring_size, GUEST);
        Backend { guest, server: Server::Ours(daemon) }
    }

    fn dpdk(socket: &Path, ring_size: u16) -> Self {
        let server = Testpmd::backend("1", socket, "net_af_xdp0,iface=dpdk0");
        let guest = Testpmd::start_on("0", socket, 1, ring_size, GUEST);
        Backend { guest, server: Server::Dpdk(server) }
    }

    fn pause(&self) {
        self.guest.pause();
        if let Server::Dpdk(server) = &self.server {
            server.pause();
        }
    }

    fn resume(&self) {
        if let Server::Dpdk(server) = &self.server {
            server.resume();
        }
        self.guest.resume();
    }

    /// What it spends on frames of its guest, which go out through `device`.
    fn send(&self, device: &str) -> Cost {
        self.resume();
        let cost = cost(|| sent(device), || self.server.cpu());
        self.pause();
        cost
    }

    /// What it spends on frames that come from `wire` and reach its guest.
    fn receive(&mut self, wire: &'static str, length: usize) -> Cost {
        self.resume();
        let load = Load::start(wire, length);
        let cost = cost(|| self.guest.counter("RX-packets"), || self.server.cpu());
        drop(load);
        self.pause();
        cost
    }

    /// What it spends while nothing happens, in cores.
    fn idle(&self) -> f64 {
        self.resume();
        let before = self.server.cpu();
        std::thread::sleep(5 * TURN);
        let used = self.server.cpu() - before;
        self.pause();
        used as f64 / (5 * TURN).as_nanos() as f64
    }
}

impl Drop for Backend<'_> {
    fn drop(&mut self) {
        // The guest takes leave of its backend.
        self.resume();
    }
}

/// What the daemon spends on frames from `wire` that a driver takes which costs next to nothing.
pub(super) fn lean_rx_cost(daemon: &Daemon, wire: &str, length: usize) -> Cost {
    let options = Options { size: 1024, ..Options::default() };
    let mut card = Card::start(Frontend::new(daemon.connect()), options);
    card.send(0, &[0; 5]);
    let mut load = Load::start(wire, length);
    let taken = load.taken_by(card);
    cost(|| taken.load(Ordering::Relaxed), || daemon.cpu_nanoseconds())
}

pub(super) fn run() {
    enter_quiet_namespace();
    pin_this_thread(0).unwrap();
    ["bare", "pieces", "veth", "dpdk"].into_iter().for_each(veth);
    let bare = RefCell::new(Bare::on("bare0", false));
    let mut pieces = Bare::on("pieces0", true);
    let daemon = Daemon::start(&["--af-xdp=veth0", "--cpu-affinity=1"]);
    let their_socket = daemon.directory().join("dpdk");
    let backends = |ring_size, prepare: &dyn Fn(&mut Testpmd)| {
        [Backend::ours(&daemon, ring_size), Backend::dpdk(&their_socket, ring_size)].map(
            |mut backend| {
                prepare(&mut backend.guest);
                backend.pause();
                backend
            },
        )
    };

    for length in LENGTHS {
        head(&format!("af_xdp, frames of {length} bytes"));
        let [ours, theirs] = backends(256, &|guest| send_frames(guest, length));
        let place = if length > HEADERS { Place::TwoPieces } else { Place::There };
        let [there, copied, two, tx, their_tx] = in_turns([
            &mut || bare.borrow_mut().send(length, Place::There),
            &mut || bare.borrow_mut().send(length, Place::Copied),
            &mut || pieces.send(length, place),
            &mut || ours.send("veth0"),
            &mut || theirs.send("dpdk0"),
        ]);
        drop([ours, theirs]);
        row("bare tx loop", &there, None);
        row("bare tx loop, frame copied", &copied, Some(("in place", &there)));
        if length > HEADERS {
            row("bare tx loop, two descriptors", &two, Some(("in place", &there)));
        }
        row("DPDK net_vhost + net_af_xdp tx", &their_tx, Some(("bare", &there)));
        row("vhost-user-net tx", &tx, Some(("bare", &there)));
        row("vhost-user-net tx", &tx, Some(("DPDK", &their_tx)));

        let [received, lean] = in_turns([
            &mut || {
                let _load = Load::start("bare1", length);
                bare.borrow_mut().receive()
            },
            &mut || lean_rx_cost(&daemon, "veth1", length),
        ]);
        row("bare rx loop", &received, None);
        row("vhost-user-net rx, lean driver", &lean, Some(("bare", &received)));

        let [mut ours, mut theirs] = backends(1024, &receive_frames);
        let [rx, their_rx] = in_turns([&mut || ours.receive("veth1", length), &mut || {
            theirs.receive("dpdk1", length)
        }]);
        row("DPDK net_vhost + net_af_xdp rx", &their_rx, None);
        row("vhost-user-net rx, testpmd", &rx, Some(("DPDK", &their_rx)));
    }

    println!("\nidle, with a guest {:>26}", "cores");
    let names = ["vhost-user-net", "DPDK net_vhost + net_af_xdp"];
    for (name, backend) in names.into_iter().zip(backends(256, &|_| ())) {
        println!("  {name:<34} {:8.3}", backend.idle());
    }
}
