//! A TAP device as port: frames go between guest memory and the kernel without a copy of ours.
//!
//! *transmit* hands the kernel a private, checked copy of the headers and the rest of the chain
//! where it lies, a burst with one io_uring submission where that is permitted, else a `writev` per
//! frame. *reap* has the kernel read each frame straight into the oldest buffers.
//!
//! Invariant: what is checked of a frame from the guest is sent from the copy, which the guest cannot write to.

mod filter;
mod queue;
mod read_gate;
mod receiver;
mod transmitter;

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use log::{info, warn};

use super::{Completions, Mode, Port, Readiness, SessionConfig, Virtqueues};
use crate::counters::DropReason;
use crate::guest::{Virtqueue, Writable};
use crate::sys::link;

pub use filter::TapFilter;
pub use queue::{TapQueue, TapState, TxMethod};
use read_gate::{ReadGate, Room};
use receiver::{MAX_BUFFERS, Receiver};
use transmitter::Transmitter;

/// Frames that one turn reads.
const READS_PER_TURN: usize = 64;
/// How long a device that is gone is left alone.
const RETRY: Duration = Duration::from_secs(1);
/// Time between questions for the device's MTU while frames are dropped.
const ASK_FOR_MTU: Duration = Duration::from_millis(10);

/// A session on a TAP queue.
#[derive(Debug)]
pub struct TapPort<'mem> {
    host: &'mem mut TapQueue,
    /// The MTU that the operator or the frontend set.
    mtu: u16,
    transmitter: Transmitter,
    receiver: Receiver<'mem>,
    gate: ReadGate,
    /// When the device was last found to be gone.
    gone_since: Option<Instant>,
    /// When a dropped frame last had the device's MTU asked for.
    mtu_asked: Option<Instant>,
}

impl TapQueue {
    /// Begins a session: the device leaves to the guest what the guest has accepted, and no more.
    pub fn session<'mem>(&'mem mut self, config: &SessionConfig) -> TapPort<'mem> {
        let configured = self.configure(config);
        let longest = self.longest_frame(config.mtu);
        let mut port = TapPort {
            transmitter: Transmitter::new(config, longest),
            receiver: Receiver::new(config, longest, self.is_small),
            mtu: config.mtu,
            gate: ReadGate::new(config.receives),
            gone_since: None,
            mtu_asked: None,
            host: self,
        };
        if let Err(error) = configured {
            port.gone(&error);
        }
        port
    }
}

impl<'mem> TapPort<'mem> {
    /// Notes that the device does not work: its frames are dropped, and it is tried again later.
    fn gone(&mut self, error: &io::Error) {
        if self.gone_since.replace(Instant::now()).is_none() {
            warn!("tap {}: the device is gone, frames are dropped: {error}", self.host.name());
        }
    }

    /// Has the kernel segment for a ring that cannot hold the largest frame, and only for such a ring.
    fn fit_offloads(&mut self, rx: &Virtqueue<'mem, Writable>) {
        let is_small = self.receiver.is_small;
        if is_small == self.host.is_small {
            return;
        }
        self.host.set_small(is_small);
        self.host.small_size = is_small.then_some(rx.size());
        self.receiver.expect(self.host.longest_frame(self.mtu));
        let (header_length, accepted) = self.receiver.terms();
        if let Err(error) = self.host.apply(header_length, &accepted) {
            return self.gone(&error);
        }
        if is_small {
            let (size, bytes) = (rx.size(), rx.bytes_in_flight() / rx.in_flight().max(1));
            info!(
                "tap {}: rx ring too small for segments size={size} buffer={bytes}; the kernel segments \
                 frames to the guest",
                self.host.name()
            );
        }
    }
}

