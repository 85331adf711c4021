//! The state machine of one virtio-net device: the frontend's state, and the sessions that follow from it.
//!
//! This module knows no packets. Invariant: a worker serves exactly the rings, memory and features of the
//! frontend's state. A request that changes one of them ends the session of each queue pair concerned. A new
//! session begins from the new state, at the used index in guest memory.
//!
//! The rules are those of the vhost-user specification, with two exceptions for frontends: QEMU enables rings
//! before it negotiates features, and cloud-hypervisor sends the available index as a ring's base.

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
    /// With REPLY_ACK the frontend receives an error; the connection stays open.
    Refused(String),
    /// The request has a reply of its own, which cannot express a refusal: the connection must be closed.
    Unanswerable(String),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::Refused(why) | Refusal::Unanswerable(why) => f.write_str(why),
        }
    }
}

/// Result of a request: its own reply, if it has one.
type Answer = Result<Option<Reply>, Refusal>;

fn refused<T>(why: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal::Refused(why.into()))
}

impl From<MemoryError> for Refusal {
    fn from(error: MemoryError) -> Self {
        Refusal::Refused(error.to_string())
    }
}

/// State that the frontend has set over one connection.
#[derive(Debug, Default)]
struct FrontendState {
    features: Option<Negotiated>,
    protocol_features: Option<ProtocolFeatures>,
    status: u8,
    /// MTU in bytes, by NET_SET_MTU.
    mtu: Option<u16>,
    /// Memory table; it includes the dirty log while LOG_ALL is negotiated.
    memory: Arc<GuestMemory>,
    /// Dirty log, by SET_LOG_BASE.
    log: Option<Arc<DirtyLog>>,
    inflight: Option<Arc<Inflight>>,
    transfer: Option<Transfer>,
    /// Two rings for each queue pair, and one more for a control virtqueue.
    rings: Vec<VringState>,
    /// Channel for requests to the frontend; the daemon sends none.
    backend_requests: Option<Arc<File>>,
}

/// The virtio-net device of one port: its workers, and the frontend's state.
#[derive(Debug)]
pub struct Device {
    name: String,
    offer: Offer,
    config: NetConfig,
    /// Largest MTU in bytes that the host side carries.
    largest_mtu: u16,
    requires_sealed_memory: bool,
    anti_spoofing: Option<Arc<AntiSpoofing>>,
    announcer: Option<Announcer>,
    limits: Option<Arc<Limits>>,
    quota: Arc<MemoryQuota>,
    descriptors: Option<Arc<DescriptorQuota>>,
    workers: Vec<Worker>,
    /// True while no session may begin: while another daemon or another port takes over the guest, and afterwards.
    suspended: bool,
    frontend: FrontendState,
}

impl Device {
    /// Creates a device with one queue pair per worker, before the first frontend connects.
    pub fn new(name: String, offer: Offer, config: NetConfig, workers: Vec<Worker>) -> Self {
        let mut device = Device {
            name,
            offer,
            config,
            largest_mtu: u16::MAX,
            requires_sealed_memory: false,
            anti_spoofing: None,
            announcer: None,
            limits: None,
            quota: Arc::default(),
            descriptors: None,
            workers,
            suspended: false,
            frontend: FrontendState::default(),
        };
        device.forget();
        device
    }

    /// Sets whether memory is refused that is not sealed against truncation of its file.
    pub fn require_sealed_memory(&mut self, required: bool) {
        self.requires_sealed_memory = required;
    }

    /// Sets the largest MTU in bytes that the frontend can set.
    pub fn set_largest_mtu(&mut self, mtu: u16) {
        self.largest_mtu = mtu;
    }

    /// Sets the limit on mapped bytes, before a frontend connects.
    pub fn set_quota(&mut self, quota: Arc<MemoryQuota>) {
        self.quota = quota;
        self.forget();
    }

    /// Sets the limit on descriptors that are kept for the frontend.
    pub fn set_descriptor_quota(&mut self, quota: Arc<DescriptorQuota>) {
        self.descriptors = Some(quota);
    }

    /// Sets the anti-spoofing rules for the guest's frames, or removes them; new sessions begin.
    pub fn set_anti_spoofing(&mut self, rules: Option<Arc<AntiSpoofing>>) {
        self.anti_spoofing = rules;
        self.restart_all();
    }

    /// Sets the announcer of SEND_RARP's addresses; a loopback port has none.
    pub fn set_announcer(&mut self, announcer: Option<Announcer>) {
        self.announcer = announcer;
    }

    /// Sets the rate limits whose debt is part of the device state.
    pub fn set_limits(&mut self, limits: Arc<Limits>) {
        self.limits = Some(limits);
    }

    /// Sets the link state; new sessions begin. While the link is down, workers drop the guest's frames and give
    /// the guest none.
    pub fn set_link(&mut self, up: bool) {
        self.config.link = up;
        self.restart_all();
    }

    /// Returns the port's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the workers, one per queue pair.
    pub fn workers(&self) -> &[Worker] {
        &self.workers
    }

    /// Returns the negotiated feature bits; `None` before SET_FEATURES.
    pub fn features(&self) -> Option<u64> {
        self.frontend.features.map(|features| features.bits())
    }

    /// Returns whether REPLY_ACK is negotiated.
    pub fn acknowledges(&self) -> bool {
        self.frontend
            .protocol_features
            .is_some_and(|features| features.contains(ProtocolFeatures::REPLY_ACK))
    }

    /// Ends all sessions, and clears the frontend's state after it has disconnected.
    pub fn forget(&mut self) {
        worker::end_all(&mut self.workers);
        let rings = (0..=2 * self.workers.len()).map(|_| VringState::default()).collect();
        // The old memory is unmapped before the next frontend maps any, which then has the port's whole limit.
        let memory = Arc::new(GuestMemory::within(self.quota.clone()));
        self.frontend = FrontendState { rings, memory, ..FrontendState::default() };
        self.count_descriptors();
    }

    /// Returns the index of the control virtqueue, if the negotiated features let the frontend pass it on.
    fn control_ring(&self) -> Option<usize> {
        self.frontend.features?.control_ring(self.workers.len())
    }

    /// Returns the queue pair whose worker serves a ring; the first one serves the control virtqueue.
    fn pair_of(&self, ring: usize) -> usize {
        if Some(ring) == self.control_ring() { 0 } else { ring / 2 }
    }

    /// Returns the MTU in bytes that the configuration space shows: the frontend's, or else the port's.
    fn mtu(&self) -> u16 {
        self.frontend.mtu.unwrap_or(self.config.mtu)
    }
}
