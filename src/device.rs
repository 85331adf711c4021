//! The state machine of one port: what the frontend has told us, and which sessions follow from it.
//!
//! Knows no packets. Invariant: a worker serves exactly what the state says. Every request that
//! changes a running ring, its memory or its features ends the session of its queue pair, and a
//! new one begins from the new state, at the used index in guest memory.
//!
//! The rules are the vhost-user specification's, and where frontends differ from it, theirs:
//! QEMU enables rings before it has negotiated anything, and cloud-hypervisor counts a ring's base
//! by the avail index.

mod inflight;
mod migration;
mod replay;
mod ring;
mod state;

use std::fmt;
use std::fs::File;
use std::sync::Arc;

use log::{debug, info, warn};
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures as ProtocolFeatures};

use crate::descriptors::{DescriptorQuota, STATE};
use crate::features::{Negotiated, Offer, protocol_features};
use crate::guest::layout::MAX_SIZE;
use crate::guest::memory::MAX_SLOTS;
use crate::guest::{DirtyLog, GuestMemory, Inflight, MemoryError, MemoryQuota, Unmapped};
use crate::net_config::{MIN_MTU, NetConfig};
use crate::policy::{AntiSpoofing, Limits};
use crate::port::Announcer;
use crate::protocol::{Message, Reply, Request};
use crate::sys::eventfd::NotifyFd;
use crate::worker::{self, Ended, Session, Worker};

use ring::{Kick, VringState};
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

