//! AF_XDP sockets as port: the guest's own memory is what the kernel, or the device, sends from
//! and receives into.
//!
//! The pieces: `umem` says which addresses the kernel may be given, `program` brings frames to
//! the sockets, `interface` opens and closes these, the `transmitter` and the `receiver` keep
//! what the kernel holds. A socket lives for a session at the most: it opens when the guest first
//! has something for it, since that pins all of the guest's memory, and is closed before a single
//! buffer goes back unfinished.

mod abilities;
mod checksum;
mod interface;
pub mod joining;
pub mod program;
mod receiver;
pub mod segmentation;
mod steering;
pub mod tags;
mod transmitter;
mod umem;

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{info, warn};

use super::{Completions, Mode, Port, Readiness, Terms, Virtqueues};
use crate::counters::Drop;
use crate::features::{HEADER_LENGTH, PortOffloads};
use crate::guest::{GuestMemory, Virtqueue};
use crate::sys::link::Watch;
use crate::sys::xsk::Statistics;
use crate::vnet_header::LINK_OVERHEAD;

pub use interface::Interface;
use interface::{Failure, OpenSocket};
use receiver::{MAX_BUFFERS, Receiver};
use transmitter::Transmitter;
use umem::LONGEST_FRAME;

/// Largest MTU in bytes of a device that AF_XDP sockets can serve.
pub const MAX_MTU: u32 = (LONGEST_FRAME - HEADER_LENGTH - LINK_OVERHEAD) as u32;
/// How long a queue whose last socket was just closed is left alone between attempts.
const BUSY_RETRY: Duration = Duration::from_millis(2);
/// For how long a queue may be busy with a socket of our own that was closed.
const BUSY_LIMIT: Duration = Duration::from_secs(1);
/// How long a device that does not work is left alone, unless it is heard of.
const RETRY: Duration = Duration::from_secs(1);
/// How soon to look whether the kernel has finished with frames that it was given.
const COMPLETION: Duration = Duration::from_millis(1);
/// How often frames that the program has dropped are counted.
const FILTERED: Duration = Duration::from_secs(1);
/// How long frames that were handed over are waited for when a session ends.
const LAST_FRAMES: Duration = Duration::from_millis(20);

/// Why a device can't be used: one line that names it and the way out.
#[derive(Debug)]
pub struct OpenError(pub(crate) String);

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One queue of a network device, for the daemon's life.
#[derive(Debug)]
pub struct XdpQueue {
    interface: Arc<Interface>,
    /// Which of the port's queue pairs it is for.
    pair: u16,
    watch: Watch,
    /// It was said that the device does not work.
    reported: bool,
}

impl XdpQueue {
    /// The device, which all queues of a port share.
    pub fn interface(&self) -> &Arc<Interface> {
        &self.interface
    }

    /// What the port can do for the guest. Frames from the wire come as they are: whole, and with
    /// their checksums.
    pub fn offloads(&self) -> PortOffloads {
        PortOffloads { both_ways: false, ..PortOffloads::ALL }
    }

    /// A socket for frames beside those of a session.
    pub(super) fn packet_socket(&self) -> io::Result<OwnedFd> {
        self.interface.packet_socket()
    }

    /// Begins a session. Nothing is opened yet.
    pub fn session<'mem>(
        &'mem mut self,
        memory: &'mem Arc<GuestMemory>,
        queues: &Virtqueues<'mem>,
        terms: &Terms,
    ) -> XdpPort<'mem> {
        let first_tx = queues.tx.as_ref().map_or(0, Virtqueue::next_used);
        let first_rx = queues.rx.as_ref().map_or(0, Virtqueue::next_used);
        XdpPort {
            transmitter: Transmitter::new(terms, self.pair, first_tx),
            receiver: Receiver::new(&terms.negotiated, self.pair, first_rx),
            host: self,
            memory,
            mtu: terms.mtu,
            receives: terms.receives,
            rx_limit: usize::MAX,
            left_behind: false,
            failed: None,
            changed: None,
            opened_anew: None,
            filtered: Filtered { counted: None, at: Instant::now() },
            statistics: Statistics::default(),
            state: State::Closed { since: None, retry: Instant::now() },
        }
    }
}

/// Whether a session has a socket.
#[derive(Debug)]
enum State {
    Open(Box<OpenSocket>),
    Closed {
        /// Since when there has been none though there should be.
        since: Option<Closed>,
        /// When to try again.
        retry: Instant,
    },
}

#[derive(Debug, Clone, Copy)]
struct Closed {
    at: Instant,
    /// The device does not work, and it was said so: frames are dropped.
    gone: bool,
}

