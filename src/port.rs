//! The seam between a virtqueue and the host's network.
//!
//! A port is shown the virtqueues. It has the host read and write the guest's buffers themselves, and
//! completes chains when the host has finished with them: no `read_frame(&mut [u8])`. A chain that has not
//! completed is as it was popped, so a session can end at any moment.

pub mod af_xdp;
mod announcer;
mod completions;
pub mod loopback;
mod mtu;
pub mod tap;

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Weak};
use std::time::Duration;

pub use announcer::Announcer;
pub use completions::{Captured, Completions, Moved, Outcome};
pub use tap::TapState;

use crate::features::{Negotiated, PortOffloads};
use crate::guest::{GuestMemory, Readable, Virtqueue, Writable};
use crate::policy::{Filter, FilterView, Limits, LiveFilter, Rules};
use crate::sandbox::Role;
use crate::traffic::{Tally, Traffic};
use crate::vnet_header::Admission;

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

    /// Completes all chains that the host has finished with.
    fn reap(&mut self, queues: &mut Virtqueues<'mem>, done: &mut Completions);

    /// Takes this many frames for the guest from the host each time from now on; the rest stays
    /// there.
    fn limit_rx(&mut self, frames: usize);

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
        queues: &Virtqueues<'mem>,
        terms: &Terms,
    ) -> Box<dyn Port<'mem> + 'mem> {
        match self {
            HostQueue::Tap(queue) => Box::new(queue.session(terms)),
            HostQueue::AfXdp(queue) => Box::new(queue.session(memory, queues, terms)),
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
}

impl Terms {
    /// What frames from the guest may be, up to `max_frame` bytes if not segmented.
    fn admission(&self, max_frame: usize) -> Admission {
        let filter = FilterView::new(self.tx_filter.clone());
        Admission::new(&self.negotiated, max_frame, self.rules.clone(), filter)
    }
}