/// Whether a request that we do not support has a reply of its own, with no way to say no in it.
fn demands_answer(code: FrontendReq) -> bool {
    matches!(
        code,
        FrontendReq::CREATE_CRYPTO_SESSION
            | FrontendReq::POSTCOPY_ADVISE
            | FrontendReq::POSTCOPY_END
            | FrontendReq::GET_SHARED_OBJECT
            | FrontendReq::GET_SHMEM_CONFIG
    )
}

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

    /// Descriptors that are kept for the frontend, but for its connection.
    fn kept_descriptors(&self) -> usize {
        let FrontendState { memory, log, inflight, transfer, backend_requests, .. } = &self.told;
        let few = [log.is_some(), inflight.is_some(), backend_requests.is_some()];
        let transfer = if matches!(transfer, Some(Transfer::Load(_))) { STATE } else { 0 };
        let rings: usize = self.told.rings.iter().map(VringState::descriptors).sum();
        memory.len() + few.into_iter().filter(|is| *is).count() + transfer + rings
    }

    /// The most of them that there are after a request.
    fn descriptors_after(&self, request: &Request) -> usize {
        let kept = self.kept_descriptors();
        let instead_of = |replaced: bool| kept + usize::from(!replaced);
        let of_ring = |index: &u32, file: &Option<File>, has: fn(&VringState) -> bool| {
            let ring = self.told.rings.get(*index as usize);
            ring.map_or(kept, |ring| instead_of(file.is_none() || has(ring)))
        };
        match request {
            Request::SetMemTable(regions) => {
                (kept + regions.len()).saturating_sub(self.told.memory.len())
            }
            Request::AddMemReg(..) => kept + 1,
            Request::SetVringKick { index, file } => of_ring(index, file, VringState::has_kick),
            Request::SetVringCall { index, file } => {
                of_ring(index, file, |ring| ring.call.is_set())
            }
            Request::SetVringErr { index, file } => {
                of_ring(index, file, |ring| ring.error.is_set())
            }
            Request::SetBackendReqFd(_) => instead_of(self.told.backend_requests.is_some()),
            Request::SetLogBase { .. } => instead_of(self.told.log.is_some()),
            Request::SetInflightFd { .. } => instead_of(self.told.inflight.is_some()),
            Request::SetDeviceStateFd { .. } => kept + STATE,
            _ => kept,
        }
    }

    fn count_descriptors(&self) {
        if let Some(quota) = &self.descriptors {
            // Not more than before, or than was permitted before the request.
            let _ = quota.keep(self.kept_descriptors());
        }
    }

    /// Carries a request out.
    ///
    /// # Errors
    /// A [`Refusal`]; the device is as it was before.
    pub fn handle(&mut self, message: Message) -> Result<Option<Reply>, Refusal> {
        debug!("{}: {:?}", self.name, message.code);
        let after = self.descriptors_after(&message.request);
        if let Some(quota) = self.descriptors.as_ref().filter(|_| after > self.kept_descriptors()) {
            quota.keep(after).map_err(|why| match message.request {
                Request::SetLogBase { .. } | Request::SetDeviceStateFd { .. } => {
                    Refusal::Unanswerable(why)
                }
                _ => Refusal::Refused(why),
            })?;
        }
        let handled = self.carry_out(message.request);
        self.count_descriptors();
        handled
    }

    fn carry_out(&mut self, request: Request) -> Result<Option<Reply>, Refusal> {
        let reply = |value: u64| Ok(Some(Reply::U64(value)));
        match request {
            Request::GetFeatures => reply(self.offer.bits()),
            Request::SetFeatures(bits) => self.set_features(bits),
            Request::SetOwner => Ok(None),
            Request::ResetOwner => self.disable_all(),
            Request::GetProtocolFeatures => reply(protocol_features().bits()),
            Request::SetProtocolFeatures(bits) => self.set_protocol_features(bits),
            Request::GetQueueNum => {
                self.answerable(ProtocolFeatures::MQ)?;
                // cloud-hypervisor compares this with its rings, QEMU with its queue pairs: the
                // larger number satisfies both, and a ring beyond the last is refused. crosvm makes
                // as many rings as this, of which its guest takes the last one for commands.
                reply(self.told.rings.len() as u64)
            }
            Request::SetMemTable(regions) => {
                let memory = self.told.memory.replaced(regions)?;
                self.replace_memory(memory)
            }
            Request::AddMemReg(region, file) => {
                self.requires(ProtocolFeatures::CONFIGURE_MEM_SLOTS)?;
                let memory = self.told.memory.with(region, file)?;
                self.replace_memory(memory)
            }
            Request::RemMemReg(region) => {
                self.requires(ProtocolFeatures::CONFIGURE_MEM_SLOTS)?;
                let memory = self.told.memory.without(region)?;
                self.replace_memory(memory)
            }
            Request::GetMaxMemSlots => {
                self.answerable(ProtocolFeatures::CONFIGURE_MEM_SLOTS)?;
                reply(MAX_SLOTS as u64)
            }
            Request::SetVringNum { index, size } => {
                let valid = |size: &u16| size.is_power_of_two() && *size <= MAX_SIZE;
                let Some(size) = u16::try_from(size).ok().filter(valid) else {
                    return refused(format!(
                        "ring size {size} is no power of two up to {MAX_SIZE}"
                    ));
                };
                self.stopped_ring(index)?.size = size;
                Ok(None)
            }
            Request::SetVringBase { index, base } => {
                let base = u16::try_from(base)
                    .map_err(|_| Refusal::Refused(format!("ring base {base} is beyond 65535")))?;
                self.stopped_ring(index)?.base = base;
                Ok(None)
            }
            Request::SetVringAddr { index, addresses } => {
                let ring = self.ring(index)?;
                let moved = ring.addresses.is_some_and(|known| !known.same_place(&addresses));
                if moved && ring.is_running() && !ring.is_idle() {
                    return refused(format!("the addresses of ring {index} changed while it runs"));
                }
                let ring = if moved { self.stopped_ring(index)? } else { ring };
                ring.addresses = Some(addresses.into());
                Ok(None)
            }
            Request::GetVringBase { index } => self.stop_ring(index),
            Request::SetVringKick { index, file } => self.set_vring_kick(index, file),
            Request::SetVringCall { index, file } => {
                let event = ring::foreign(file, NotifyFd::or_socket)?;
                let ring = self.ring(index)?;
                let (call, running) = (ring.call.clone(), ring.is_running());
                let worker = &self.workers[self.pair_of(index as usize)];
                call.replace(event, || worker.interrupt());
                // QEMU changes the descriptor whenever the guest masks or moves an interrupt. A
                // call that went to the last one meanwhile may be lost; one too many does no harm.
                if running {
                    worker.call();
                }
                Ok(None)
            }
            Request::SetVringErr { index, file } => {
                let event = ring::foreign(file, NotifyFd::or_socket)?;
                let error = self.ring(index)?.error.clone();
                let pair = self.pair_of(index as usize);
                error.replace(event, || self.workers[pair].interrupt());
                Ok(None)
            }
            Request::SetVringEnable { index, enable } => {
                let ring = self.ring(index)?;
                if ring.enabled.replace(enable) == Some(enable) {
                    return Ok(None);
                }
                self.restart_if_running(index)
            }
            Request::NetSetMtu(mtu) => {
                self.requires(ProtocolFeatures::MTU)?;
                let most = self.largest_mtu;
                match u16::try_from(mtu) {
                    Ok(mtu) if (MIN_MTU..=most).contains(&mtu) => self.told.mtu = Some(mtu),
                    _ => {
                        return refused(format!(
                            "cannot set MTU {mtu}: the port carries {MIN_MTU} to {most}; change the \
                             VMM's host_mtu="
                        ));
                    }
                }
                self.restart_all();
                Ok(None)
            }
            Request::SetBackendReqFd(file) => {
                self.requires(ProtocolFeatures::BACKEND_REQ)?;
                self.told.backend_requests = Some(Arc::new(file));
                Ok(None)
            }
            Request::GetConfig { offset, size, flags } => {
                self.answerable(ProtocolFeatures::CONFIG)?;
                let config = NetConfig { mtu: self.mtu(), ..self.config };
                let bytes = config.read(offset, size).unwrap_or_else(|| {
                    warn!(
                        "{}: {size} bytes at {offset} lie outside the configuration space",
                        self.name
                    );
                    Vec::new()
                });
                Ok(Some(Reply::Config { offset, flags, bytes }))
            }
            Request::SetConfig => refused("the configuration space is read-only"),
            Request::ResetDevice => {
                self.requires(ProtocolFeatures::RESET_DEVICE)?;
                self.told.features = None;
                self.told.status = 0;
                self.disable_all()
            }
            Request::SetStatus(status) => {
                self.requires(ProtocolFeatures::STATUS)?;
                let Ok(status) = u8::try_from(status) else {
                    return refused(format!("device status {status:#x} has more than 8 bits"));
                };
                self.told.status = status;
                if status == 0 {
                    self.stop_all();
                }
                Ok(None)
            }
            Request::GetStatus => {
                self.answerable(ProtocolFeatures::STATUS)?;
                reply(self.told.status.into())
            }
            Request::SetLogBase { size, offset, file } => {
                self.answerable(ProtocolFeatures::LOG_SHMFD)?;
                self.set_log(file, offset, size)
                    .map_err(|refusal| Refusal::Unanswerable(refusal.to_string()))?;
                Ok(Some(Reply::Log { size, offset }))
            }
            Request::GetInflightFd { rings, size } => {
                self.answerable(ProtocolFeatures::INFLIGHT_SHMFD)?;
                self.make_inflight(rings, size)
                    .map_err(|refusal| Refusal::Unanswerable(refusal.to_string()))
                    .map(Some)
            }
            Request::SetInflightFd { length, offset, rings, size, file } => {
                self.requires(ProtocolFeatures::INFLIGHT_SHMFD)?;
                self.set_inflight(file, offset, length, (rings, size))
            }
            Request::SetDeviceStateFd { load, file } => {
                self.answerable(ProtocolFeatures::DEVICE_STATE)?;
                self.transfer_state(load, file)
                    .map_err(|refusal| Refusal::Unanswerable(refusal.to_string()))
                    .map(Some)
            }
            Request::CheckDeviceState => {
                self.answerable(ProtocolFeatures::DEVICE_STATE)?;
                self.check_state().map(Some)
            }
            Request::SendRarp(address) => {
                self.requires(ProtocolFeatures::RARP)?;
                self.announce(address)
            }
            Request::Unsupported(code) => {
                let why = "its protocol feature was not offered".to_owned();
                Err(if demands_answer(code) {
                    Refusal::Unanswerable(why)
                } else {
                    Refusal::Refused(why)
                })
            }
        }
    }

    /// Refuses a request whose protocol feature was not negotiated.
    fn requires(&self, feature: ProtocolFeatures) -> Result<(), Refusal> {
        match self.told.protocol_features {
            Some(features) if features.contains(feature) => Ok(()),
            _ => refused(format!("its protocol feature {feature:?} was not negotiated")),
        }
    }

    /// As `requires`, for a request that can't be answered with a refusal.
    fn answerable(&self, feature: ProtocolFeatures) -> Result<(), Refusal> {
        self.requires(feature).map_err(|refusal| Refusal::Unanswerable(refusal.to_string()))
    }

    fn set_features(&mut self, bits: u64) -> Result<Option<Reply>, Refusal> {
        let negotiated = match self.offer.accept(bits) {
            Ok(negotiated) => negotiated,
            Err(error) => return refused(error.to_string()),
        };
        let running = self.told.rings.iter().any(|ring| ring.is_running() && !ring.is_idle());
        let same = |before: &Negotiated| before.is_same_but_for_the_log(&negotiated);
        if !self.told.features.as_ref().is_some_and(same) {
            if running {
                return refused("the features changed while rings run");
            }
            self.stop_all();
        }
        let before = self.told.features.replace(negotiated);
        if before != Some(negotiated) {
            info!("{}: features {bits:#x}", self.name);
        }
        if before.is_some_and(|before| before.logs()) != negotiated.logs()
            && let Err(refusal) = self.log_memory()
        {
            self.told.features = before;
            return Err(refusal);
        }
        Ok(None)
    }

    fn set_protocol_features(&mut self, bits: u64) -> Result<Option<Reply>, Refusal> {
        let surplus = bits & !protocol_features().bits();
        if surplus != 0 {
            return refused(format!("protocol feature bits {surplus:#x} were not offered"));
        }
        self.told.protocol_features = Some(ProtocolFeatures::from_bits_truncate(bits));
        Ok(None)
    }

    fn ring(&mut self, index: u32) -> Result<&mut VringState, Refusal> {
        let (pairs, control) = (self.workers.len(), self.control_ring());
        let has = |at: &usize| *at < 2 * pairs || Some(*at) == control;
        match Some(index as usize).filter(has).and_then(|at| self.told.rings.get_mut(at)) {
            Some(ring) => Ok(ring),
            None => refused(format!(
                "there is no ring {index}: the port has {} ({pairs} queue pairs); \
                 start it with a larger --queue-pairs",
                2 * pairs
            )),
        }
    }

    /// The ring, which must not run. User-mode Linux starts rings anew that it has only disabled: all
    /// such rings are stopped here, for their memory may be another driver's by now.
    fn stopped_ring(&mut self, index: u32) -> Result<&mut VringState, Refusal> {
        if self.ring(index)?.is_idle() {
            self.end_all();
            self.told.rings.iter_mut().filter(|ring| ring.is_idle()).for_each(VringState::stop);
            self.restart_all();
        }
        let ring = self.ring(index)?;
        if ring.is_running() {
            return refused(format!("ring {index} is running"));
        }
        Ok(ring)
    }

    fn set_vring_kick(&mut self, index: u32, file: Option<File>) -> Result<Option<Reply>, Refusal> {
        let event = ring::foreign(file, NotifyFd::new)?;
        if self.told.features.is_none() {
            return refused(format!("ring {index} was started before SET_FEATURES"));
        }
        let memory = self.told.memory.clone();
        let ring = self.ring(index)?;
        // Checked now, so that the frontend hears of it.
        let layout = ring.layout(&memory).map_err(Refusal::Refused)?;
        ring.check_arrival(&memory, &layout).map_err(Refusal::Refused)?;
        ring.kick = Kick::Given(event.map(Arc::new));
        ring.fault = None;
        if self.control_ring() == Some(index as usize) {
            info!("{}: control virtqueue started ring={index}; the daemon answers it", self.name);
        }
        self.restart(index);
        Ok(None)
    }

    /// GET_VRING_BASE: when it is answered, the ring's memory is touched no more.
    fn stop_ring(&mut self, index: u32) -> Result<Option<Reply>, Refusal> {
        self.ring(index).map_err(|refusal| Refusal::Unanswerable(refusal.to_string()))?;
        let pair = self.pair_of(index as usize);
        self.end(pair);
        let ring = &mut self.told.rings[index as usize];
        ring.stop();
        let num = u32::from(ring.base);
        self.begin(pair);
        Ok(Some(Reply::VringState { index, num }))
    }

    fn stop_all(&mut self) {
        self.end_all();
        self.told.rings.iter_mut().for_each(VringState::stop);
    }

    fn disable_all(&mut self) -> Result<Option<Reply>, Refusal> {
        self.stop_all();
        for ring in &mut self.told.rings {
            ring.enabled = Some(false);
        }
        Ok(None)
    }

    /// Puts a new memory table in force, under running rings if need be.
    fn replace_memory(&mut self, memory: GuestMemory) -> Result<Option<Reply>, Refusal> {
        if self.requires_sealed_memory && !memory.is_sealed() {
            return refused(
                "its file can be truncated, and --require-sealed-memory is set; give the guest \
                 memory from memory-backend-memfd, which seals it",
            );
        }
        let memory = memory.logged(self.told.memory.log().cloned())?;
        let memory = memory.recorded(self.told.inflight.clone());
        for (index, ring) in self.told.rings.iter().enumerate() {
            if ring.is_running() && ring.layout(&memory).is_err() {
                return refused(format!("ring {index} runs in memory that would go"));
            }
        }
        self.end_all();
        debug!("{}: {} memory regions", self.name, memory.len());
        let known = self.told.memory.unmapped();
        for Unmapped { request, .. } in memory.unmapped() {
            if !known.iter().any(|region| region.request == *request) {
                info!(
                    "{}: memory region not mapped address={:#x} bytes={}; its file is on a disk or \
                     read-only, and no ring or buffer can lie there",
                    self.name, request.guest_address, request.size,
                );
            }
        }
        if !memory.is_sealed() && self.told.memory.is_sealed() {
            info!(
                "{}: guest memory is not sealed: whoever can truncate its file can stop this port",
                self.name
            );
        }
        self.told.memory = Arc::new(memory);
        self.restart_all();
        Ok(None)
    }

    fn mtu(&self) -> u16 {
        self.told.mtu.unwrap_or(self.config.mtu)
    }

    fn restart_if_running(&mut self, index: u32) -> Result<Option<Reply>, Refusal> {
        if self.ring(index)?.is_running() {
            self.restart(index);
        }
        Ok(None)
    }

    /// Ends all sessions, and notes where their rings stand.
    fn end_all(&mut self) {
        let ended = worker::end_all(&mut self.workers);
        ended.into_iter().enumerate().for_each(|(pair, ended)| self.note(pair, ended));
    }

    fn restart_all(&mut self) {
        self.end_all();
        (0..self.workers.len()).for_each(|pair| self.begin(pair));
    }

    fn restart(&mut self, index: u32) {
        let pair = self.pair_of(index as usize);
        self.end(pair);
        self.begin(pair);
    }

    /// Ends the session of a queue pair, and notes where its rings stand.
    fn end(&mut self, pair: usize) {
        let ended = self.workers[pair].end();
        self.note(pair, ended);
    }

    fn note(&mut self, pair: usize, ended: Ended) {
        let control = self.control_ring();
        let data = [(2 * pair, ended.rx), (2 * pair + 1, ended.tx)];
        let data = data.into_iter().filter(|(index, _)| Some(*index) != control);
        let control = control.filter(|_| pair == 0).map(|index| (index, ended.control));
        for (index, next) in data.chain(control) {
            let ring = &mut self.told.rings[index];
            ring.base = next.unwrap_or(ring.base);
            if ended.fault.is_some() {
                ring.fault.clone_from(&ended.fault);
            }
        }
    }

    /// Begins the session that the state asks for, if any ring of the pair is to run.
    fn begin(&mut self, pair: usize) {
        let Some(negotiated) = self.told.features.filter(|_| !self.suspended) else { return };
        let control = self.control_ring();
        let mut session = |index: usize| {
            self.told.rings[index].session(&self.told.memory, &negotiated, |why| {
                warn!("{}: ring {index}: {why}", self.name);
            })
        };
        let [rx, tx] = [2 * pair, 2 * pair + 1]
            .map(|index| if Some(index) == control { None } else { session(index) });
        let control = control.filter(|_| pair == 0).and_then(session);
        if rx.is_none() && tx.is_none() && control.is_none() {
            return;
        }
        let mtu = self.mtu();
        let (memory, rules) = (self.told.memory.clone(), self.rules.clone());
        let (link, pairs) = (self.config.link, self.workers.len() as u16);
        self.workers[pair].begin(Session {
            pairs,
            memory,
            negotiated,
            mtu,
            link,
            rules,
            rx,
            tx,
            control,
        });
    }
}
