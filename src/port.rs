//! The seam between a virtqueue and the host's network.
//!
//! A port borrows descriptor chains, a burst at a time, and gives each of them back: a loan, not a
//! `read_frame(&mut [u8])`. That is what lets the host read and write guest memory itself, and
//! lets a session end at any moment.

pub mod af_xdp;
mod announcer;
pub mod loopback;
mod mtu;
pub mod tap;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Weak};
use std::time::Duration;

pub use announcer::Announcer;
pub use tap::TapState;

use crate::capture::Capture;
use crate::counters::{CopyReason, Drop};
use crate::features::{Negotiated, PortOffloads};
use crate::guest::{Burst, Chain, GuestMemory, Readable, Writable};
use crate::policy::{Filter, FilterView, Limits, LiveFilter, Rules};
use crate::sandbox::Role;
use crate::traffic::{Tally, Traffic};
use crate::vnet_header::{Admission, PrivateStart, Surplus};

/// One queue pair's way to the host's network, for one session.
///
/// Chains come back in the order in which they were lent, each direction for itself. What the host
/// refuses comes back as dropped; a host side that is gone is the port's to report and to retry,
/// and drops frames meanwhile.
pub trait Port<'mem> {
    /// Borrows chains to send, oldest first; leaves behind those the host has no room for yet.
    fn transmit(&mut self, burst: &mut Burst<'mem, Readable>);

    /// Borrows empty buffers for frames to come, oldest first; leaves behind those it has no use
    /// for yet.
    fn post(&mut self, buffers: &mut Burst<'mem, Writable>);

    /// Gives back everything that has finished.
    fn reap(&mut self, finished: &mut Finished<'mem>);

    /// Takes this many frames for the guest from the host each time from now on; the rest stays
    /// there.
    fn limit_rx(&mut self, frames: usize);

    /// How it moves frames at the moment.
    fn mode(&self) -> Mode;

    /// What to wait for while idle.
    fn readiness(&self) -> Readiness<'_>;

    /// Tells whether waiting showed the port's descriptor readable.
    fn woken(&mut self, readable: bool);

    /// A descriptor that becomes readable when something about the host's device has changed, to
    /// be waited on whenever the worker sleeps.
    fn events(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Tells that it did.
    fn host_changed(&mut self) {}

    /// Stops the host side and gives back every chain still borrowed.
    fn recall(&mut self, finished: &mut Finished<'mem>);
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

/// What became of a frame from the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It was handed to the host.
    Sent,
    /// It was dropped.
    Dropped(Drop),
}

/// Chains that a port gives back, in the order of their rings.
#[derive(Debug, Default)]
pub struct Finished<'mem> {
    /// Frames from the guest, and what became of them.
    pub tx: Vec<(Chain<'mem, Readable>, Outcome)>,
    /// Buffers that hold a frame for the guest, or a part of one, and the bytes in each.
    pub rx: Vec<(Chain<'mem, Writable>, u32)>,
    /// Frames that were put into the buffers of `rx`.
    pub rx_frames: u64,
    /// Bytes of those frames, headers excluded.
    pub rx_bytes: u64,
    /// What those frames are on the wire beyond themselves.
    pub rx_surplus: Surplus,
    /// The same for the frames in `tx` that were sent.
    pub tx_surplus: Surplus,
    /// Frames that never reached the guest, why, and how many.
    pub rx_dropped: Vec<(Drop, u64)>,
    /// For each of the frames in `rx` that was copied in user space, why.
    pub rx_copied: Vec<CopyReason>,
    /// The same for `tx`.
    pub tx_copied: Vec<CopyReason>,
    /// While there is a capture: the private starts of frames that are in `tx`, or will be.
    pub tx_starts: VecDeque<(u16, PrivateStart)>,
    /// Chains from the guest that were not looked at: only `recall` gives such back.
    pub unused_tx: Vec<Chain<'mem, Readable>>,
    /// Buffers that hold nothing: only `recall` gives such back.
    pub unused_rx: Vec<Chain<'mem, Writable>>,
}

/// Private starts of frames that a capture will want, each with its chain's head.
#[derive(Debug)]
pub struct KeptStarts {
    capture: Arc<Capture>,
    /// Whether there was a capture when the burst began.
    pub wanted: bool,
    starts: VecDeque<(u16, PrivateStart)>,
}

impl KeptStarts {
    fn new(capture: Arc<Capture>) -> Self {
        KeptStarts { capture, wanted: false, starts: VecDeque::new() }
    }

    /// Looks whether there is a capture: once a burst.
    #[inline]
    fn refresh(&mut self) {
        self.wanted = self.capture.is_on();
    }

    /// Keeps the start that [`admit`](crate::vnet_header::admit) made of a chain's frame.
    #[inline(never)]
    fn keep(&mut self, head: u16, start: &PrivateStart, outcome: Outcome) {
        // Of these nothing was copied.
        if ![Drop::TooShort, Drop::TooLong].map(Outcome::Dropped).contains(&outcome) {
            self.starts.push_back((head, start.clone()));
        }
    }

    /// Gives them to the capture.
    #[inline]
    fn finish(&mut self, finished: &mut Finished<'_>) {
        if !self.starts.is_empty() {
            finished.tx_starts.append(&mut self.starts);
        }
    }
}

impl<'mem> Finished<'mem> {
    /// Takes over chains of frames from the guest, and what became of these.
    #[inline]
    pub fn take_tx(&mut self, done: &mut Vec<(Chain<'mem, Readable>, Outcome)>) {
        if self.tx.is_empty() {
            std::mem::swap(&mut self.tx, done);
        } else {
            self.tx.append(done);
        }
    }
}

/// The host side of one queue pair: it stays open over all sessions.
#[derive(Debug)]
pub enum HostQueue {
    /// A queue of a TAP device.
    Tap(Box<tap::TapQueue>),
    /// A queue of a network device, through an AF_XDP socket.
    AfXdp(Box<af_xdp::XdpQueue>),
    /// Frames go back to the guest that sent them.
    Loopback,
}

impl HostQueue {
    /// What the port can do with a frame's offloads.
    pub fn offloads(&self) -> PortOffloads {
        match self {
            HostQueue::Tap(queue) => queue.offloads(),
            HostQueue::AfXdp(queue) => queue.offloads(),
            HostQueue::Loopback => PortOffloads::ALL,
        }
    }

    /// What its card is announced by, within these limits and this tx filter; nothing for a port
    /// without a network.
    ///
    /// # Errors
    /// No descriptor is to be had.
    pub fn announcer(
        &self,
        limits: &Arc<Limits>,
        tx_filter: &Arc<LiveFilter>,
    ) -> io::Result<Option<Announcer>> {
        let (limits, tx_filter) = (limits.clone(), tx_filter.clone());
        Ok(match self {
            HostQueue::Tap(queue) => {
                Some(Announcer::on_tap(queue.another_handle()?, limits, tx_filter))
            }
            HostQueue::AfXdp(queue) => {
                Some(Announcer::on_socket(queue.packet_socket()?, limits, tx_filter))
            }
            HostQueue::Loopback => None,
        })
    }

    /// Its descriptor once more, for another daemon to take it over; nothing if it has none that can be.
    ///
    /// # Errors
    /// No descriptor is to be had.
    pub fn handle(&self) -> io::Result<Option<OwnedFd>> {
        Ok(match self {
            HostQueue::Tap(queue) => Some(queue.another_handle()?.into()),
            HostQueue::AfXdp(_) | HostQueue::Loopback => None,
        })
    }

    /// What a successor needs beside [`handle`](Self::handle); `None` if the queue has none.
    pub fn tap_state(&self) -> Option<TapState> {
        match self {
            HostQueue::Tap(queue) => Some(queue.state()),
            HostQueue::AfXdp(_) | HostQueue::Loopback => None,
        }
    }

    /// Index of its device at any time; 0 for none, and for one in another network namespace.
    pub fn device(&self) -> Arc<AtomicU32> {
        match self {
            HostQueue::Tap(queue) => Arc::new(queue.state().index.unwrap_or(0).into()),
            HostQueue::AfXdp(queue) => queue.interface().device().clone(),
            HostQueue::Loopback => Arc::default(),
        }
    }

    /// Largest MTU in bytes of a card on it.
    pub fn largest_mtu(&self) -> u16 {
        match self {
            HostQueue::AfXdp(_) => af_xdp::MAX_MTU as u16,
            HostQueue::Tap(_) | HostQueue::Loopback => u16::MAX,
        }
    }

    /// What a thread that serves it does.
    pub fn role(&self) -> Role {
        match self {
            HostQueue::AfXdp(_) => Role::XdpWorker,
            HostQueue::Tap(_) | HostQueue::Loopback => Role::Worker,
        }
    }

    /// What judges frames for the guest, for all queues of its port.
    pub fn rx_filter(&self) -> RxFilter {
        let (judge, current) = match self {
            HostQueue::Tap(queue) => {
                (Judge::Tap(Arc::downgrade(queue.filter())), queue.filter().get())
            }
            HostQueue::AfXdp(queue) => {
                (Judge::AfXdp(Arc::downgrade(queue.interface())), queue.interface().filter())
            }
            HostQueue::Loopback => (Judge::Nobody, Filter::default()),
        };
        RxFilter { judge, current: Arc::new(LiveFilter::new(current)) }
    }

    /// What is counted of its port's traffic, in `tally` by those who serve the queues.
    pub fn traffic(&self, tally: Arc<Tally>) -> Traffic {
        let interface = match self {
            HostQueue::AfXdp(queue) => Some(Arc::downgrade(queue.interface())),
            HostQueue::Tap(_) | HostQueue::Loopback => None,
        };
        Traffic::new(tally, interface)
    }

    /// Puts right what a session that panicked may have left half done.
    pub fn recover(&mut self) {
        match self {
            HostQueue::Tap(queue) => queue.recover(),
            // The session's end has closed the socket.
            HostQueue::AfXdp(_) | HostQueue::Loopback => {}
        }
    }

    /// Begins a session.
    pub fn session<'mem>(
        &'mem mut self,
        memory: &'mem Arc<GuestMemory>,
        terms: &Terms,
    ) -> Box<dyn Port<'mem> + 'mem> {
        match self {
            HostQueue::Tap(queue) => Box::new(queue.session(terms)),
            HostQueue::AfXdp(queue) => Box::new(queue.session(memory, terms)),
            HostQueue::Loopback => Box::new(loopback::Loopback::new(terms)),
        }
    }
}

/// What judges frames for a port's guest: the kernel, before they reach its memory.
#[derive(Debug, Clone)]
pub struct RxFilter {
    judge: Judge,
    /// What was set last.
    current: Arc<LiveFilter>,
}

/// Where frames are judged. Whoever has one does not keep the device: that is closed with the port's
/// queues, by their threads.
#[derive(Debug, Clone)]
enum Judge {
    /// In a filter of the TAP's queues.
    Tap(Weak<tap::TapFilter>),
    /// In the XDP program.
    AfXdp(Weak<af_xdp::Interface>),
    /// There is no host.
    Nobody,
}

impl RxFilter {
    /// The filter that is in force.
    pub fn get(&self) -> Arc<Filter> {
        self.current.get()
    }

    /// Has frames judged by this filter from now on, whatever runs. For the port's control thread,
    /// which has the [`role`](Self::role).
    ///
    /// # Errors
    /// Why not; the filter of before is in force then.
    pub fn set(&self, filter: &Filter) -> io::Result<()> {
        let stopped = || io::Error::other("the port has stopped");
        match &self.judge {
            Judge::Tap(tap) => tap.upgrade().ok_or_else(stopped)?.set(filter)?,
            Judge::AfXdp(interface) => {
                let set = interface.upgrade().ok_or_else(stopped)?.set_filter(filter);
                set.map_err(|error| io::Error::other(error.to_string()))?;
            }
            Judge::Nobody if filter.is_none() => {}
            Judge::Nobody => {
                return Err(io::Error::other("a loopback port has nobody to filter for"));
            }
        }
        self.current.set(filter.clone());
        Ok(())
    }

    /// Sets a TAP's filter, header, offloads, carrier and steering again, the latter when the next session
    /// begins: another daemon may have set them.
    ///
    /// # Errors
    /// Those of the device.
    pub fn reassert(&self) -> io::Result<()> {
        match &self.judge {
            Judge::Tap(tap) => tap.upgrade().map_or(Ok(()), |tap| tap.reassert()),
            Judge::AfXdp(_) | Judge::Nobody => Ok(()),
        }
    }

    /// What a thread does that may change it.
    pub fn role(&self) -> Role {
        match self.judge {
            Judge::Tap(_) | Judge::Nobody => Role::Control,
            Judge::AfXdp(_) => Role::XdpControl,
        }
    }
}

/// What a session of a port is to keep to.
#[derive(Debug, Clone)]
pub struct Terms {
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
    pub rules: Option<Arc<Rules>>,
    /// What of it is denied.
    pub tx_filter: Arc<LiveFilter>,
    /// Where frames are counted by whom they go to and come from.
    pub tally: Arc<Tally>,
    /// Where frames are put for an operator to look at.
    pub capture: Arc<Capture>,
}

impl Terms {
    /// What frames from the guest may be, up to `max_frame` bytes if not segmented.
    fn admission(&self, max_frame: usize) -> Admission {
        Admission {
            header_length: self.negotiated.header_length(),
            offloads: self.negotiated.host(),
            max_frame,
            rules: self.rules.clone(),
            filter: FilterView::new(self.tx_filter.clone()),
            peeks: false,
            copies_small: false,
        }
    }
}
