//! A guest whose network stack is the kernel's, in a network namespace of its own: a driver, as Linux
//! has it, that sleeps when nothing happens (unless it is told to poll), between the card's rings and a
//! TAP device.
//!
//! Split rings of 256, EVENT_IDX, mergeable buffers of 1536 bytes where the backend knows them,
//! checksums and segmentation left to the backend, and accepted from it, as far as it offers that.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::thread::JoinHandle;

use epoll::{ControlOptions, Event, Events};
use vhost_user_net::sys::process::pin_this_thread;
use vhost_user_net::sys::tap::{Queue, offload};

use super::enter_a_namespace;
use crate::support::driver::{
    CSUM, Card, EVENT_IDX, GUEST_CSUM, GUEST_TSO, HEADER, HOST_TSO, INDIRECT, MRG_RXBUF, Options,
    PROTOCOL, Ring, VERSION_1, WRITE,
};
use crate::support::frontend::Frontend;
use crate::support::network::ip;

/// HOST_ECN, GUEST_ECN.
const ECN: u64 = 1 << 13 | 1 << 9;
const SIZE: u16 = 256;
/// Bytes of a buffer for frames to come, and of one that takes the longest.
const SMALL: u32 = 1536;
const LONGEST: u32 = 66 << 10;
/// Bytes of a page's worth of a frame to be sent, as Linux's drivers have them.
const PIECE: usize = 32 << 10;

/// A guest at an address, which answers pings and serves iperf3.
pub(super) struct KernelGuest {
    wishes: Arc<Wishes>,
    driver: Option<JoinHandle<()>>,
    server: Child,
}

/// What its driver is to do.
#[derive(Default)]
struct Wishes {
    stop: AtomicBool,
    poll: AtomicBool,
}

impl KernelGuest {
    /// Connects to a backend at `socket`; `address` has its prefix's length.
    pub(super) fn start(socket: &Path, address: &str, mac: &str) -> Self {
        let wishes = Arc::<Wishes>::default();
        let (ready, started) = channel();
        let (its_wishes, socket) = (wishes.clone(), socket.to_owned());
        let (address, mac) = (address.to_owned(), mac.to_owned());
        let driver = std::thread::spawn(move || {
            enter_a_namespace();
            pin_this_thread(0).unwrap();
            let mut driver = Driver::start(&socket);
            ip(&format!("link set eth0 address {mac} up"));
            ip(&format!("address add {address} dev eth0"));
            let mut server = Command::new("iperf3");
            server.args(["-s", "--forceflush"]).stdin(Stdio::null()).stdout(Stdio::null());
            ready.send(server.spawn().unwrap()).unwrap();
            driver.run(&its_wishes);
        });
        KernelGuest { wishes, driver: Some(driver), server: started.recv().unwrap() }
    }

    /// Has its driver look for frames all the time, or sleep when there are none.
    pub(super) fn poll(&self, poll: bool) {
        self.wishes.poll.store(poll, Ordering::Relaxed);
    }
}

