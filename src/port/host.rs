//! The host side of a queue pair, and the packet filter of frames to its guest: one type each for all kinds of
//! port.
//!
//! Invariant: a [`HostQueue`] stays open over all sessions. An [`RxFilter`] does not keep the device open: the
//! threads of the port's queues close the device.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Weak};

use super::{Announcer, Port, SessionConfig, TapState, Virtqueues, af_xdp, loopback, tap};
use crate::features::PortOffloads;
use crate::guest::GuestMemory;
use crate::policy::{Filter, Limits, LiveFilter};
use crate::sandbox::Role;
use crate::traffic::{PeerCounter, PeerTable, Traffic};

/// The host side of one queue pair, which stays open over all sessions.
#[derive(Debug)]
pub enum HostQueue {
    /// A queue of a TAP.
    Tap(Box<tap::TapQueue>),
    /// A queue of a network device, used through an AF_XDP socket.
    AfXdp(Box<af_xdp::XdpQueue>),
    /// No device: frames return to the guest that sent them.
    Loopback,
}

impl HostQueue {
    /// Returns the offloads that the port supports.
    pub fn offloads(&self) -> PortOffloads {
        match self {
            HostQueue::Tap(queue) => queue.offloads(),
            HostQueue::AfXdp(queue) => queue.offloads(),
            HostQueue::Loopback => PortOffloads::ALL,
        }
    }

    /// Creates an announcer of the port's virtio-net device, which keeps to the limits and the tx filter. Returns
    /// `None` for a port without a network.
    ///
    /// # Errors
    /// The process or the host has no descriptor left.
    pub fn announcer(
        &self,
        limits: &Arc<Limits>,
        tx_filter: &Arc<LiveFilter>,
    ) -> io::Result<Option<Announcer>> {
        let (limits, tx_filter) = (limits.clone(), tx_filter.clone());
        Ok(match self {
            HostQueue::Tap(queue) => Some(Announcer::on_tap(queue.duplicate()?, limits, tx_filter)),
            HostQueue::AfXdp(queue) => {
                Some(Announcer::on_socket(queue.packet_socket()?, limits, tx_filter))
            }
            HostQueue::Loopback => None,
        })
    }

    /// Duplicates the queue's descriptor for a take-over by another daemon. Returns `None` for a queue that
    /// cannot be taken over.
    ///
    /// # Errors
    /// The process or the host has no descriptor left.
    pub fn handle(&self) -> io::Result<Option<OwnedFd>> {
        Ok(match self {
            HostQueue::Tap(queue) => Some(queue.duplicate()?.into()),
            HostQueue::AfXdp(_) | HostQueue::Loopback => None,
        })
    }

    /// Returns the state of the TAP that a successor needs beside [`handle`](Self::handle); `None` for other
    /// queues.
    pub fn tap_state(&self) -> Option<TapState> {
        match self {
            HostQueue::Tap(queue) => Some(queue.state()),
            HostQueue::AfXdp(_) | HostQueue::Loopback => None,
        }
    }

    /// Returns the current index of the device; 0 without a device, and for a device in another network namespace.
    pub fn device(&self) -> Arc<AtomicU32> {
        match self {
            HostQueue::Tap(queue) => Arc::new(queue.state().index.unwrap_or(0).into()),
            HostQueue::AfXdp(queue) => queue.interface().device().clone(),
            HostQueue::Loopback => Arc::default(),
        }
    }

    /// Returns the largest MTU in bytes that a virtio-net device on this queue can have.
    pub fn largest_mtu(&self) -> u16 {
        match self {
            HostQueue::AfXdp(_) => af_xdp::MAX_MTU as u16,
            HostQueue::Tap(_) | HostQueue::Loopback => u16::MAX,
        }
    }

    /// Returns the sandbox role of the thread that serves the queue.
    pub fn role(&self) -> Role {
        match self {
            HostQueue::AfXdp(_) => Role::XdpWorker,
            HostQueue::Tap(_) | HostQueue::Loopback => Role::Worker,
        }
    }

