//! What may be known of a port from outside while it runs: its threads tell, whoever asks reads.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::counters::PairCounters;
use crate::descriptors::DescriptorQuota;
use crate::endpoint::Frontend;
use crate::guest::MemoryQuota;
use crate::policy::{Limits, LiveFilter};
use crate::port::{Mode, RxFilter};
use crate::sys::eventfd::Waker;
use crate::sys::process::ThreadClock;
use crate::traffic::Traffic;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nobody panics while holding one of these.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A queue pair.
#[derive(Debug, Default)]
pub struct PairStatus {
    /// What it has counted.
    pub counters: PairCounters,
    /// Since when its thread runs, and by which clock.
    thread: OnceLock<(Instant, ThreadClock)>,
    mode: AtomicU8,
    /// Woken when the port's device is found not to work.
    trouble: OnceLock<Arc<Waker>>,
    serving: AtomicBool,
    fault: Mutex<Option<String>>,
}

impl PairStatus {
    /// One that counts on from these.
    pub fn counting_on(counters: PairCounters) -> Self {
        PairStatus { counters, ..PairStatus::default() }
    }

    /// Its thread runs from now on, by this clock.
    pub fn began(&self, clock: ThreadClock) {
        let _ = self.thread.set((Instant::now(), clock));
    }

    /// How long its thread has run on a processor, and how long it has not; nothing when it has ended.
    pub fn times(&self) -> Option<(Duration, Duration)> {
        let (since, clock) = self.thread.get()?;
        let busy = clock.elapsed()?;
        Some((busy, since.elapsed().saturating_sub(busy)))
    }

    /// Has this woken when its device is found not to work.
    pub fn tell_of_trouble(&self, waker: Arc<Waker>) {
        let _ = self.trouble.set(waker);
    }

    /// How it moves frames now. Its worker says so.
    #[inline]
    pub fn set_mode(&self, mode: Mode) {
        let before = self.mode.load(Ordering::Relaxed);
        if before == mode as u8 {
            return;
        }
        self.mode.store(mode as u8, Ordering::Relaxed);
        if mode == Mode::Gone
            && let Some(waker) = self.trouble.get()
        {
            waker.wake();
        }
    }

    /// How it has moved frames last.
    pub fn mode(&self) -> Mode {
        let number = self.mode.load(Ordering::Relaxed);
        Mode::ALL.into_iter().find(|mode| *mode as u8 == number).unwrap_or_default()
    }

    /// Its rings run from now on, or do no more.
    pub fn set_serving(&self, serving: bool) {
        self.serving.store(serving, Ordering::Relaxed);
    }

    /// Whether its rings run.
    pub fn is_serving(&self) -> bool {
        self.serving.load(Ordering::Relaxed)
    }

    /// Why it has stopped until the guest resets it, or that it goes on.
    pub fn set_fault(&self, fault: Option<String>) {
        *lock(&self.fault) = fault;
    }

    /// Why it has stopped, if it has.
    pub fn fault(&self) -> Option<String> {
        lock(&self.fault).clone()
    }
}

/// The frontend, as far as there is one.
#[derive(Debug, Clone, Copy, Default)]
pub struct FrontendStatus {
    /// Since when one is connected.
    pub since: Option<Instant>,
    /// The feature bits that it has set.
    pub features: Option<u64>,
    /// Connections so far.
    pub connections: u64,
    /// Process that is connected, if that is known.
    pub process: Option<i32>,
    /// Whether another one has connected since: it waits, or has gone again, which nobody sees.
    pub another_waits: bool,
    /// Why no other VMM can find the port's socket, if that is so.
    pub hidden: Option<&'static str>,
}

/// What is denied of a port's frames. Both may be changed while it runs.
#[derive(Debug)]
pub struct Filters {
    /// Of what the guest sends: by any thread, at the next burst.
    pub tx: Arc<LiveFilter>,
    /// Of what it is given: by the port's control thread, at once.
    pub rx: RxFilter,
}

/// A port.
#[derive(Debug)]
pub struct PortStatus {
    /// Its name.
    pub name: String,
    /// Where frames go, in words.
    pub host: String,
    /// Index of its network device; 0 for none, and for one in another network namespace.
    pub device: Arc<AtomicU32>,
    /// Where its frontend comes from.
    pub frontend: Frontend,
    /// How much it may move.
    pub limits: Arc<Limits>,
    /// What it may move.
    pub filters: Filters,
    /// Whom its guest speaks to, while somebody asks.
    pub traffic: Traffic,
    /// Its limit on mapped bytes, and how many are mapped.
    pub memory: Arc<MemoryQuota>,
    /// Its part of the budget of descriptors.
    pub descriptors: Arc<DescriptorQuota>,
    /// Its queue pairs.
    pub pairs: Vec<Arc<PairStatus>>,
    connection: Mutex<FrontendStatus>,
    /// Its socket for frontends, for another daemon or port.
    listener: Mutex<Option<OwnedFd>>,
    link_down: AtomicBool,
    ended: AtomicBool,
}

impl PortStatus {
    /// A port without a frontend.
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

    /// Keeps its socket for frontends, for another daemon or port, or none any more.
    pub fn set_listener(&self, listener: Option<OwnedFd>) {
        *lock(&self.listener) = listener;
    }

    /// That socket, by another descriptor.
    ///
    /// # Errors
    /// No descriptor is to be had.
    pub fn listener(&self) -> io::Result<Option<OwnedFd>> {
        lock(&self.listener).as_ref().map(OwnedFd::try_clone).transpose()
    }

    /// An operator has plugged its cable in, or out.
    pub fn set_link(&self, up: bool) {
        self.link_down.store(!up, Ordering::Relaxed);
    }

    /// Whether its cable is plugged in.
    pub fn has_link(&self) -> bool {
        !self.link_down.load(Ordering::Relaxed)
    }

    /// Its thread ends, and will not come back.
    pub fn set_ended(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }

    /// Whether its device does not work, as the last that was moved has shown.
    pub fn is_degraded(&self) -> bool {
        self.pairs.iter().any(|pair| pair.is_serving() && pair.mode() == Mode::Gone)
    }

    /// Whether its thread has ended.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    /// A frontend has connected: this process, if that is known.
    pub fn connected(&self, process: Option<i32>) {
        let mut status = lock(&self.connection);
        (status.since, status.process) = (Some(Instant::now()), process);
        status.another_waits = false;
        status.connections += 1;
    }

    /// Another frontend has connected since.
    pub fn set_another_waits(&self) {
        lock(&self.connection).another_waits = true;
    }

    /// Why no VMM can find the port's socket, if that is so.
    pub fn set_hidden(&self, why: Option<&'static str>) {
        lock(&self.connection).hidden = why;
    }

    /// So many frontends have connected before.
    pub fn set_connections(&self, connections: u64) {
        lock(&self.connection).connections = connections;
    }

    /// It has gone.
    pub fn disconnected(&self) {
        let mut status = lock(&self.connection);
        (status.since, status.features, status.process) = (None, None, None);
        self.pairs.iter().for_each(|pair| pair.set_fault(None));
    }

    /// It has set feature bits.
    pub fn set_features(&self, features: Option<u64>) {
        lock(&self.connection).features = features;
    }

    /// What is known of its frontend.
    pub fn connection(&self) -> FrontendStatus {
        *lock(&self.connection)
    }
}