impl Drop for KernelGuest {
    fn drop(&mut self) {
        self.wishes.stop.store(true, Ordering::Relaxed);
        let _ = self.driver.take().unwrap().join();
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

struct Driver {
    card: Card,
    tap: File,
    /// Where the buffers of the tx ring's heads are, one after the other.
    outgoing: u64,
    /// The same for the rx ring.
    incoming: u64,
    buffer: u32,
    free: Vec<u16>,
    indirect: bool,
    mergeable: bool,
    /// A frame whose buffers do not follow each other.
    scratch: Vec<u8>,
    /// What is waited for: the backend's calls, and for these or what the kernel has to send.
    calls: RawFd,
    all: RawFd,
}

impl Driver {
    fn start(socket: &Path) -> Self {
        let frontend = Frontend::of_any(UnixStream::connect(socket).unwrap());
        let features = VERSION_1
            | PROTOCOL
            | EVENT_IDX
            | INDIRECT
            | MRG_RXBUF
            | CSUM
            | HOST_TSO
            | GUEST_CSUM
            | GUEST_TSO
            | ECN;
        // `LONGEST` is for the frames to be sent.
        let options = Options { features, size: SIZE, buffer: LONGEST, ..Options::default() };
        let card = Card::prepare(frontend, options);
        let features = card.options.features;
        let has = |feature: u64| features & feature == feature;
        let queue = Queue::open("eth0", false).unwrap();
        queue.set_header_length(HEADER).unwrap();
        let mut offloads = 0;
        if has(CSUM) {
            offloads |= offload::CSUM;
        }
        if has(CSUM | HOST_TSO) {
            offloads |= offload::TSO4 | offload::TSO6 | offload::TSO_ECN;
        }
        queue.set_offload(offloads).unwrap();
        let mergeable = has(MRG_RXBUF);
        let (rx, tx) = (&card.rx[0], &card.tx[0]);
        let mut driver = Driver {
            outgoing: tx.buffer_area(),
            incoming: rx.buffer_area(),
            // Without mergeable buffers the longest frame must fit into one.
            buffer: if mergeable || !has(GUEST_TSO) { SMALL } else { LONGEST },
            free: (0..SIZE).collect(),
            indirect: has(INDIRECT),
            mergeable,
            scratch: Vec::new(),
            calls: epoll::create(true).unwrap(),
            all: epoll::create(true).unwrap(),
            tap: File::from(OwnedFd::from(queue)),
            card,
        };
        driver.lay_out();
        let [rx, tx] = [&driver.card.rx[0], &driver.card.tx[0]].map(|it| it.call.as_raw_fd());
        let tap = driver.tap.as_raw_fd();
        for (set, fds) in [(driver.calls, [rx, tx]), (driver.all, [rx, tap])] {
            for fd in fds {
                let event = Event::new(Events::EPOLLIN, 0);
                epoll::ctl(set, ControlOptions::EPOLL_CTL_ADD, fd, event).unwrap();
            }
        }
        driver.card.rx[0].publish();
        driver.card.run();
        driver
    }

    /// Describes all buffers once: a head is always the same buffer.
    fn lay_out(&mut self) {
        let rx = &mut self.card.rx[0];
        for head in 0..SIZE {
            let address = self.incoming + u64::from(head) * u64::from(self.buffer);
            rx.write_descriptor(rx.descriptors, head, address, self.buffer, WRITE, 0);
            rx.offer_head(head);
        }
    }

    fn run(&mut self, wishes: &Wishes) {
        while !wishes.stop.load(Ordering::Relaxed) {
            if self.send() | self.receive() {
                continue;
            }
            let [rx, tx] = [&self.card.rx[0], &self.card.tx[0]];
            if wishes.poll.load(Ordering::Relaxed) {
                rx.want_no_call();
                tx.want_no_call();
                // To whom its frames go, and who sends them, is on the same processor.
                std::thread::yield_now();
                continue;
            }
            rx.want_call();
            // Linux reclaims what was sent when it sends more, unless the ring is full.
            let full = self.free.is_empty();
            if full {
                tx.want_call();
            } else {
                tx.want_no_call();
            }
            let ram = &self.card.ram;
            let used = |ring: &Ring| ram.load(ring.used + 2) != ring.used_index;
            if used(rx) || (full && used(tx)) {
                continue;
            }
            let mut events = [Event::new(Events::empty(), 0); 2];
            epoll::wait(if full { self.calls } else { self.all }, 100, &mut events).unwrap();
            let _ = rx.call.read();
            let _ = tx.call.read();
        }
    }

    /// Sends what the kernel has to send; says whether there was any.
    fn send(&mut self) -> bool {
        let (ram, tx) = (self.card.ram.clone(), &mut self.card.tx[0]);
        while let Some((head, _)) = tx.next_used() {
            self.free.push(head);
        }
        let mut any = false;
        for _ in 0..64 {
            let Some(head) = self.free.pop() else { break };
            let place = self.outgoing + u64::from(head) * u64::from(LONGEST);
            let Ok(length) = ram.fetch(place, LONGEST as usize, &mut self.tap) else {
                self.free.push(head);
                break;
            };
            any = true;
            describe(tx, head, place, length, self.indirect);
        }
        if any {
            tx.publish();
        }
        any
    }

    /// Gives the kernel the frames that have come; says whether there were any.
    fn receive(&mut self) -> bool {
        let (ram, rx) = (self.card.ram.clone(), &mut self.card.rx[0]);
        let mut any = false;
        for _ in 0..64 {
            let Some((head, length)) = rx.next_used() else { break };
            any = true;
            let place = |head: u16| self.incoming + u64::from(head) * u64::from(self.buffer);
            let start = place(head);
            let count = if self.mergeable { ram.load(start + 10) } else { 1 };
            let (mut heads, mut pieces) = (vec![head], vec![(start, length as usize)]);
            while heads.len() < count.into() {
                // The used index covers the whole frame at once.
                let (head, length) = rx.next_used().unwrap();
                heads.push(head);
                pieces.push((place(head), length as usize));
            }
            let in_a_row = pieces.windows(2).all(|two| two[0].0 + two[0].1 as u64 == two[1].0);
            let total = pieces.iter().map(|(_, length)| length).sum();
            // What the kernel does not take is lost, as in any guest.
            let written = if in_a_row {
                ram.send(start, total, &mut self.tap)
            } else {
                self.scratch.clear();
                for (place, length) in pieces {
                    self.scratch.extend(ram.read(place, length));
                }
                self.tap.write(&self.scratch)
            };
            assert!(
                written.as_ref().is_ok_and(|written| *written == total)
                    || written.as_ref().is_err_and(|error| error.kind() != ErrorKind::WouldBlock),
                "{written:?} of {total} bytes"
            );
            heads.into_iter().for_each(|head| rx.offer_head(head));
        }
        if any {
            rx.publish();
        }
        any
    }
}

/// Makes a frame available, in one piece or, if it may be indirect, in a few.
fn describe(tx: &mut Ring, head: u16, place: u64, length: usize, indirect: bool) {
    if indirect && length > PIECE {
        let piece = |at: usize| (place + at as u64, PIECE.min(length - at) as u32);
        let pieces: Vec<(u64, u32)> = (0..length).step_by(PIECE).map(piece).collect();
        tx.describe_indirect(head, &pieces, false);
    } else {
        tx.write_descriptor(tx.descriptors, head, place, length as u32, 0, 0);
    }
    tx.offer_head(head);
}
