//! What a device was told, to be told to another daemon's.

use std::io;
use std::sync::Arc;

use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures as ProtocolFeatures};

use super::Device;
use super::ring::{Kick, VringState};
use crate::guest::{GuestMemory, Inflight};
use crate::protocol::{MAX_TABLE_REGIONS, ReplayMessage, can_be_passed};
use crate::sys::process::unwritable_memory;

impl Device {
    /// Ends all sessions. None begins before [`resume`](Self::resume), whatever the frontend says.
    pub fn suspend(&mut self) {
        self.suspended = true;
        self.end_all();
    }

    /// Begins the sessions that the frontend's state asks for.
    pub fn resume(&mut self) {
        self.suspended = false;
        self.restart_all();
    }

    /// The protocol features that the frontend's state needs, whether or not they are negotiated still: a
    /// frontend may negotiate again after it has used one.
    fn needed_protocol_features(&self) -> ProtocolFeatures {
        let told = &self.told;
        let mut needed = ProtocolFeatures::empty();
        for (is_needed, feature) in [
            (told.log.is_some(), ProtocolFeatures::LOG_SHMFD),
            (needs_slots(&told.memory), ProtocolFeatures::CONFIGURE_MEM_SLOTS),
            (told.inflight.is_some(), ProtocolFeatures::INFLIGHT_SHMFD),
            (told.backend_requests.is_some(), ProtocolFeatures::BACKEND_REQ),
            (told.mtu.is_some(), ProtocolFeatures::MTU),
            (told.status != 0, ProtocolFeatures::STATUS),
        ] {
            needed.set(feature, is_needed);
        }
        needed
    }

    /// All that the frontend has told, in an order in which it can be told again.
    ///
    /// # Errors
    /// No socket pair can be made.
    pub fn replay(&self) -> io::Result<Vec<ReplayMessage>> {
        let told = &self.told;
        let mut messages = Vec::new();
        let needed = self.needed_protocol_features();
        let negotiated = told.protocol_features.unwrap_or(ProtocolFeatures::empty());
        if told.protocol_features.is_some() || !needed.is_empty() {
            messages.push(protocol_features(negotiated | needed));
        }
        // Before features that ask for it.
        if let Some(log) = &told.log {
            let (file, offset) = log.source();
            messages.push(ReplayMessage::log(log.length(), offset, file.clone()));
        }
        if let Some(features) = told.features {
            messages.push(ReplayMessage::number(FrontendReq::SET_FEATURES, features.bits()));
        }
        let regions = told.memory.regions().map(|(region, file)| (region, file.clone()));
        let mut regions: Vec<_> = regions.collect();
        if !told.memory.unmapped().is_empty() {
            // Their files were not kept; this is not mapped either.
            let file = Arc::new(unwritable_memory(c"not mapped")?);
            let unmapped = told.memory.unmapped().iter();
            regions.extend(unmapped.map(|region| (region.request, file.clone())));
        }
        if !needs_slots(&told.memory) {
            messages.push(ReplayMessage::memory(regions));
        } else {
            messages.extend(
                regions.into_iter().map(|(region, file)| ReplayMessage::region(&region, file)),
            );
        }
        if let Some(inflight) = &told.inflight {
            let (file, offset) = inflight.source();
            let (rings, size) = inflight.shape();
            let length = Inflight::length(rings, size);
            messages.push(ReplayMessage::inflight(length, offset, rings, size, file.clone()));
        }
        if let Some(file) = &told.backend_requests
            && can_be_passed(file)?
        {
            // Else it stays behind: nothing is sent by it.
            messages.push(ReplayMessage::backend_requests(file.clone()));
        }
        if let Some(mtu) = told.mtu {
            messages.push(ReplayMessage::number(FrontendReq::NET_SET_MTU, mtu.into()));
        }
        let mut sockets_pass = true;
        for (index, ring) in (0..).zip(&told.rings) {
            if index as usize == 2 * self.workers.len()
                && self.control_ring() != Some(index as usize)
            {
                continue;
            }
            retell_ring(index, ring, &mut messages, &mut sockets_pass)?;
        }
        if told.status != 0 {
            messages.push(ReplayMessage::number(FrontendReq::SET_STATUS, told.status.into()));
        }
        if !negotiated.contains(needed) {
            messages.push(protocol_features(negotiated));
        }
        Ok(messages)
    }
}

/// Whether the table can be told region by region only: it is too long for one message, or has nothing
/// mapped yet, which one message must have.
fn needs_slots(memory: &GuestMemory) -> bool {
    let is_unmapped = memory.unmapped().len() == memory.len() && !memory.is_empty();
    memory.len() > MAX_TABLE_REGIONS || is_unmapped
}

/// `sockets_pass` is cleared by the first call socket that can't be passed on: each takes time to find out.
fn retell_ring(
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
        // What can't be passed stays behind, as the backend's channel does.
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
    // One that has stopped for a fault stays so until the guest resets it.
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
