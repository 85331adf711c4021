//! The interface between a virtqueue and the host's network.
//!
//! A [`Port`] gets the virtqueues themselves. The port submits the guest's buffers to the kernel, which reads and
//! writes them in place, and the port completes each chain when the kernel has finished with it. There is no
//! `read_frame(&mut [u8])`, which would copy.
//!
//! Invariant: a chain that has not completed can be popped again. So a session can end at any moment.

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
    /// The tx virtqueue: frames from the guest.
    pub tx: Option<Virtqueue<'mem, Readable>>,
    /// The rx virtqueue: buffers for frames to the guest.
    pub rx: Option<Virtqueue<'mem, Writable>>,
}

impl Virtqueues<'_> {
    /// Returns the number of rx buffers in flight.
    #[inline]
    pub fn buffers(&self) -> usize {
        self.rx.as_ref().map_or(0, Virtqueue::in_flight)
    }

    /// Returns the position of the oldest tx chain that is not used; 0 without a tx ring.
    pub fn tx_next_used(&self) -> u16 {
        self.tx.as_ref().map_or(0, Virtqueue::next_used)
    }

    /// Returns the position of the oldest rx chain that is not used; 0 without an rx ring.
    pub fn rx_next_used(&self) -> u16 {
        self.rx.as_ref().map_or(0, Virtqueue::next_used)
    }
}

