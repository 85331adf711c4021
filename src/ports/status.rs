//! The state of a port: its threads write it, and other threads read it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::descriptors::DescriptorQuota;
use crate::endpoint::Frontend;
use crate::guest::MemoryQuota;
use crate::policy::{Limits, LiveFilter};
use crate::port::{Mode, RxFilter};
use crate::traffic::Traffic;
use crate::worker::PairStatus;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No thread panics while it holds one of these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The state of the connection to the frontend.
#[derive(Debug, Clone, Copy, Default)]
pub struct FrontendStatus {
    /// Start of the present connection.
    pub since: Option<Instant>,
    /// Feature bits that the frontend has set.
    pub features: Option<u64>,
    /// Number of connections so far.
    pub connections: u64,
    /// Process ID of the frontend, if the kernel reports it.
    pub process: Option<i32>,
    /// True if another frontend has connected since. It waits, or has disconnected again unnoticed.
    pub another_waits: bool,
    /// The reason why no other VMM can find the port's socket, if that is so.
    pub hidden: Option<&'static str>,
}

/// The packet filters of a port. Both can change while the port runs.
#[derive(Debug)]
pub struct Filters {
    /// Filter of the frames that the guest sends. Any thread sets it; it takes effect at the next burst.
    pub tx: Arc<LiveFilter>,
    /// Filter of the frames for the guest. The control thread sets it; it takes effect at once.
    pub rx: RxFilter,
}

/// The state of a port.
#[derive(Debug)]
pub struct PortStatus {
    /// The port's name.
    pub name: String,
    /// The host side, in words.
    pub host: String,
    /// Index of the network device; 0 for none, and for a device in another network namespace.
    pub device: Arc<AtomicU32>,
    /// The source of frontend connections.
    pub frontend: Frontend,
    /// The rate limits.
    pub limits: Arc<Limits>,
    /// The packet filters.
    pub filters: Filters,
    /// The traffic by protocol and peer, which is counted on request.
    pub traffic: Traffic,
    /// The limit on mapped bytes, and the number of mapped bytes.
    pub memory: Arc<MemoryQuota>,
    /// The port's share of the descriptor limit.
    pub descriptors: Arc<DescriptorQuota>,
    /// The states of the queue pairs.
    pub pairs: Vec<Arc<PairStatus>>,
    connection: Mutex<FrontendStatus>,
    /// The socket that VMMs connect to, for another daemon or port.
    listener: Mutex<Option<OwnedFd>>,
    link_down: AtomicBool,
    ended: AtomicBool,
}

impl PortStatus {
    /// Creates the state of a port without a frontend.
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        name: String,
        host: String,
        device: Arc<AtomicU32>,
        frontend: Frontend,
        limits: Arc<Limits>,
        filters: Filters,
        traffic: Traffic,
        memory: Arc<MemoryQuota>,
        descriptors: Arc<DescriptorQuota>,
        pairs: Vec<Arc<PairStatus>>,
    ) -> Self {
        let (connection, listener, link_down, ended) = Default::default();
        PortStatus {
            name,
            host,
            device,
            frontend,
            limits,
            filters,
            traffic,
            memory,
            descriptors,
            pairs,
            connection,
            listener,
            link_down,
            ended,
        }
    }

    /// Keeps the socket that VMMs connect to, for another daemon or port; `None` closes it.
    pub fn set_listener(&self, listener: Option<OwnedFd>) {
        *lock(&self.listener) = listener;
    }

    /// Duplicates the descriptor of the socket that VMMs connect to.
    ///
    /// # Errors
    /// The process has no descriptor left.
    pub fn listener(&self) -> io::Result<Option<OwnedFd>> {
        lock(&self.listener).as_ref().map(OwnedFd::try_clone).transpose()
    }

    /// Records whether the link is up.
    pub fn set_link(&self, up: bool) {
        self.link_down.store(!up, Ordering::Relaxed);
    }

    /// Returns whether the link is up.
    pub fn has_link(&self) -> bool {
        !self.link_down.load(Ordering::Relaxed)
    }

    /// Records that the control thread has ended.
    pub fn set_ended(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }

    /// Returns whether the port's device does not work, as the last transfer has shown.
    pub fn is_degraded(&self) -> bool {
        self.pairs.iter().any(|pair| pair.is_serving() && pair.mode() == Mode::Gone)
    }

    /// Returns whether the control thread has ended.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    /// Records a new connection; `process` is the frontend's process ID, if the kernel reports it.
    pub fn connected(&self, process: Option<i32>) {
        let mut status = lock(&self.connection);
        (status.since, status.process) = (Some(Instant::now()), process);
        status.another_waits = false;
        status.connections += 1;
    }

    /// Records that another frontend has connected since.
    pub fn set_another_waits(&self) {
        lock(&self.connection).another_waits = true;
    }

    /// Records the reason why no VMM can find the port's socket, or `None`.
    pub fn set_hidden(&self, why: Option<&'static str>) {
        lock(&self.connection).hidden = why;
    }

    /// Sets the number of connections so far.
    pub fn set_connections(&self, connections: u64) {
        lock(&self.connection).connections = connections;
    }

    /// Records that the frontend has disconnected.
    pub fn disconnected(&self) {
        let mut status = lock(&self.connection);
        (status.since, status.features, status.process) = (None, None, None);
        self.pairs.iter().for_each(|pair| pair.set_fault(None));
    }

    /// Records the feature bits that the frontend has set.
    pub fn set_features(&self, features: Option<u64>) {
        lock(&self.connection).features = features;
    }

    /// Returns the state of the connection to the frontend.
    pub fn connection(&self) -> FrontendStatus {
        *lock(&self.connection)
    }
}