/// Frames that the program has dropped for the filter.
#[derive(Debug)]
struct Filtered {
    /// How many, when that was looked up last.
    counted: Option<u64>,
    at: Instant,
}

/// A session on a queue.
#[derive(Debug)]
pub struct XdpPort<'mem> {
    host: &'mem mut XdpQueue,
    memory: &'mem Arc<GuestMemory>,
    /// The card's MTU.
    mtu: u16,
    /// Whether the guest has an rx ring.
    receives: bool,
    /// Frames that are taken each time at the most.
    rx_limit: usize,
    state: State,
    /// Frames from the guest were left behind.
    left_behind: bool,
    /// The device was heard to work no more.
    failed: Option<OpenError>,
    /// The device has changed so that the socket is to be opened again.
    changed: Option<&'static str>,
    /// When the socket was opened anew for a fault.
    opened_anew: Option<Instant>,
    filtered: Filtered,
    /// What the kernel has counted for the socket, when that was looked up last.
    statistics: Statistics,
    transmitter: Transmitter,
    receiver: Receiver,
}

impl<'mem> XdpPort<'mem> {
    /// Opens the socket, if it is not open and it is time to try.
    #[inline]
    fn ensure_open(&mut self, queues: &Virtqueues<'mem>) {
        if let State::Closed { .. } = self.state {
            self.open(queues);
        }
    }

    // By itself: it is left out where instructions are counted (`cargo bench -- instructions`).
    #[inline(never)]
    fn open(&mut self, queues: &Virtqueues<'mem>) {
        let State::Closed { since, retry } = self.state else { return };
        let now = Instant::now();
        if now < retry {
            return;
        }
        let interface = &self.host.interface;
        let pair = self.host.pair;
        let header_length = self.receiver.header_length;
        let mut receiver = self.receives.then_some(&mut self.receiver);
        let opened = interface.open(
            pair,
            self.memory,
            self.mtu,
            header_length,
            self.receives,
            |socket, umem| {
                if let Some(receiver) = &mut receiver {
                    receiver.post_before_bind(socket, umem);
                }
            },
        );
        if opened.is_err() {
            self.withdraw(queues);
        }
        match opened {
            Ok(socket) => {
                if std::mem::take(&mut self.host.reported) {
                    info!("af_xdp {}: works again", self.host.interface.name());
                }
                self.filtered.counted = self.host.interface.filtered(pair);
                self.statistics = Statistics::default();
                // Kept first: whatever happens from here on, the socket is closed at the end.
                self.state = State::Open(Box::new(socket));
                if let State::Open(socket) = &mut self.state {
                    self.transmitter.begin(socket);
                    if let Some(rx) = &queues.rx {
                        self.receiver.post(rx, socket);
                    }
                }
            }
            Err(Failure::Busy(error)) => {
                let since = since.unwrap_or(Closed { at: now, gone: false });
                self.state = State::Closed { since: Some(since), retry: now + BUSY_RETRY };
                if now - since.at > BUSY_LIMIT {
                    self.gone(&error);
                }
            }
            Err(Failure::Gone(error)) => self.gone(&error),
        }
    }

    /// Has the receiver begin again with all buffers; returns how many frames were in some of them.
    fn withdraw(&mut self, queues: &Virtqueues<'mem>) -> u64 {
        self.receiver.withdraw(queues.rx.as_ref().map_or(0, Virtqueue::next_used))
    }

    /// Counts the frames that the program has dropped since the last time.
    fn count_filtered(&mut self, done: &mut Completions) {
        let now = self.host.interface.filtered(self.host.pair);
        let before = std::mem::replace(&mut self.filtered.counted, now);
        if let (Some(before), Some(now)) = (before, now)
            && now > before
        {
            done.rx_dropped.push((Drop::Filtered, now - before));
        }
        self.filtered.at = Instant::now();
    }

    /// Counts frames that the kernel has dropped since the last time, by what it has counted by now.
    fn count_lost(&mut self, now: Statistics, done: &mut Completions) {
        let before = std::mem::replace(&mut self.statistics, now);
        let too_long = now.too_long().saturating_sub(before.too_long());
        let lost = now.lost().saturating_sub(before.lost()).saturating_sub(too_long);
        if too_long > 0 && before.too_long() == 0 {
            warn!(
                "af_xdp {}: frames longer than its MTU are lost; find out by 'vhost-user-net doctor' \
                 who joins them",
                self.host.interface.name()
            );
        }
        for (reason, count) in [(Drop::TooLong, too_long), (Drop::NoRoom, lost)] {
            if count > 0 {
                done.rx_dropped.push((reason, count));
            }
        }
    }

