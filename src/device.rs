//! The state machine of one port: what the frontend has told us, and which sessions follow from it.
//!
//! Knows no packets. Invariant: a worker serves exactly what the state says. Every request that
//! changes a running ring, its memory or its features ends the session of its queue pair, and a
//! new one begins from the new state, at the used index in guest memory.
//!
//! The rules are the vhost-user specification's, and where frontends differ from it, theirs:
//! QEMU enables rings before it has negotiated anything, and cloud-hypervisor counts a ring's base
//! by the avail index.

mod descriptors;
mod inflight;
mod memory;
mod migration;
mod replay;
mod requests;
mod ring;
mod ring_requests;
mod sessions;
mod state;

use std::fmt;
use std::fs::File;
use std::sync::Arc;

use vhost::vhost_user::message::VhostUserProtocolFeatures as ProtocolFeatures;

use crate::descriptors::DescriptorQuota;
use crate::features::{Negotiated, Offer};
use crate::guest::{DirtyLog, GuestMemory, Inflight, MemoryError, MemoryQuota};
use crate::net_config::NetConfig;
use crate::policy::{AntiSpoofing, Limits};
use crate::port::Announcer;
use crate::protocol::Reply;
use crate::worker::{self, Worker};

use ring::VringState;
use state::Transfer;

/// A request that the device does not carry out.
#[derive(Debug)]
pub enum Refusal {
    /// The frontend is told, if it wants to know, and the connection lives on.
    Refused(String),
    /// The request demands an answer that can't be given: the connection has to be closed.
    Unanswerable(String),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::Refused(why) | Refusal::Unanswerable(why) => f.write_str(why),
        }
    }
}

/// What comes of a request: a reply of its own, or none.
type Answer = Result<Option<Reply>, Refusal>;

fn refused<T>(why: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal::Refused(why.into()))
}

impl From<MemoryError> for Refusal {
    fn from(error: MemoryError) -> Self {
        Refusal::Refused(error.to_string())
    }
}

/// What the frontend has told us over one connection.
#[derive(Debug, Default)]
struct FrontendState {
    features: Option<Negotiated>,
    protocol_features: Option<ProtocolFeatures>,
    status: u8,
    /// MTU by NET_SET_MTU.
    mtu: Option<u16>,
    /// With the log, while there is one to write.
    memory: Arc<GuestMemory>,
    log: Option<Arc<DirtyLog>>,
    inflight: Option<Arc<Inflight>>,
    transfer: Option<Transfer>,
    rings: Vec<VringState>,
    /// The channel for requests of ours, of which there are none yet.
    backend_requests: Option<Arc<File>>,
}

/// One port's device: its workers, and what a frontend has told about them.
#[derive(Debug)]
pub struct Device {
    name: String,
    offer: Offer,
    config: NetConfig,
    /// Largest MTU in bytes that the host side carries.
    largest_mtu: u16,
    requires_sealed_memory: bool,
    rules: Option<Arc<AntiSpoofing>>,
    announcer: Option<Announcer>,
    limits: Option<Arc<Limits>>,
    quota: Arc<MemoryQuota>,
    descriptors: Option<Arc<DescriptorQuota>>,
    workers: Vec<Worker>,
    /// No session begins: another daemon serves the guest, or may do so soon.
    suspended: bool,
    told: FrontendState,
}

impl Device {
    /// Makes a device with one queue pair per worker, to which no frontend has spoken yet.
    pub fn new(name: String, offer: Offer, config: NetConfig, workers: Vec<Worker>) -> Self {
        let mut device = Device {
            name,
            offer,
            config,
            largest_mtu: u16::MAX,
            requires_sealed_memory: false,
            rules: None,
            announcer: None,
            limits: None,
            quota: Arc::default(),
            descriptors: None,
            workers,
            suspended: false,
            told: FrontendState::default(),
        };
        device.forget();
        device
    }

    /// Has memory refused whose file could be truncated later.
    pub fn require_sealed_memory(&mut self, required: bool) {
        self.requires_sealed_memory = required;
    }

    /// Sets the largest MTU in bytes that the frontend can ask for.
    pub fn set_largest_mtu(&mut self, mtu: u16) {
        self.largest_mtu = mtu;
    }

    /// Sets the limit on mapped bytes, before a frontend connects.
    pub fn set_quota(&mut self, quota: Arc<MemoryQuota>) {
        self.quota = quota;
        self.forget();
    }

    /// Has what is kept for the frontend counted.
    pub fn set_descriptor_quota(&mut self, quota: Arc<DescriptorQuota>) {
        self.descriptors = Some(quota);
    }

    /// Has the guest's frames judged by these rules from now on.
    pub fn set_anti_spoofing(&mut self, rules: Option<Arc<AntiSpoofing>>) {
        self.rules = rules;
        self.restart_all();
    }

    /// Announces a card that has moved here by this.
    pub fn set_announcer(&mut self, announcer: Option<Announcer>) {
        self.announcer = announcer;
    }

    /// Has these limits move with the guest.
    pub fn set_limits(&mut self, limits: Arc<Limits>) {
        self.limits = Some(limits);
    }

    /// Moves frames from now on, or drops what the guest sends and gives it nothing.
    pub fn set_link(&mut self, up: bool) {
        self.config.link = up;
        self.restart_all();
    }

    /// The port's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The workers, one per queue pair.
    pub fn workers(&self) -> &[Worker] {
        &self.workers
    }

    /// The feature bits that the frontend has set.
    pub fn features(&self) -> Option<u64> {
        self.told.features.map(|features| features.bits())
    }

    /// Whether the frontend wants to hear of the success of requests without a reply.
    pub fn acknowledges(&self) -> bool {
        self.told
            .protocol_features
            .is_some_and(|features| features.contains(ProtocolFeatures::REPLY_ACK))
    }

    /// The frontend has gone: ends all sessions and forgets all that it said.
    pub fn forget(&mut self) {
        worker::end_all(&mut self.workers);
        let rings = (0..=2 * self.workers.len()).map(|_| VringState::default()).collect();
        // Unmapped first, so that the next frontend has all of the port's limit.
        let memory = Arc::new(GuestMemory::within(self.quota.clone()));
        self.told = FrontendState { rings, memory, ..FrontendState::default() };
        self.count_descriptors();
    }

    /// Index of the ring by which the guest gives commands, if the frontend may pass that on.
    fn control_ring(&self) -> Option<usize> {
        self.told.features?.control_ring(self.workers.len())
    }

    /// The queue pair whose worker serves a ring.
    fn pair_of(&self, ring: usize) -> usize {
        if Some(ring) == self.control_ring() { 0 } else { ring / 2 }
    }

    /// MTU in bytes that the guest is told of.
    fn mtu(&self) -> u16 {
        self.told.mtu.unwrap_or(self.config.mtu)
    }
}
