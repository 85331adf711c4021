//! What may be known of a port from outside while it runs: its threads tell, whoever asks reads.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::config::Frontend;
use crate::counters::PairCounters;
use crate::policy::{Limits, LiveFilter};
use crate::port::RxFilter;
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
    serving: AtomicBool,
    fault: Mutex<Option<String>>,
}

impl PairStatus {
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
    /// Where its frontend comes from.
    pub frontend: Frontend,
    /// How much it may move.
    pub limits: Arc<Limits>,
    /// What it may move.
    pub filters: Filters,
    /// Whom its guest speaks to, while somebody asks.
    pub traffic: Traffic,
    /// Its queue pairs.
    pub pairs: Vec<Arc<PairStatus>>,
    connection: Mutex<FrontendStatus>,
}

impl PortStatus {
    /// A port without a frontend.
    pub fn new(
        name: String,
        host: String,
        frontend: Frontend,
        limits: Arc<Limits>,
        filters: Filters,
        traffic: Traffic,
        pairs: Vec<Arc<PairStatus>>,
    ) -> Self {
        PortStatus {
            name,
            host,
            frontend,
            limits,
            filters,
            traffic,
            pairs,
            connection: Mutex::default(),
        }
    }

    /// A frontend has connected.
    pub fn connected(&self) {
        let mut status = lock(&self.connection);
        status.since = Some(Instant::now());
        status.connections += 1;
    }

    /// It has gone.
    pub fn disconnected(&self) {
        let mut status = lock(&self.connection);
        (status.since, status.features) = (None, None);
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