    /// Notes that the device does not work: frames are dropped, and it is tried again later.
    fn gone(&mut self, why: &dyn fmt::Display) {
        if !std::mem::replace(&mut self.host.reported, true) {
            let name = self.host.interface.name();
            warn!("af_xdp {name}: does not work, frames are dropped: {why}");
        }
        let now = Instant::now();
        let since = Some(Closed { at: now, gone: true });
        self.state = State::Closed { since, retry: now + RETRY };
    }

    /// Whether frames may be being dropped of which nobody hears otherwise: for the filter, or since
    /// devices below this one join them.
    fn counts_dropped(&self) -> bool {
        let State::Open(open) = &self.state else { return false };
        self.receives && (self.host.interface.filters() || open.generic)
    }

    fn is_gone(&self) -> bool {
        matches!(self.state, State::Closed { since: Some(Closed { gone: true, .. }), .. })
    }

    /// Closes the socket: what was sent is finished, what was posted is ours again.
    fn close(&mut self, queues: &mut Virtqueues<'mem>, done: &mut Completions) {
        let State::Open(open) = &mut self.state else { return };
        let pair = self.host.pair;
        self.host.interface.stop_receiving(pair);
        // What the kernel has not sent at once is under way, or never will be.
        let deadline = Instant::now() + LAST_FRAMES;
        loop {
            reap(&mut self.receiver, &mut self.transmitter, queues, open, usize::MAX, done);
            if !self.transmitter.is_waiting(open) || Instant::now() > deadline {
                break;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        if let Some(tx) = &mut queues.tx {
            self.transmitter.stop(tx, open, done);
        }
        self.count_filtered(done);
        let closed = State::Closed { since: None, retry: Instant::now() };
        let State::Open(open) = std::mem::replace(&mut self.state, closed) else { return };
        let statistics = self.host.interface.close(pair, *open);
        self.count_lost(statistics, done);
        // Not before here: the kernel writes no more.
        let lost = self.withdraw(queues);
        if lost > 0 {
            done.rx_dropped.push((Drop::NoRoom, lost));
        }
    }

    /// Something is wrong with the socket, of which a new one may be free.
    fn open_anew(
        &mut self,
        why: &'static str,
        queues: &mut Virtqueues<'mem>,
        done: &mut Completions,
    ) {
        if self.opened_anew.is_some_and(|at| at.elapsed() < RETRY) {
            self.fail(&why, queues, done);
            return;
        }
        self.opened_anew = Some(Instant::now());
        self.reopen(why, queues, done);
    }

    /// Closes the socket, and opens another.
    fn reopen(&mut self, why: &'static str, queues: &mut Virtqueues<'mem>, done: &mut Completions) {
        warn!("af_xdp {}: opens its socket anew: {why}", self.host.interface.name());
        self.close_and_drop(queues, done);
        self.open(queues);
    }

    /// The device was found not to work any more.
    fn fail(
        &mut self,
        why: &dyn fmt::Display,
        queues: &mut Virtqueues<'mem>,
        done: &mut Completions,
    ) {
        self.close_and_drop(queues, done);
        self.gone(why);
    }

    /// Closes the socket, and drops the frames that were not sent.
    fn close_and_drop(&mut self, queues: &mut Virtqueues<'mem>, done: &mut Completions) {
        self.close(queues, done);
        if let Some(tx) = &mut queues.tx {
            self.transmitter.drop_all(tx, None, done);
        }
    }
}

/// Completes what the kernel has finished with, up to `most` frames for the guest.
fn reap<'mem>(
    receiver: &mut Receiver,
    transmitter: &mut Transmitter,
    queues: &mut Virtqueues<'mem>,
    open: &mut OpenSocket,
    most: usize,
    done: &mut Completions,
) {
    if let Some(tx) = &mut queues.tx {
        transmitter.reap(tx, open, done);
    }
    if let Some(rx) = &mut queues.rx {
        receiver.reap(rx, open, most, done);
    }
}

impl std::ops::Drop for XdpPort<'_> {
    /// Closes the socket of a session that panicked: else the kernel would write to the guest's memory
    /// after the session's end. Every other session has closed it in `stop`.
    fn drop(&mut self) {
        let closed = State::Closed { since: None, retry: Instant::now() };
        if let State::Open(open) = std::mem::replace(&mut self.state, closed) {
            self.host.interface.stop_receiving(self.host.pair);
            self.host.interface.close(self.host.pair, *open);
        }
    }
}

