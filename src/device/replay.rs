//! The frontend's state as messages, which a take-over replays to the new daemon.

use std::io;
use std::sync::Arc;

use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures as ProtocolFeatures};

use super::Device;
use super::ring::{Kick, VringState};
use crate::guest::{GuestMemory, Inflight};
use crate::protocol::{MAX_TABLE_REGIONS, ReplayMessage, can_be_passed};
use crate::sys::process::unwritable_memory;

impl Device {
    /// Ends all sessions. No session begins before [`resume`](Self::resume), whatever the frontend requests.
    pub fn suspend(&mut self) {
        self.suspended = true;
        self.end_all();
    }

    /// Begins the sessions that the frontend's state requires.
    pub fn resume(&mut self) {
        self.suspended = false;
        self.restart_all();
    }

    /// Returns the protocol features that a replay needs. They can exceed those negotiated now: a frontend may
    /// negotiate again after it has used one.
    fn needed_protocol_features(&self) -> ProtocolFeatures {
        let frontend = &self.frontend;
        let mut needed = ProtocolFeatures::empty();
        for (is_needed, feature) in [
            (frontend.log.is_some(), ProtocolFeatures::LOG_SHMFD),
            (needs_slots(&frontend.memory), ProtocolFeatures::CONFIGURE_MEM_SLOTS),
            (frontend.inflight.is_some(), ProtocolFeatures::INFLIGHT_SHMFD),
            (frontend.backend_requests.is_some(), ProtocolFeatures::BACKEND_REQ),
            (frontend.mtu.is_some(), ProtocolFeatures::MTU),
            (frontend.status != 0, ProtocolFeatures::STATUS),
        ] {
            needed.set(feature, is_needed);
        }
        needed
    }

    /// Returns messages that restore the frontend's state in another daemon, in an order that it accepts.
    ///
    /// # Errors
    /// The kernel makes no socket pair or memfd.
    pub fn replay(&self) -> io::Result<Vec<ReplayMessage>> {
        let frontend = &self.frontend;
        let mut messages = Vec::new();
        let needed = self.needed_protocol_features();
        let negotiated = frontend.protocol_features.unwrap_or(ProtocolFeatures::empty());
        if frontend.protocol_features.is_some() || !needed.is_empty() {
            messages.push(protocol_features(negotiated | needed));
        }
        // The log comes before SET_FEATURES, which is refused if LOG_ALL is set without a log.
        if let Some(log) = &frontend.log {
            let (file, offset) = log.source();
            messages.push(ReplayMessage::log(log.length(), offset, file.clone()));
        }
        if let Some(features) = frontend.features {
            messages.push(ReplayMessage::number(FrontendReq::SET_FEATURES, features.bits()));
        }
        let regions = frontend.memory.regions().map(|(region, file)| (region, file.clone()));
        let mut regions: Vec<_> = regions.collect();
        if !frontend.memory.unmapped().is_empty() {
            // The files of unmapped regions were not kept. An unwritable memfd is not mapped either.
            let file = Arc::new(unwritable_memory(c"not mapped")?);
            let unmapped = frontend.memory.unmapped().iter();
            regions.extend(unmapped.map(|region| (region.request, file.clone())));
        }
        if !needs_slots(&frontend.memory) {
            messages.push(ReplayMessage::memory(regions));
        } else {
            messages.extend(
                regions.into_iter().map(|(region, file)| ReplayMessage::region(&region, file)),
            );
        }
        if let Some(inflight) = &frontend.inflight {
            let (file, offset) = inflight.source();
            let (rings, size) = inflight.shape();
            let length = Inflight::length(rings, size);
            messages.push(ReplayMessage::inflight(length, offset, rings, size, file.clone()));
        }
        if let Some(file) = &frontend.backend_requests
            && can_be_passed(file)?
        {
            // A channel that cannot be passed is left out: the daemon sends nothing on it.
            messages.push(ReplayMessage::backend_requests(file.clone()));
        }
        if let Some(mtu) = frontend.mtu {
            messages.push(ReplayMessage::number(FrontendReq::NET_SET_MTU, mtu.into()));
        }
        let mut sockets_pass = true;
        for (index, ring) in (0..).zip(&frontend.rings) {
            if index as usize == 2 * self.workers.len()
                && self.control_ring() != Some(index as usize)
            {
                continue;
            }
            replay_ring(index, ring, &mut messages, &mut sockets_pass)?;
        }
        if frontend.status != 0 {
            messages.push(ReplayMessage::number(FrontendReq::SET_STATUS, frontend.status.into()));
        }
        if !negotiated.contains(needed) {
            messages.push(protocol_features(negotiated));
        }
        Ok(messages)
    }
}

/// Returns whether the table requires ADD_MEM_REG: it is too long for SET_MEM_TABLE, or has no mapped region,
/// and SET_MEM_TABLE requires one.
fn needs_slots(memory: &GuestMemory) -> bool {
    let is_unmapped = memory.unmapped().len() == memory.len() && !memory.is_empty();
    memory.len() > MAX_TABLE_REGIONS || is_unmapped
}

/// Appends the messages that restore one ring. The first call or error socket that cannot be passed clears
/// `sockets_pass`, and all later sockets are left out: each attempt can take 50 ms.
fn replay_ring(
    index: u32,
    ring: &VringState,
    messages: &mut Vec<ReplayMessage>,
    sockets_pass: &mut bool,
) -> io::Result<()> {
    if ring.size > 0 {
        messages.push(ReplayMessage::ring(FrontendReq::SET_VRING_NUM, index, ring.size.into()));
    }
    messages.push(ReplayMessage::ring(FrontendReq::SET_VRING_BASE, index, ring.base.into()));
    if let Some(places) = ring.addresses {
        let (descriptors, used, avail) = places.all();
        messages.push(ReplayMessage::addresses(index, descriptors, used, avail));
    }
    for (code, event) in
        [(FrontendReq::SET_VRING_CALL, &ring.call), (FrontendReq::SET_VRING_ERR, &ring.error)]
    {
        // A descriptor that cannot be passed is left out.
        let Some(file) = event.file() else { continue };
        if event.is_socket() {
            *sockets_pass = *sockets_pass && can_be_passed(&file)?;
        }
        if *sockets_pass || !event.is_socket() {
            messages.push(ReplayMessage::event(code, index, Some(file)));
        }
    }
    if let Some(enabled) = ring.enabled {
        messages.push(ReplayMessage::ring(FrontendReq::SET_VRING_ENABLE, index, enabled.into()));
    }
    // A ring that a fault has stopped remains stopped until the guest resets it.
    if let Kick::Given(kick) = &ring.kick
        && ring.fault.is_none()
    {
        let file = kick.as_ref().map(|event| event.file());
        messages.push(ReplayMessage::event(FrontendReq::SET_VRING_KICK, index, file));
    }
    Ok(())
}

fn protocol_features(features: ProtocolFeatures) -> ReplayMessage {
    ReplayMessage::number(FrontendReq::SET_PROTOCOL_FEATURES, features.bits())
}
