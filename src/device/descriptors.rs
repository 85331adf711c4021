//! The count of descriptors that are kept for the frontend, and its limit.

use std::fs::File;

use super::ring::VringState;
use super::state::Transfer;
use super::{Device, FrontendState, Refusal};
use crate::descriptors::STATE;
use crate::protocol::Request;

impl Device {
    /// Returns the number of descriptors that are kept for the frontend, without its connection.
    fn kept_descriptors(&self) -> usize {
        let FrontendState { memory, log, inflight, transfer, backend_requests, .. } =
            &self.frontend;
        let single = [log.is_some(), inflight.is_some(), backend_requests.is_some()];
        let transfer = if matches!(transfer, Some(Transfer::Load(_))) { STATE } else { 0 };
        let rings: usize = self.frontend.rings.iter().map(VringState::descriptors).sum();
        memory.len() + single.into_iter().filter(|is| *is).count() + transfer + rings
    }

    /// Returns the largest number of kept descriptors that a request can lead to.
    fn descriptors_after(&self, request: &Request) -> usize {
        let kept = self.kept_descriptors();
        let replacing = |replaced: bool| kept + usize::from(!replaced);
        let of_ring = |index: &u32, file: &Option<File>, has: fn(&VringState) -> bool| {
            let ring = self.frontend.rings.get(*index as usize);
            ring.map_or(kept, |ring| replacing(file.is_none() || has(ring)))
        };
        match request {
            Request::SetMemTable(regions) => {
                (kept + regions.len()).saturating_sub(self.frontend.memory.len())
            }
            Request::AddMemReg(..) => kept + 1,
            Request::SetVringKick { index, file } => of_ring(index, file, VringState::has_kick),
            Request::SetVringCall { index, file } => {
                of_ring(index, file, |ring| ring.call.is_set())
            }
            Request::SetVringErr { index, file } => {
                of_ring(index, file, |ring| ring.error.is_set())
            }
            Request::SetBackendReqFd(_) => replacing(self.frontend.backend_requests.is_some()),
            Request::SetLogBase { .. } => replacing(self.frontend.log.is_some()),
            Request::SetInflightFd { .. } => replacing(self.frontend.inflight.is_some()),
            Request::SetDeviceStateFd { .. } => kept + STATE,
            _ => kept,
        }
    }

    /// Reserves the descriptors that a request adds.
    ///
    /// # Errors
    /// The request exceeds the port's share, and no descriptors outside of other ports' shares are left.
    pub(super) fn check_descriptors(&self, request: &Request) -> Result<(), Refusal> {
        let after = self.descriptors_after(request);
        match &self.descriptors {
            Some(quota) if after > self.kept_descriptors() => {
                quota.keep(after).map_err(Refusal::Refused)
            }
            _ => Ok(()),
        }
    }

    /// Releases reserved descriptors that are not kept any more.
    pub(super) fn count_descriptors(&self) {
        if let Some(quota) = &self.descriptors {
            // This cannot fail: the count is at most the one reserved before the request.
            let _ = quota.keep(self.kept_descriptors());
        }
    }
}
