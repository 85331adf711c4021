//! The seam between a virtqueue and the host's network.
//!
//! A port is shown the virtqueues. It has the host read and write the guest's buffers themselves, and
//! completes chains when the host has finished with them: no `read_frame(&mut [u8])`. A chain that has not
//! completed is as it was popped, so a session can end at any moment.

pub mod af_xdp;
mod announcer;
mod completions;
mod host;
pub mod loopback;
mod mtu;
pub mod tap;
mod tx_stages;

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

pub use announcer::Announcer;
pub use completions::{Captured, Completions, Moved, Outcome};
pub use host::{HostQueue, RxFilter};
pub use tap::TapState;
pub use tx_stages::TxStages;

use crate::features::Negotiated;
use crate::guest::{Readable, Virtqueue, Writable};
use crate::policy::{AntiSpoofing, FilterView, LiveFilter};
use crate::traffic::PeerTable;

/// The virtqueues of a session: both, or one of them.
#[derive(Debug)]
pub struct Virtqueues<'mem> {
    /// Frames from the guest.
    pub tx: Option<Virtqueue<'mem, Readable>>,
    /// Buffers for frames to the guest.
    pub rx: Option<Virtqueue<'mem, Writable>>,
}

impl Virtqueues<'_> {
    /// Number of rx buffers in flight.
    #[inline]
    pub fn buffers(&self) -> usize {
        self.rx.as_ref().map_or(0, Virtqueue::in_flight)
    }
}

/// One queue pair's way to the host's network, for one session.
///
/// A frame that the host refuses completes as dropped. A host side that is gone is the port's to report and
/// to retry; frames complete as dropped meanwhile.
///
/// [`Loopback`](loopback::Loopback) is a whole port in 150 lines.
pub trait Port<'mem> {
    /// Sends the chains of the tx virtqueue before position `until`, oldest first. Returns whether it has
    /// taken all: the host may have no room for more.
    fn transmit(
        &mut self,
        queues: &mut Virtqueues<'mem>,
        until: u16,
        done: &mut Completions,
    ) -> bool;

    /// rx buffers that it keeps in flight at the most.
    fn max_buffers(&self) -> usize;

    /// Takes rx buffers that were popped since the last call.
    fn post(&mut self, queues: &mut Virtqueues<'mem>);

    /// Completes all chains that the host has finished with; at most `rx_allowance` frames go to the guest, and
    /// the others stay with the host.
    fn reap(&mut self, queues: &mut Virtqueues<'mem>, rx_allowance: usize, done: &mut Completions);

    /// How it moves frames at the moment.
    fn mode(&self) -> Mode;

    /// What to wait for while idle.
    fn readiness(&self, queues: &Virtqueues<'mem>) -> Readiness<'_>;

    /// Tells whether waiting showed the port's descriptor readable.
    fn woken(&mut self, readable: bool);

    /// A descriptor that becomes readable when something about the host's device has changed, to
    /// be waited on whenever the worker sleeps.
    fn events(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Handles an event on the descriptor from [`events`](Self::events).
    fn host_changed(&mut self) {}

    /// Stops the host side: it touches no chain any more. Completes what the host has finished with, and
    /// leaves the others in flight.
    fn stop(&mut self, queues: &mut Virtqueues<'mem>, done: &mut Completions);
}

/// How a port moves frames.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Mode {
    /// It has moved none yet.
    #[default]
    None,
    /// Its device does not work: frames are dropped.
    Gone,
    /// Back to the guest.
    Loopback,
    /// To a TAP, a system call for each frame.
    Writev,
    /// To a TAP, a system call for each burst.
    IoUring,
    /// By AF_XDP, with the kernel's copy.
    Copy,
    /// By AF_XDP, by the device itself.
    ZeroCopy,
}

impl Mode {
    /// All of them.
    pub const ALL: [Mode; 7] = [
        Mode::None,
        Mode::Gone,
        Mode::Loopback,
        Mode::Writev,
        Mode::IoUring,
        Mode::Copy,
        Mode::ZeroCopy,
    ];

    /// The mode as it is shown.
    pub fn name(self) -> &'static str {
        match self {
            Mode::None => "none",
            Mode::Gone => "gone",
            Mode::Loopback => "loopback",
            Mode::Writev => "writev",
            Mode::IoUring => "io-uring",
            Mode::Copy => "copy",
            Mode::ZeroCopy => "zero-copy",
        }
    }
}

/// What an idle port waits for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Readiness<'a> {
    /// The descriptor to wait on, if the port has one.
    pub fd: Option<BorrowedFd<'a>>,
    /// Whether it is to be waited on for frames.
    pub read: bool,
    /// Whether it is to be waited on for room to send.
    pub write: bool,
    /// Whether it may be watched all the time: nothing happens to it but what is to be read.
    pub watched: bool,
    /// Whether the guest is to say when it provides more buffers.
    pub starved: bool,
    /// Look again after this time, whatever happens.
    pub timeout: Option<Duration>,
}

/// What a session of a port is to keep to.
#[derive(Debug, Clone)]
pub struct SessionConfig {
    /// The features agreed on.
    pub negotiated: Negotiated,
    /// MTU in bytes.
    pub mtu: u16,
    /// Whether the card's link is up.
    pub link: bool,
    /// Whether the guest has an rx ring.
    pub receives: bool,
    /// Descriptors of that ring.
    pub rx_size: u16,
    /// What the guest may send.
    pub rules: Option<Arc<AntiSpoofing>>,
    /// What of it is denied.
    pub tx_filter: Arc<LiveFilter>,
    /// Where frames are counted by whom they go to and come from.
    pub peers: Arc<PeerTable>,
}

impl SessionConfig {
    /// The stages in front of the port, for frames of up to `max_frame` bytes, GSO frames excepted.
    fn tx_stages(&self, max_frame: usize) -> TxStages {
        let (rules, filter) = (self.rules.clone(), FilterView::new(self.tx_filter.clone()));
        TxStages::new(&self.negotiated, max_frame, rules, filter, self.peers.clone())
    }
}