/// A session of one queue pair on the host's network.
///
/// The port completes a frame that the host refuses as dropped. If the host's device stops working, the port
/// logs this, retries, and completes frames as dropped meanwhile.
///
/// # Order of calls
///
/// [`HostQueue::session`] makes the port, and the worker's thread makes all calls:
///
/// 1. [`events`](Self::events), before the first turn.
/// 2. In each turn:
///    1. [`transmit`](Self::transmit), if the rate limit has admitted frames, or the last call returned false.
///    2. [`max_buffers`](Self::max_buffers), then [`post`](Self::post) if the worker has popped rx buffers.
///    3. [`reap`](Self::reap), always. The worker then publishes what has completed.
///    4. [`mode`](Self::mode), if something has completed, or rx buffers were posted.
/// 3. After a turn that moves nothing, the worker may poll: `woken(true)` precedes each further turn. Else:
///    1. [`readiness`](Self::readiness). The worker enables notifications. If the driver has made chains available
///       meanwhile, the next turn follows.
///    2. [`mode`](Self::mode), and [`readiness`](Self::readiness) again. The worker sleeps.
///    3. [`woken`](Self::woken), then [`host_changed`](Self::host_changed) if the descriptor from `events` was
///       readable.
/// 4. [`stop`](Self::stop), once, when the session ends; no call follows. The worker returns the chains in flight
///    to the available ring. After a panic the port is dropped without `stop`.
///
/// # Example
///
/// A port that drops each frame from the guest, and delivers none:
///
/// ```
/// use vhost_user_net::counters::DropReason;
/// use vhost_user_net::port::{Completions, Mode, Port, Readiness, Virtqueues};
///
/// struct Discard;
///
/// impl<'mem> Port<'mem> for Discard {
///     fn transmit(
///         &mut self,
///         queues: &mut Virtqueues<'mem>,
///         until: u16,
///         done: &mut Completions,
///     ) -> bool {
///         // A port with a network checks each frame by `TxStages` first.
///         if let Some(tx) = &mut queues.tx {
///             done.drop_all(tx, until, DropReason::HostRefused);
///         }
///         true
///     }
///
///     // Without buffers there is nothing to post.
///     fn max_buffers(&self) -> usize {
///         0
///     }
///
///     fn post(&mut self, _: &mut Virtqueues<'mem>) {}
///
///     // All chains have completed in `transmit`, and no frames come from the host.
///     fn reap(&mut self, _: &mut Virtqueues<'mem>, _: usize, _: &mut Completions) {}
///
///     fn mode(&self) -> Mode {
///         Mode::None
///     }
///
///     // The guest's kicks wake the worker; the port adds no descriptor and no timeout.
///     fn readiness(&self, _: &Virtqueues<'mem>) -> Readiness<'_> {
///         Readiness::default()
///     }
///
///     fn woken(&mut self, _: bool) {}
///
///     fn stop(&mut self, _: &mut Virtqueues<'mem>, _: &mut Completions) {}
/// }
///
/// # use std::os::unix::fs::FileExt;
/// # use vhost_user_net::guest::{
/// #     Budget, GuestMemory, Notification, RegionRequest, RingLayout, Virtqueue,
/// # };
/// # use vhost_user_net::sys::process::sealed_memory;
/// # use vm_memory::GuestAddress;
/// #
/// # // A ring of four descriptors, in which the driver has made four chains of one byte available.
/// # let file = sealed_memory(c"example", 0x1000).unwrap();
/// # for head in 0..4_u16 {
/// #     let place = u64::from(head);
/// #     file.write_all_at(&0x800_u64.to_le_bytes(), 16 * place).unwrap();
/// #     file.write_all_at(&1_u32.to_le_bytes(), 16 * place + 8).unwrap();
/// #     file.write_all_at(&head.to_le_bytes(), 0x100 + 4 + 2 * place).unwrap();
/// # }
/// # file.write_all_at(&4_u16.to_le_bytes(), 0x100 + 2).unwrap();
/// # let request =
/// #     RegionRequest { guest_address: 0, size: 0x1000, frontend_address: 0, file_offset: 0 };
/// # let memory = GuestMemory::map([(request, file)]).unwrap();
/// # let [descriptors, avail, used] = [0, 0x100, 0x200].map(GuestAddress);
/// # let layout = RingLayout { size: 4, descriptors, avail, used };
/// # let notification = Notification { event_idx: false, indirect: false };
/// # let mut tx = Virtqueue::start(&memory, layout, notification).unwrap();
/// // The worker pops four frames, and the limit admits three.
/// tx.pop(Budget { chains: 64, bytes: 1 << 20 }).unwrap();
/// let mut queues = Virtqueues { tx: Some(tx), rx: None };
/// let mut done = Completions::default();
/// assert!(Discard.transmit(&mut queues, 3, &mut done));
///
/// let tx = queues.tx.as_ref().unwrap();
/// assert_eq!((tx.completed(), tx.in_flight()), (3, 1));
/// assert_eq!(done.tx_dropped, [(DropReason::HostRefused, 3)]);
/// ```
///
/// [`Loopback`](loopback::Loopback) is a port that delivers frames, in 150 lines.
pub trait Port<'mem> {
    /// Sends the frames before position `until` of the tx virtqueue, oldest first. Returns true if the port has
    /// accepted all, and false if the host has no space for some of them.
    ///
    /// An accepted frame may complete later, in [`reap`](Self::reap). Frames complete in the order of the ring.
    ///
    /// Called first in a turn, if the rate limit has admitted frames or the last call returned false. After false,
    /// the worker pops no frames, and calls `transmit` again in the next turn. `until` never goes back. In a
    /// session with a disabled tx ring the worker drops all frames itself, and never calls `transmit`.
    fn transmit(
        &mut self,
        queues: &mut Virtqueues<'mem>,
        until: u16,
        done: &mut Completions,
    ) -> bool;

    /// Returns the maximum number of rx buffers in flight. The worker asks in each turn, before
    /// [`post`](Self::post), and never exceeds it.
    fn max_buffers(&self) -> usize;

    /// Takes over the rx buffers that were popped since the last call: the newest chains in flight, up to
    /// [`next_avail`](Virtqueue::next_avail).
    ///
    /// Called after [`transmit`](Self::transmit), in turns in which the worker has popped rx buffers.
    fn post(&mut self, queues: &mut Virtqueues<'mem>);

    /// Completes the chains that the host has finished with. At most `rx_allowance` frames go to the guest; the
    /// others stay with the host.
    ///
    /// Called in each turn, after [`post`](Self::post). `rx_allowance` is 0 while the rate limit admits no frames.
    fn reap(&mut self, queues: &mut Virtqueues<'mem>, rx_allowance: usize, done: &mut Completions);

    /// Returns the mode for reports and metrics. The worker asks after turns that move something, and before it
    /// sleeps.
    fn mode(&self) -> Mode;

    /// Returns the events that must wake the idle worker. The worker asks after a turn that moves nothing: once to
    /// learn whether to enable the rx ring's notifications, and again just before it sleeps.
    fn readiness(&self, queues: &Virtqueues<'mem>) -> Readiness<'_>;

    /// Notes that the worker has slept, or polls. `readable` is true if frames from the host may have arrived.
    ///
    /// Called after each sleep, and with true before each turn while the worker polls.
    fn woken(&mut self, readable: bool);

    /// Returns a descriptor that becomes readable when the host's device changes. The worker asks once, before the
    /// first turn, and waits for the descriptor whenever it sleeps.
    fn events(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Handles an event on the descriptor from [`events`](Self::events). Called after [`woken`](Self::woken), if
    /// the descriptor was readable.
    fn host_changed(&mut self) {}

    /// Stops the host side, which touches no chain afterwards. Completes the chains that the host has finished
    /// with, and leaves the others in flight.
    ///
    /// Called once, at the end of the session, also after a [`Fault`](crate::guest::Fault).
    fn stop(&mut self, queues: &mut Virtqueues<'mem>, done: &mut Completions);
}

/// The way in which a port moves frames.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Mode {
    /// No frame has moved yet.
    #[default]
    None,
    /// The host's device does not work: frames are dropped.
    Gone,
    /// Frames return to the guest that sent them.
    Loopback,
    /// TAP, one system call for each frame.
    Writev,
    /// TAP, one system call for each burst of tx frames.
    IoUring,
    /// AF_XDP in copy mode: the kernel copies each frame.
    Copy,
    /// AF_XDP in zero-copy mode: the NIC reads and writes the frames.
    ZeroCopy,
}

impl Mode {
    /// All modes.
    pub const ALL: [Mode; 7] = [
        Mode::None,
        Mode::Gone,
        Mode::Loopback,
        Mode::Writev,
        Mode::IoUring,
        Mode::Copy,
        Mode::ZeroCopy,
    ];

    /// Returns the name in reports and metrics.
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

/// Events that an idle port waits for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Readiness<'a> {
    /// The descriptor to wait for, if the port has one.
    pub fd: Option<BorrowedFd<'a>>,
    /// True if frames from the host, which make `fd` readable, must wake the worker.
    pub read: bool,
    /// True if space for frames to the host, which makes `fd` writable, must wake the worker.
    pub write: bool,
    /// True if `fd` may stay registered with epoll, edge-triggered: only frames from the host make it ready.
    pub watched: bool,
    /// True if the port needs more rx buffers, so that the driver must kick when it provides some.
    pub starved: bool,
    /// Longest sleep until the next turn.
    pub timeout: Option<Duration>,
}

/// Parameters of a port's session.
#[derive(Debug, Clone)]
pub struct SessionConfig {
    /// The negotiated features.
    pub negotiated: Negotiated,
    /// MTU in bytes.
    pub mtu: u16,
    /// True if the virtio-net device's link is up.
    pub link: bool,
    /// True if the guest has an enabled rx ring.
    pub receives: bool,
    /// Descriptors of the rx ring; 0 without one.
    pub rx_size: u16,
    /// Anti-spoofing of frames from the guest, if it is on.
    pub rules: Option<Arc<AntiSpoofing>>,
    /// Packet filter of frames from the guest.
    pub tx_filter: Arc<LiveFilter>,
    /// The count of frames by peer.
    pub peers: Arc<PeerTable>,
}

impl SessionConfig {
    /// Creates the stages in front of the port, for frames of up to `max_frame` bytes; GSO frames may be longer.
    fn tx_stages(&self, max_frame: usize) -> TxStages {
        let (rules, filter) = (self.rules.clone(), FilterView::new(self.tx_filter.clone()));
        TxStages::new(&self.negotiated, max_frame, rules, filter, self.peers.clone())
    }
}