    /// Returns the filter of frames to the guest, for all queues of the port.
    pub fn rx_filter(&self) -> RxFilter {
        let (backend, current) = match self {
            HostQueue::Tap(queue) => {
                (FilterBackend::Tap(Arc::downgrade(queue.filter())), queue.filter().get())
            }
            HostQueue::AfXdp(queue) => (
                FilterBackend::AfXdp(Arc::downgrade(queue.interface())),
                queue.interface().filter(),
            ),
            HostQueue::Loopback => (FilterBackend::Loopback, Filter::default()),
        };
        RxFilter { backend, current: Arc::new(LiveFilter::new(current)) }
    }

    /// Creates the counter of the port's traffic. The workers count in `peers`.
    pub fn traffic(&self, peers: Arc<PeerTable>) -> Traffic {
        let counter: Option<Weak<dyn PeerCounter>> = match self {
            HostQueue::AfXdp(queue) => Some(Arc::downgrade(queue.interface()) as _),
            HostQueue::Tap(_) | HostQueue::Loopback => None,
        };
        Traffic::new(peers, counter)
    }

    /// Restores the queue after a session that panicked.
    pub fn recover(&mut self) {
        match self {
            HostQueue::Tap(queue) => queue.recover(),
            // Dropping the session has closed the socket.
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
            HostQueue::Loopback => Box::new(loopback::Loopback::new(config, queues.tx_next_used())),
        }
    }
}

/// The filter of frames to a port's guest. The kernel applies the filter before a frame reaches guest memory.
#[derive(Debug, Clone)]
pub struct RxFilter {
    backend: FilterBackend,
    /// The filter that was set last.
    current: Arc<LiveFilter>,
}

/// The place where the kernel filters frames. The references are weak, so the device closes with the port's queues.
#[derive(Debug, Clone)]
enum FilterBackend {
    /// The socket filter of the TAP's queues.
    Tap(Weak<tap::TapFilter>),
    /// The XDP program.
    AfXdp(Weak<af_xdp::Interface>),
    /// No filter: a loopback port gets no frames from the host.
    Loopback,
}

impl RxFilter {
    /// Returns the filter in force.
    pub fn get(&self) -> Arc<Filter> {
        self.current.get()
    }

    /// Replaces the filter, with or without a running session. Called by the port's control thread, which needs
    /// the [`role`](Self::role).
    ///
    /// # Errors
    /// The port has stopped, or the kernel or the device refuses the filter. The previous filter stays in force.
    pub fn set(&self, filter: &Filter) -> io::Result<()> {
        let stopped = || io::Error::other("cannot set rx-filter: the port has stopped");
        match &self.backend {
            FilterBackend::Tap(tap) => tap.upgrade().ok_or_else(stopped)?.set(filter)?,
            FilterBackend::AfXdp(interface) => {
                let set = interface.upgrade().ok_or_else(stopped)?.set_filter(filter);
                set.map_err(|error| io::Error::other(error.to_string()))?;
            }
            FilterBackend::Loopback if filter.is_none() => {}
            FilterBackend::Loopback => {
                let why = "a loopback port gets no frames from the host; remove rx-filter";
                return Err(io::Error::other(format!("cannot set rx-filter: {why}")));
            }
        }
        self.current.set(filter.clone());
        Ok(())
    }

    /// Sets a TAP's filter again, and has the next session set header length, offloads, carrier and steering
    /// again: another daemon may have changed all of them.
    ///
    /// # Errors
    /// The device refuses the filter.
    pub fn reassert(&self) -> io::Result<()> {
        match &self.backend {
            FilterBackend::Tap(tap) => tap.upgrade().map_or(Ok(()), |tap| tap.reassert()),
            FilterBackend::AfXdp(_) | FilterBackend::Loopback => Ok(()),
        }
    }

    /// Returns the sandbox role of the thread that calls [`set`](Self::set).
    pub fn role(&self) -> Role {
        match self.backend {
            FilterBackend::Tap(_) | FilterBackend::Loopback => Role::Control,
            FilterBackend::AfXdp(_) => Role::XdpControl,
        }
    }
}
