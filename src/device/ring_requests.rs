//! Requests about one ring (SET_VRING_NUM to SET_VRING_ENABLE).

use std::fs::File;
use std::sync::Arc;

use log::info;

use super::ring::{self, Kick, VringState};
use super::{Answer, Device, Refusal, refused};
use crate::guest::layout::MAX_SIZE;
use crate::protocol::{Reply, VringAddresses};
use crate::sys::eventfd::NotifyFd;

impl Device {
    fn ring(&mut self, index: u32) -> Result<&mut VringState, Refusal> {
        let (pairs, control) = (self.workers.len(), self.control_ring());
        let has = |at: &usize| *at < 2 * pairs || Some(*at) == control;
        match Some(index as usize).filter(has).and_then(|at| self.frontend.rings.get_mut(at)) {
            Some(ring) => Ok(ring),
            None => refused(format!(
                "there is no ring {index}: the port has {} ({pairs} queue pairs); \
                 start it with a larger --queue-pairs",
                2 * pairs
            )),
        }
    }

    /// Returns the ring, after it has stopped all disabled rings if this one is disabled.
    ///
    /// User-mode Linux sets up rings again that it has only disabled. Their memory may belong to another driver
    /// by then.
    ///
    /// # Errors
    /// The ring runs, or does not exist.
    fn stopped_ring(&mut self, index: u32) -> Result<&mut VringState, Refusal> {
        if self.ring(index)?.is_idle() {
            self.end_all();
            self.frontend.rings.iter_mut().filter(|ring| ring.is_idle()).for_each(VringState::stop);
            self.restart_all();
        }
        let ring = self.ring(index)?;
        if ring.is_running() {
            return refused(format!("ring {index} is running"));
        }
        Ok(ring)
    }

    /// Sets the number of descriptors (SET_VRING_NUM).
    pub(super) fn set_vring_num(&mut self, index: u32, size: u32) -> Answer {
        let valid = |size: &u16| size.is_power_of_two() && *size <= MAX_SIZE;
        let Some(size) = u16::try_from(size).ok().filter(valid) else {
            return refused(format!("ring size {size} is no power of two up to {MAX_SIZE}"));
        };
        self.stopped_ring(index)?.size = size;
        Ok(None)
    }

    /// Sets the index of the ring's next chain (SET_VRING_BASE).
    pub(super) fn set_vring_base(&mut self, index: u32, base: u32) -> Answer {
        let base = u16::try_from(base)
            .map_err(|_| Refusal::Refused(format!("ring base {base} is beyond 65535")))?;
        self.stopped_ring(index)?.base = base;
        Ok(None)
    }

    /// Sets the ring's addresses (SET_VRING_ADDR).
    pub(super) fn set_vring_addr(&mut self, index: u32, addresses: VringAddresses) -> Answer {
        let ring = self.ring(index)?;
        let moved = ring.addresses.is_some_and(|known| !known.same_place(&addresses));
        if moved && ring.is_running() && !ring.is_idle() {
            return refused(format!("the addresses of ring {index} changed while it runs"));
        }
        let ring = if moved { self.stopped_ring(index)? } else { ring };
        ring.addresses = Some(addresses.into());
        Ok(None)
    }

    /// Stops the ring (GET_VRING_BASE). When this returns, the worker does not touch the ring's memory any more.
    pub(super) fn stop_ring(&mut self, index: u32) -> Answer {
        self.ring(index)?;
        let pair = self.pair_of(index as usize);
        self.end(pair);
        let ring = &mut self.frontend.rings[index as usize];
        ring.stop();
        let num = u32::from(ring.base);
        self.begin(pair);
        Ok(Some(Reply::VringState { index, num }))
    }

    /// Starts the ring (SET_VRING_KICK).
    pub(super) fn set_vring_kick(&mut self, index: u32, file: Option<File>) -> Answer {
        let event = ring::foreign(file, NotifyFd::new)?;
        if self.frontend.features.is_none() {
            return refused(format!("ring {index} was started before SET_FEATURES"));
        }
        let memory = self.frontend.memory.clone();
        let ring = self.ring(index)?;
        // The session checks the layout again; this check lets the frontend receive an error.
        let refusal = |why: String| Refusal::Refused(format!("ring {index}: {why}"));
        let layout = ring.layout(&memory).map_err(refusal)?;
        ring.check_arrival(&memory, &layout).map_err(refusal)?;
        ring.kick = Kick::Given(event.map(Arc::new));
        ring.fault = None;
        if self.control_ring() == Some(index as usize) {
            info!("{}: control virtqueue started ring={index}; the daemon answers it", self.name);
        }
        self.restart(index);
        Ok(None)
    }

    /// Sets the ring's call descriptor (SET_VRING_CALL).
    pub(super) fn set_vring_call(&mut self, index: u32, file: Option<File>) -> Answer {
        let event = ring::foreign(file, NotifyFd::or_socket)?;
        let ring = self.ring(index)?;
        let (call, running) = (ring.call.clone(), ring.is_running());
        let worker = &self.workers[self.pair_of(index as usize)];
        call.replace(event, || worker.interrupt());
        // QEMU changes the descriptor when the guest masks or moves an interrupt. A call on the previous
        // descriptor may be lost meanwhile, so the worker calls once more, which does no harm.
        if running {
            worker.call();
        }
        Ok(None)
    }

    /// Sets the ring's error descriptor (SET_VRING_ERR).
    pub(super) fn set_vring_err(&mut self, index: u32, file: Option<File>) -> Answer {
        let event = ring::foreign(file, NotifyFd::or_socket)?;
        let error = self.ring(index)?.error.clone();
        let pair = self.pair_of(index as usize);
        error.replace(event, || self.workers[pair].interrupt());
        Ok(None)
    }

    /// Enables or disables the ring (SET_VRING_ENABLE).
    pub(super) fn set_vring_enable(&mut self, index: u32, enable: bool) -> Answer {
        let ring = self.ring(index)?;
        if ring.enabled.replace(enable) != Some(enable) && ring.is_running() {
            self.restart(index);
        }
        Ok(None)
    }
}
