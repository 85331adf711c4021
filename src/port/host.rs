//! The host side of a queue pair, and the filter for frames to its guest: one type each for all kinds of
//! port.
//!
//! Invariant: a [`HostQueue`] stays open over all sessions. An [`RxFilter`] does not keep the device open: the
//! device is closed with the port's queues, by their threads.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Weak};

use super::{Announcer, Port, SessionConfig, TapState, Virtqueues, af_xdp, loopback, tap};
use crate::features::PortOffloads;
use crate::guest::{GuestMemory, Virtqueue};
use crate::policy::{Filter, Limits, LiveFilter};
use crate::sandbox::Role;
use crate::traffic::{PeerCounter, PeerTable, Traffic};

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
        let (backend, current) = match self {
            HostQueue::Tap(queue) => {
                (FilterBackend::Tap(Arc::downgrade(queue.filter())), queue.filter().get())
            }
            HostQueue::AfXdp(queue) => (
                FilterBackend::AfXdp(Arc::downgrade(queue.interface())),
                queue.interface().filter(),
            ),
            HostQueue::Loopback => (FilterBackend::Nobody, Filter::default()),
        };
        RxFilter { backend, current: Arc::new(LiveFilter::new(current)) }
    }

    /// What is counted of its port's traffic, in `peers` by those who serve the queues.
    pub fn traffic(&self, peers: Arc<PeerTable>) -> Traffic {
        let counter: Option<Weak<dyn PeerCounter>> = match self {
            HostQueue::AfXdp(queue) => Some(Arc::downgrade(queue.interface()) as _),
            HostQueue::Tap(_) | HostQueue::Loopback => None,
        };
        Traffic::new(peers, counter)
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
        config: &SessionConfig,
    ) -> Box<dyn Port<'mem> + 'mem> {
        match self {
            HostQueue::Tap(queue) => Box::new(queue.session(config)),
            HostQueue::AfXdp(queue) => Box::new(queue.session(memory, queues, config)),
            HostQueue::Loopback => {
                let next_used = queues.tx.as_ref().map_or(0, Virtqueue::next_used);
                Box::new(loopback::Loopback::new(config, next_used))
            }
        }
    }
}

/// What judges frames for a port's guest: the kernel, before they reach its memory.
#[derive(Debug, Clone)]
pub struct RxFilter {
    backend: FilterBackend,
    /// What was set last.
    current: Arc<LiveFilter>,
}

/// Where frames are judged. Whoever has one does not keep the device: that is closed with the port's
/// queues, by their threads.
#[derive(Debug, Clone)]
enum FilterBackend {
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
        match &self.backend {
            FilterBackend::Tap(tap) => tap.upgrade().ok_or_else(stopped)?.set(filter)?,
            FilterBackend::AfXdp(interface) => {
                let set = interface.upgrade().ok_or_else(stopped)?.set_filter(filter);
                set.map_err(|error| io::Error::other(error.to_string()))?;
            }
            FilterBackend::Nobody if filter.is_none() => {}
            FilterBackend::Nobody => {
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
        match &self.backend {
            FilterBackend::Tap(tap) => tap.upgrade().map_or(Ok(()), |tap| tap.reassert()),
            FilterBackend::AfXdp(_) | FilterBackend::Nobody => Ok(()),
        }
    }

    /// What a thread does that may change it.
    pub fn role(&self) -> Role {
        match self.backend {
            FilterBackend::Tap(_) | FilterBackend::Nobody => Role::Control,
            FilterBackend::AfXdp(_) => Role::XdpControl,
        }
    }
}
