//! The descriptors that are kept for the frontend, counted.

use std::fs::File;

use super::ring::VringState;
use super::state::Transfer;
use super::{Device, FrontendState, Refusal};
use crate::descriptors::STATE;
use crate::protocol::Request;

impl Device {
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

    /// Checks that what a request adds may be kept, and counts it.
    pub(super) fn check_descriptors(&self, request: &Request) -> Result<(), Refusal> {
        let after = self.descriptors_after(request);
        match &self.descriptors {
            Some(quota) if after > self.kept_descriptors() => {
                quota.keep(after).map_err(Refusal::Refused)
            }
            _ => Ok(()),
        }
    }

    /// Gives back what is not kept any more.
    pub(super) fn count_descriptors(&self) {
        if let Some(quota) = &self.descriptors {
            // Not more than before, or than was permitted before the request.
            let _ = quota.keep(self.kept_descriptors());
        }
    }
}
