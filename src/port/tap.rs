//! A port on a TAP device: the kernel copies frames to and from guest memory.
//!
//! *transmit* gives the kernel a private, checked copy of each frame's headers, and the rest of the chain in place.
//! A burst is one io_uring submission where the kernel permits io_uring, else one `writev` for each frame. *reap*
//! reads each frame straight into the oldest rx buffers.
//!
//! Invariant: the checked bytes of a frame from the guest are sent from the copy, which the guest cannot write to.

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

/// Maximum number of frames that one turn reads.
const READS_PER_TURN: usize = 64;
/// Time between attempts to read a device that is gone.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// Minimum time between queries for the device's MTU while frames are dropped.
const MTU_QUERY_INTERVAL: Duration = Duration::from_millis(10);

/// A session on a TAP queue.
#[derive(Debug)]
pub struct TapPort<'mem> {
    host: &'mem mut TapQueue,
    /// The MTU that the operator or the frontend set.
    mtu: u16,
    transmitter: Transmitter,
    receiver: Receiver<'mem>,
    gate: ReadGate,
    /// Time of the last failure of the device, while the device is gone.
    gone_since: Option<Instant>,
    /// Time of the last query for the device's MTU after a dropped frame.
    mtu_queried: Option<Instant>,
}

impl TapQueue {
    /// Begins a session, with exactly the offloads that the guest has accepted.
    pub fn session<'mem>(&'mem mut self, config: &SessionConfig) -> TapPort<'mem> {
        let configured = self.configure(config);
        let longest = self.longest_frame(config.mtu);
        let mut port = TapPort {
            transmitter: Transmitter::new(config, longest),
            receiver: Receiver::new(config, longest, self.is_small),
            mtu: config.mtu,
            gate: ReadGate::new(config.receives),
            gone_since: None,
            mtu_queried: None,
            host: self,
        };
        if let Err(error) = configured {
            port.gone(&error);
        }
        port
    }
}

impl<'mem> TapPort<'mem> {
    /// Notes that the device does not work. Frames are dropped until an attempt succeeds.
    fn gone(&mut self, error: &io::Error) {
        if self.gone_since.replace(Instant::now()).is_none() {
            warn!(
                "tap {}: the device is gone: {error}; dropping frames, retrying every second",
                self.host.name()
            );
        }
    }

    /// Has the kernel segment frames to the guest as long as the rx ring cannot hold the largest GSO frame.
    fn fit_offloads(&mut self, rx: &Virtqueue<'mem, Writable>) {
        let is_small = self.receiver.is_small;
        if is_small == self.host.is_small {
            return;
        }
        self.host.set_small(is_small);
        self.host.small_size = is_small.then_some(rx.size());
        self.receiver.set_longest(self.host.longest_frame(self.mtu));
        let (header_length, accepted) = self.receiver.device_settings();
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
        self.receiver.measure_ring(rx);
        self.fit_offloads(rx);
        self.gate.note_buffers(self.receiver.room(rx));
    }

    fn reap(&mut self, queues: &mut Virtqueues<'mem>, rx_allowance: usize, done: &mut Completions) {
        let Some(rx) = &mut queues.rx else { return };
        let gone = self.gone_since.is_some_and(|at| at.elapsed() < RETRY_INTERVAL);
        if gone || !self.gate.may_have_frames() {
            return;
        }
        self.receiver.begin_burst();
        let is_due =
            |last: Option<Instant>| last.is_none_or(|at| at.elapsed() >= MTU_QUERY_INTERVAL);
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
                    // The frame is lost: the guest's buffer is shorter than a header, or is unmapped.
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
            if done.rx_dropped.len() > dropped && is_due(self.mtu_queried) {
                // If the device's MTU was raised, the next frame of that length is not lost.
                self.mtu_queried = Some(Instant::now());
                self.receiver.set_longest(self.host.longest_frame(self.mtu));
            }
        }
        self.receiver.end_burst();
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
            Some(_) => Some(RETRY_INTERVAL),
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
            let (header_length, accepted) = self.receiver.device_settings();
            // Guests on the other queues get GSO frames again. An error recurs when the next session begins.
            let _ = self.host.apply(header_length, &accepted);
        }
    }
}

/// Explains why the network device `name` cannot be opened as a TAP by its name, and states the fix.
pub fn no_tap(name: &str) -> String {
    match link::find(name) {
        Ok(link) if link.is_macvtap() => format!(
            "{name} is a {}, which is opened by its file; use --tap-fd=3 with the shell's \
             3<>/dev/tap{}",
            link.kind, link.index
        ),
        _ => format!("{name} is a network device, but not a TAP; choose another name"),
    }
}