impl<'mem> Port<'mem> for TapPort<'mem> {
    fn transmit(
        &mut self,
        queues: &mut Virtqueues<'mem>,
        until: u16,
        done: &mut Completions,
    ) -> bool {
        self.gate.note_tx_burst();
        if let Some(tx) = &mut queues.tx {
            self.transmitter.transmit(tx, until, self.host, done);
        }
        !self.transmitter.blocked
    }

    fn max_buffers(&self) -> usize {
        MAX_BUFFERS
    }

    fn post(&mut self, queues: &mut Virtqueues<'mem>) {
        let Some(rx) = &queues.rx else { return };
        if let Err(error) = self.host.set_attached(true) {
            self.gone(&error);
        }
        self.receiver.measure(rx);
        self.fit_offloads(rx);
        self.gate.note_buffers(self.receiver.room(rx));
    }

    fn reap(&mut self, queues: &mut Virtqueues<'mem>, rx_allowance: usize, done: &mut Completions) {
        let Some(rx) = &mut queues.rx else { return };
        let gone = self.gone_since.is_some_and(|at| at.elapsed() < RETRY);
        if gone || !self.gate.may_have_frames() {
            return;
        }
        self.receiver.look();
        let asks = |last: Option<Instant>| last.is_none_or(|at| at.elapsed() >= ASK_FOR_MTU);
        for _ in 0..rx_allowance.min(READS_PER_TURN) {
            if !self.receiver.can_read(&mut self.gate, rx) {
                break;
            }
            let dropped = done.rx_dropped.len();
            match self.receiver.read(&self.host.queue, rx) {
                Ok(Some(length)) => self.receiver.deliver(length, rx, done),
                Ok(None) => done.rx_dropped.push((DropReason::NoRoom, 1)),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => {
                        self.gate.note_empty();
                        break;
                    }
                    // The frame is lost: the guest's buffer has no room for a header, or is gone.
                    Some(libc::EINVAL | libc::EFAULT) => {
                        done.rx_dropped.push((DropReason::NoRoom, 1));
                    }
                    _ => {
                        self.gone(&error);
                        return;
                    }
                },
            }
            self.gone_since = None;
            if done.rx_dropped.len() > dropped && asks(self.mtu_asked) {
                // Perhaps the device's MTU was raised: the next frame will find the room.
                self.mtu_asked = Some(Instant::now());
                self.receiver.expect(self.host.longest_frame(self.mtu));
            }
        }
        self.receiver.count();
        self.fit_offloads(rx);
    }

    fn mode(&self) -> Mode {
        match (self.gone_since, &self.host.writer) {
            (Some(_), _) => Mode::Gone,
            (None, Some(_)) => Mode::IoUring,
            (None, None) => Mode::Writev,
        }
    }

    fn readiness(&self, queues: &Virtqueues<'mem>) -> Readiness<'_> {
        let room = queues.rx.as_ref().map_or(Room::None, |rx| self.receiver.room(rx));
        let timeout = match self.gone_since {
            Some(_) => Some(RETRY),
            None => self.gate.timeout(room),
        };
        Readiness {
            fd: self.gone_since.is_none().then(|| self.host.queue.as_fd()),
            read: self.gate.waits_for_frames(room),
            write: self.transmitter.blocked,
            watched: true,
            starved: room != Room::Enough,
            timeout,
        }
    }

    fn woken(&mut self, readable: bool) {
        self.gate.note_wake_up(readable);
    }

    fn stop(&mut self, _queues: &mut Virtqueues<'mem>, _done: &mut Completions) {
        self.receiver.stop();
        if self.host.is_small {
            self.host.set_small(false);
            let (header_length, accepted) = self.receiver.terms();
            // Other queues are left segments again. The next session meets the error, if there is one.
            let _ = self.host.apply(header_length, &accepted);
        }
    }
}

/// Explains why the network device `name` cannot be opened as a TAP by its name, and what to do about it.
pub fn no_tap(name: &str) -> String {
    match link::find(name) {
        Ok(link) if link.is_macvtap() => format!(
            "{name} is a {}, which is opened by its file; use --tap-fd=3 with the shell's \
             3<>/dev/tap{}",
            link.kind, link.index
        ),
        _ => format!("{name} is a network device, but no TAP; choose another name"),
    }
}