impl<'mem> Port<'mem> for XdpPort<'mem> {
    fn transmit(
        &mut self,
        queues: &mut Virtqueues<'mem>,
        until: u16,
        done: &mut Completions,
    ) -> bool {
        self.ensure_open(queues);
        let Some(tx) = &mut queues.tx else { return true };
        let has_taken = match &mut self.state {
            State::Open(open) => self.transmitter.transmit(tx, until, open, done),
            State::Closed { since: Some(Closed { gone: true, .. }), .. } => {
                self.transmitter.drop_all(tx, Some(until), done);
                true
            }
            // The queue is busy with its last socket: it takes some 30 ms.
            State::Closed { .. } => false,
        };
        self.left_behind = !has_taken;
        has_taken
    }

    fn max_buffers(&self) -> usize {
        MAX_BUFFERS
    }

    fn post(&mut self, queues: &mut Virtqueues<'mem>) {
        self.ensure_open(queues);
        if let (State::Open(open), Some(rx)) = (&mut self.state, &queues.rx) {
            self.receiver.post(rx, open);
        }
    }

    fn reap(&mut self, queues: &mut Virtqueues<'mem>, done: &mut Completions) {
        if let State::Open(open) = &mut self.state {
            let kicked = self.transmitter.kick(open);
            if open.busy_poll {
                // Its errors are those of sending.
                let _ = open.socket.receive();
            }
            let most = self.rx_limit;
            reap(&mut self.receiver, &mut self.transmitter, queues, open, most, done);
            if let Some(error) = self.failed.take() {
                self.fail(&error, queues, done);
            } else if let Err(error) = kicked {
                self.fail(&error, queues, done);
            } else if let Some(why) = self.changed.take() {
                self.reopen(why, queues, done);
            } else if let Some(fault) = self.receiver.fault() {
                self.open_anew(fault, queues, done);
            }
        } else if queues.buffers() > 0 || self.is_gone() {
            self.open(queues);
        }
        if self.counts_dropped() && self.filtered.at.elapsed() >= FILTERED {
            self.count_filtered(done);
            if let State::Open(open) = &self.state
                && let Ok(statistics) = open.socket.statistics()
            {
                self.count_lost(statistics, done);
            }
        }
    }

    fn limit_rx(&mut self, frames: usize) {
        self.rx_limit = frames;
    }

    fn mode(&self) -> Mode {
        match &self.state {
            State::Open(open) if open.is_zero_copy() => Mode::ZeroCopy,
            State::Open(_) => Mode::Copy,
            State::Closed { .. } if self.is_gone() => Mode::Gone,
            State::Closed { .. } => Mode::None,
        }
    }

    fn readiness(&self, queues: &Virtqueues<'mem>) -> Readiness<'_> {
        let (fd, timeout) = match &self.state {
            State::Open(open) => {
                let wait = if self.transmitter.has_frames() {
                    Some(COMPLETION)
                } else if self.left_behind {
                    // It was opened for the guest's buffers, after that.
                    Some(Duration::ZERO)
                } else {
                    self.receiver.patience()
                };
                let count = self
                    .counts_dropped()
                    .then(|| FILTERED.saturating_sub(self.filtered.at.elapsed()));
                (Some(open.as_fd()), wait.into_iter().chain(count).min())
            }
            State::Closed { since: Some(_), retry } => {
                (None, Some(retry.saturating_duration_since(Instant::now())))
            }
            State::Closed { .. } => (None, None),
        };
        Readiness {
            fd,
            read: fd.is_some() && self.receives && self.rx_limit > 0,
            write: false,
            watched: false,
            starved: Receiver::is_starved(queues.buffers()),
            timeout,
        }
    }

    fn woken(&mut self, _readable: bool) {}

    fn events(&self) -> Option<BorrowedFd<'_>> {
        Some(self.host.watch.as_fd())
    }

    fn host_changed(&mut self) {
        let changed = self.host.watch.clear();
        if self.host.pair == 0 {
            // Once for all queues of the device.
            self.host.interface.look_for_tags_again(changed.as_ref());
        }
        match &mut self.state {
            State::Open(open) => match self.host.interface.check(open) {
                Ok(changed) => self.changed = changed,
                Err(error) => self.failed = Some(error),
            },
            State::Closed { retry, .. } => *retry = Instant::now(),
        }
    }

    fn stop(&mut self, queues: &mut Virtqueues<'mem>, done: &mut Completions) {
        self.close(queues, done);
    }
}
